"""A doubter recomputes a round's scores from chain, tables and reports, and gets what validators got."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import pytest

from neurons.telemetry import MinerScored
from scripts import recompute
from scripts.score import Explained, RoundExplained, text
from subnet.chain import BittensorChain
from subnet.identity import Identity
from subnet.metagraph import ChainState, Endpoint, Neuron
from subnet.swarm.roster import Roster
from subnet.transport.dendrite import Dendrite
from tests.neurons.audited import NOW, NUMBER, SEED, ClosedRound, Court
from tests.neurons.test_agreement import Seat, Town, apart, played

TERMS = ("evidence", "paid", "FLOPs", "timeliness", "scarcity", "score", "mean", "share", "burn")
"""Of an explanation, as far as it does not say who looked."""


class Chain:
    """One state at all blocks."""

    def __init__(self, state: ChainState, weights: Mapping[int, Mapping[int, float]]) -> None:
        self._state, self._weights = state, weights

    async def passed(self, block: int, *, stall: float) -> None:
        del block, stall

    async def state_at(self, block: int) -> ChainState:
        del block
        return self._state

    async def block_hash(self, block: int) -> str:
        return f"{block:064x}"

    async def weights(self) -> Mapping[int, Mapping[int, float]]:
        return self._weights


class Look(recompute._Look):
    """A doubter that has found the closed round."""

    roster: Roster

    async def _closed_roster(self) -> Roster:
        return self.roster


def on_chain(closed: ClosedRound, seats: list[Seat], endpoints: Mapping[str, str]) -> ChainState:
    """What the chain says of the round: miners as `Bar` has them, and validators with half of the stake each."""
    state = seats[0].facts(closed.number).cut

    def at(neuron: Neuron) -> Neuron:
        place = urlsplit(endpoints[neuron.hotkey])
        assert place.hostname is not None and place.port is not None  # noqa: PT018
        return replace(neuron, endpoint=Endpoint(place.hostname, place.port))

    watching = [
        replace(
            state.neurons[0],
            uid=len(state.neurons) + index,
            hotkey=seat.identity.hotkey,
            stake=0.5,
            validator_permit=True,
            record=seat.observed().record.encode(),
        )
        for index, seat in enumerate(seats)
    ]
    return replace(state, neurons=tuple(at(neuron) for neuron in (*state.neurons, *watching)))


def terms(lines: list[str]) -> dict[str, str]:
    """Words by term; a line without a term goes on with the one before."""
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if line.startswith("    "):
            name = line[4:17].strip() or name
            found[name] = f"{found.get(name, '')} {line[17:].strip()}".strip()
    return found


@pytest.mark.timeout(180)
async def test_a_doubter_gets_the_validators_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = played(tmp_path, NUMBER)
    cheat = closed.stage(1)[0].hotkey
    monkeypatch.setattr(recompute, "seed_of", lambda _hash, _purpose: SEED)
    monkeypatch.setattr(recompute, "slots_of", lambda _manifest: closed.slots)
    async with Town(closed, tmp_path) as town, Court(closed, validators=()) as court:
        town.endpoints.update(court.endpoints)
        for work in closed.works.values():
            assert work.evidence is not None
            acks = tuple(seat.ack(seat.identity, work) for seat in town.seats)
            work.evidence = replace(work.evidence, acks=acks)
        seeds, *secrets = apart(closed, cheat)
        for seat, secret in zip(town.seats, secrets, strict=True):
            await seat.audit(closed, replace(closed.facts(secret, stake_share=0.5), seeds=seeds))
        for seat in town.seats:
            await seat.read(*(other.observed() for other in town.seats))
            await seat.close()
        judge = town.seats[0]
        scored = {event.uid: event for event in judge.events(MinerScored) if isinstance(event, MinerScored)}
        state = on_chain(closed, town.seats, town.endpoints)
        async with Dendrite(Identity.from_uri("//doubter"), now_ns=NOW) as dendrite:
            chain = cast("BittensorChain", Chain(state, {9: dict(judge.chain.set[0])}))
            look = Look(closed.loaded, chain, dendrite, "doubter")
            look.roster = closed.roster
            for uid, event in scored.items():
                recomputed = terms(await look.explain(uid, event.hotkey))
                said = terms(list(text(uid, [Explained("one", "", [RoundExplained(event, "")])])))
                assert {name: recomputed[name] for name in TERMS} == {name: said[name] for name in TERMS}
                assert recomputed["weight"].startswith(f"{event.weight:.6f}; on chain {event.weight:.6f} by uid 9")
                assert ("no failure reported" in recomputed["correctness"]) == (event.hotkey != cheat)
                assert (event.score == 0) == (event.hotkey == cheat)
                assert not {"no table", "no report"} & recomputed.keys()
