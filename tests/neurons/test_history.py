"""Replay is the live recurrence; a newcomer takes over from a peer what the stake commits to, and nothing else."""

import dataclasses
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from neurons.bootstrap import BootstrapError, RosterDesk, fetch_roster, join_history
from neurons.history import History, HistoryError, lag, replay
from scripts.roster import explain
from subnet.identity import Identity
from subnet.manifest import LoadedManifest
from subnet.metagraph import ChainState, Endpoint, Neuron
from subnet.swarm.record import Phase, Record
from subnet.swarm.roster import Roster, Standing
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from tests.neurons.swarm import manifest, tiny, tokens_file
from tests.subnet.swarm.histories import neuron, state

START, LENGTH = 3, 20


class Chain:
    """Recorded states by block: four miners that work, one that comes in round 1, one that goes in round 2."""

    def __init__(self, loaded: LoadedManifest) -> None:
        self.run = loaded.run_id
        self.marks = loaded.manifest.round
        self.reads: list[int] = []

    async def state_at(self, block: int) -> ChainState:
        self.reads.append(block)
        neurons = [self._neuron(uid, block) for uid in range(5)]
        return state([one for one in neurons if one is not None], block=block)

    def _neuron(self, uid: int, block: int) -> Neuron | None:
        """Its record speaks of the newest round whose CUT is at this block or was before."""
        if block < START - 1 + uid % 2 or (uid == 4 and block < START + LENGTH):
            return None
        seen = min(block, START + 2 * LENGTH - 1) if uid == 3 else block
        number = (seen - START - self.marks.cut) // LENGTH
        have = START + number * LENGTH + self.marks.have
        phase = Phase.HAVE if seen >= have else Phase.CUT
        weights = bytes([number + 2]) * 32
        if number < 0 or (uid == 4 and number < 2):
            number, phase = max(0, number), Phase.READY
        record = Record(run=self.run, round=number, phase=phase, weights=weights, root=b"r" * 32, have=0b1111)
        return neuron(uid, record=record, record_block=max(0, seen - 1), registered_at=0)


def load(folder: Path, **marks: int) -> LoadedManifest:
    content = manifest(tiny(), tokens_file(folder / "data"), stages=2, replicas=2)
    chosen = {"close": 10, "cut": 12, "have": 14, "merge": 16, "length": LENGTH} | marks
    content = content.model_copy(
        update={
            "round": content.round.model_copy(update=chosen),
            "run": content.run.model_copy(update={"activation_block": 0}),
        }
    )
    return content.write(folder / "manifest.toml")


async def rosters(loaded: LoadedManifest, until: int) -> list[Roster]:
    return [found.roster async for found in replay(loaded, Chain(loaded).state_at, until=until)]


async def test_a_replay_is_what_a_node_computed_round_by_round(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    chain = Chain(loaded)
    live = History(loaded, chain.state_at)
    with pytest.raises(HistoryError, match="round 0"):
        await live.step()
    first = await live.begin()
    assert first is not None
    seen = [first.roster] + [(await live.step()).roster for _ in range(4)]
    assert await rosters(loaded, START + 4 * LENGTH) == seen
    assert await rosters(loaded, START + 5 * LENGTH - 1) == seen
    assert await rosters(loaded, START - 1) == []
    assert [roster.block for roster in seen] == [START + number * LENGTH for number in range(5)]
    assert [roster.parent for roster in seen[1:]] == [roster.digest for roster in seen[:-1]]
    assert seen[0].anchors[0].held == 0
    assert [roster.anchors[0].held for roster in seen[1:]] == [0, 1, 2, 3]
    newcomer, gone = seen[0].table[0].hotkey[:-1] + "4", seen[0].table[3].hotkey
    standings = [roster.state_of(newcomer) for roster in seen]
    assert standings == [None, Standing.JOIN, Standing.ACTIVE, Standing.ACTIVE, Standing.ACTIVE]
    assert [gone in roster.members for roster in seen] == [True, True, True, False, False]
    # Who goes on from a snapshot gets the same.
    later = History(loaded, chain.state_at, known=[seen[2]])
    assert [(await later.step()).roster for _ in range(2)] == seen[3:]


async def test_with_have_beyond_the_round_the_outcome_is_taken_a_round_later(tmp_path: Path) -> None:
    deep = load(tmp_path, close=18, cut=24, have=26, merge=28)
    assert (lag(load(tmp_path).manifest.round), lag(deep.manifest.round)) == (1, 2)
    chain = Chain(deep)
    history = History(deep, chain.state_at)
    first = await history.begin()
    assert first is not None
    chain.reads.clear()
    second = (await history.step()).roster
    assert chain.reads == [START + LENGTH]
    chain.reads.clear()
    third = (await history.step()).roster
    assert chain.reads == [START + 24, START + 26, START + 2 * LENGTH]
    again = History(deep, chain.state_at, known=[second, third])
    assert (await again.step()).roster == (await history.step()).roster
    with pytest.raises(HistoryError, match="round 1 is missing"):
        await History(deep, chain.state_at, known=[third]).step()


async def test_every_neuron_is_explained(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    explained = await explain(loaded, Chain(loaded).state_at, until=START + 4 * LENGTH)
    assert explained is not None
    reasons = {hotkey[-1]: reason for hotkey, reason in explained.reasons.items()}
    assert set(reasons) == set("01234")
    assert (0, f"there when 2 stages gathered at block {START}") in reasons.values()
    assert reasons["3"][1].startswith("out: no record since")
    assert reasons["4"][1].startswith("holds the state of stage")
    assert await explain(loaded, Chain(loaded).state_at, until=0) is None


class Peers:
    """Axons that serve rosters, and a newcomer's dendrite."""

    def __init__(self, stack: AsyncExitStack, run: bytes) -> None:
        self.stack, self.run = stack, run
        self.endpoints: dict[str, Endpoint] = {}
        self.newcomer = Identity.from_uri("//newcomer")

    async def add(self, uri: str, *kept: Roster) -> str:
        hotkey = Identity.from_uri(uri).hotkey
        axon = Axon(Admission(hotkey, allow=lambda _hotkey, _route: None, now_ns=time.time_ns))
        desk = RosterDesk(self.run)
        desk.open(axon)
        for roster in kept:
            desk.keep(roster)
        await axon.start()
        self.stack.push_async_callback(axon.stop)
        self.endpoints[hotkey] = Endpoint("127.0.0.1", axon.port)
        return hotkey

    def state(self, digests: dict[str, bytes]) -> ChainState:
        neurons = []
        for uid, (hotkey, endpoint) in enumerate(self.endpoints.items()):
            record = Record(run=self.run, round=1, phase=Phase.READY, roster=digests[hotkey])
            one = neuron(uid, record=record, stake=1.0, permit=True)
            neurons.append(dataclasses.replace(one, hotkey=hotkey, endpoint=endpoint))
        return state(neurons)


async def test_a_newcomer_takes_the_roster_that_the_stake_commits_to(tmp_path: Path) -> None:
    loaded = load(tmp_path, close=18, cut=24, have=26, merge=28)
    known = await rosters(loaded, START + 3 * LENGTH)
    newest = known[-1]
    forged = dataclasses.replace(newest, anchors=known[0].anchors)
    async with AsyncExitStack() as stack:
        peers = Peers(stack, loaded.run_id)
        honest = await peers.add("//honest", *known)
        empty = await peers.add("//empty")
        liar = await peers.add("//liar", forged)
        dendrite = await stack.enter_async_context(Dendrite(peers.newcomer, now_ns=time.time_ns))
        asker = peers.newcomer.hotkey

        agreed = peers.state(dict.fromkeys((honest, empty, liar), newest.digest))
        assert await fetch_roster(dendrite, loaded, agreed, asker=asker) == newest
        chain = Chain(loaded)
        history = await join_history(dendrite, loaded, agreed, chain.state_at, asker=asker)
        assert (await history.step()).roster == (await rosters(loaded, START + 4 * LENGTH))[-1]

        split = peers.state({honest: newest.digest, empty: newest.digest, liar: forged.digest})
        with pytest.raises(BootstrapError, match="two thirds"):
            await fetch_roster(dendrite, loaded, split, asker=asker)
        unknown = peers.state(dict.fromkeys((honest, empty, liar), b"u" * 15))
        with pytest.raises(BootstrapError, match="none of 3 peers"):
            await fetch_roster(dendrite, loaded, unknown, asker=asker)


async def test_a_peer_that_serves_another_roster_is_passed_over(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    known = await rosters(loaded, START + LENGTH)

    class Lying(Roster):
        digest = known[1].digest

    async with AsyncExitStack() as stack:
        peers = Peers(stack, loaded.run_id)
        liar = await peers.add(
            "//liar", Lying(**{f.name: getattr(known[0], f.name) for f in dataclasses.fields(Roster)})
        )
        dendrite = await stack.enter_async_context(Dendrite(peers.newcomer, now_ns=time.time_ns))
        with pytest.raises(BootstrapError, match="none of 1 peers"):
            await fetch_roster(dendrite, loaded, peers.state({liar: known[1].digest}), asker=peers.newcomer.hotkey)
