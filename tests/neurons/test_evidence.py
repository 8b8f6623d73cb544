"""What a miner shows of a round that it has computed, asked for over real axons as a validator does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch

from model.checkpoint import Encoded
from model.config import BoundaryConfig, BoundaryForm
from model.layout import Layout
from model.split import split
from neurons.archive import Archive, Pick, RoundArchive
from neurons.desks import EvidenceDesk
from neurons.exchange import Desk
from neurons.fetching import NamedState, Source, Withheld
from neurons.kept import Cut, PickedWindow, Vector
from neurons.library import Library
from neurons.quota import Audience, Uplink
from neurons.shelf import Shelf
from neurons.slots import pick
from neurons.stores import Folder
from subnet.manifest import LoadedManifest
from subnet.messages import STATE_PIECES, Shapes, StatePart, StatePieces, StateRequest, UnitRequest
from subnet.swarm.merge import Merged
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import Dropped, MalformedRequest, NotPicked, Refused, Unavailable, UnknownRun
from subnet.transport.synapse import HEADER_LIMIT
from subnet.trust import audit, delta
from subnet.trust.audit import pick_windows, select_pool
from subnet.trust.ledger import TABLES, Evidence
from subnet.trust.quota import Sizes
from subnet.trust.tree import PIECE_BYTES, Tree, pieces_of
from tests.neurons.swarm import SEED, Member, Swarm, manifest, open_corpus, tiny, tokens_file


def shelf_of(folder: Path, loaded: LoadedManifest) -> Shelf:
    return Shelf(folder, "miner", manifest_hash=loaded.digest.hex(), limit=1 << 30)


@dataclass
class Shown:
    """A miner that has trained round 0 and serves it, and a sibling that asks."""

    swarm: Swarm
    miner: Member
    asker: Member
    library: Library
    shares: dict[str, float]
    """Of the stake at work: the asker has all of it."""

    @property
    def held(self) -> RoundArchive:
        return self.swarm.rounds[self.miner.identity.hotkey]

    @property
    def values(self) -> int:
        return self.layout.values

    @property
    def layout(self) -> Layout:
        return self.miner.worker.engine.layout

    @property
    def sizes(self) -> Sizes:
        manifest = self.swarm.loaded.manifest
        return Sizes.of(self.miner.worker.plan, self.layout, Shapes.of(manifest))

    async def close(self, *, count: int = 8, settled: bool = True) -> Evidence:
        """As a cut does, with error feedback. The slot's seed picks `count` windows."""
        _, evidence = await self.miner.worker.close()
        owed, still = Vector(torch.zeros(self.values)), Vector(torch.ones(self.values))
        self.held.keep_cut(replace(self.held.cut, owed=owed, still_owed=still))
        closing = replace(evidence.closing, owed=owed.tree().root, still_owed=still.tree().root)
        evidence = replace(evidence, closing=closing)
        self.held.seeded(0, self.pick(count))
        if settled:
            self.held.audience = Audience(self.shares, self.sizes)
        self.held.evidence = evidence
        self.held.desk = Desk(self.miner.identity.hotkey, [b"payload"], evidence=evidence.root)
        self.miner.archive.cut_is_whole(0)
        await self.miner.archive.settle()
        return evidence

    def pick(self, count: int) -> Pick:
        return partial(pick, seed=SEED, hotkey=self.miner.identity.hotkey, slot=0, count=count, layout=self.layout)

    def picked(self, version: int) -> PickedWindow:
        window = self.held.picked[version]
        assert window is not None
        return window

    def source(self, *, patience: float = 5.0, share: float = 1.0, dendrite: Dendrite | None = None) -> Source:
        loaded, hotkey = self.swarm.loaded, self.miner.identity.hotkey
        stage = self.swarm.roster.stage_of(hotkey)
        assert stage is not None
        return Source(
            dendrite=dendrite or self.asker.dendrite,
            endpoint=self.swarm.endpoints.get,
            run=loaded.run_id,
            number=0,
            hotkey=hotkey,
            plan=split(loaded.manifest.model.config(), loaded.manifest.swarm.stages)[stage],
            layout=self.layout,
            shapes=Shapes.of(loaded.manifest),
            patience=patience,
            share=share,
        )

    async def refused(self, *, unit: int | None = None, **fields: object) -> Refused:
        """What the answer to a bent request for the first piece of the first window is, or for a backward unit."""
        good: dict[str, object] = {"run": self.swarm.loaded.run_id.hex(), "round": 0}
        good |= (
            {"version": 0, "parts": ["weights"], "pieces": [0]} if unit is None else {"sample": unit, "backward": True}
        )
        kind = StateRequest if unit is None else UnitRequest
        with pytest.raises(Refused) as caught:
            await self.asker.dendrite.call(
                self.miner.axon.endpoint,
                self.miner.identity.hotkey,
                kind.model_validate({**good, **fields}),
                reply=StatePieces,
                reply_specs=lambda reply: reply.specs(),
                max_reply_bytes=HEADER_LIMIT + (1 << 20),
                deadline=5,
            )
        return caught.value


@asynccontextmanager
async def shown(folder: Path, *, uplink: float = 1e9, on_disk: bool = False) -> AsyncIterator[Shown]:
    entry = tokens_file(folder)
    boundary = BoundaryConfig(form=BoundaryForm.A, width=8)
    described = manifest(tiny(boundary=boundary), entry, stages=2, wire="bfloat16")
    loaded = described.write(folder / "manifest.toml")
    swarm = Swarm(loaded, open_corpus(folder, described, entry))
    miner, asker = swarm.stage(1)[0], swarm.stage(0)[0]
    if on_disk:
        miner.archive = Archive(shelf=shelf_of(folder, loaded))
    async with swarm:
        library = Library(loaded.run_id)
        EvidenceDesk(loaded.run_id, miner.archive, library, Uplink(uplink)).open(miner.axon)
        await asker.worker.drive(limit=10)
        yield Shown(swarm, miner, asker, library, {asker.identity.hotkey: 1.0})


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
async def test_every_part_of_every_window_and_of_the_cut_is_shown_in_proven_pieces(
    tmp_path: Path, on_disk: bool
) -> None:
    async with shown(tmp_path, on_disk=on_disk) as show:
        evidence = await show.close()
        assert (show.miner.archive.bytes == 0) == on_disk
        assert show.held.cut.mapped == on_disk
        assert {show.picked(head.version).mapped for head in evidence.heads} == {on_disk}
        source, values = show.source(), show.values
        assert evidence.size == sum(len(getattr(evidence.tables(), name)) for name in TABLES)
        assert 4 * values > PIECE_BYTES, "else a proof has no hashes"
        assert len(evidence.heads) == 3
        parts = dict.fromkeys(get_args(StatePart), values) | {"optimizer": 2 * values, "next_optimizer": 2 * values}
        del parts["previous_weights"]  # no merge came
        for head in evidence.heads:
            cut = {"closing": evidence.closing.weights}
            cut |= {"owed": evidence.closing.owed, "still_owed": evidence.closing.still_owed}
            for part, count in parts.items():
                root = cut.get(part) or getattr(head, part)
                state = NamedState(part, root, count)
                pieces = await source.pieces(head.version, [(state, index) for index in range(pieces_of(4 * count))])
                assert Tree.of(b"".join(pieces)).root == root
        with pytest.raises(Withheld):
            await source.pieces(0, [(NamedState("weights", evidence.heads[0].next_weights, values), 0)])


async def test_a_window_before_which_a_merge_was_taken_over_shows_the_weights_before_it(tmp_path: Path) -> None:
    async with shown(tmp_path) as show:
        changing = asyncio.create_task(show.miner.worker.change_weights(lambda weights: 0.99 * weights, held=1))
        await show.asker.worker.drive(limit=20)
        await changing
        evidence, values = await show.close(), show.values
        (after,) = (head for head in evidence.heads if head.merged)
        before = evidence.heads[evidence.heads.index(after) - 1]
        assert after.weights != before.next_weights
        state = NamedState("previous_weights", before.next_weights, values)
        pieces = [(state, index) for index in range(pieces_of(4 * values))]
        weights = torch.frombuffer(
            bytearray(b"".join(await show.source().pieces(after.version, pieces))), dtype=torch.float32
        )
        assert torch.equal(0.99 * weights, show.picked(after.version).weights)
        with pytest.raises(Withheld):
            await show.source().pieces(before.version, pieces)


async def test_weights_travel_as_deltas_and_are_not_packed_for_who_may_not_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shown(tmp_path) as show:
        evidence, base = await show.close(), show.picked(0).weights
        await show.library.put(0, Merged(base, torch.empty(0)))
        head = evidence.heads[1]
        data, theta = await show.source().weights(head, base, held=0)
        assert torch.equal(theta, show.picked(head.version).weights)
        assert len(data) < 4 * show.values
        audience = show.held.audience
        assert audience is not None
        limit = audience.limit(show.asker.identity.hotkey, evidence.heads, tables=evidence.size)
        audience.take(show.asker.identity.hotkey, limit - 2 * len(data) + 1)

        def again(*_: object) -> bytes:
            raise AssertionError("it was packed before it was refused")

        monkeypatch.setattr(delta, "encode", again)
        with pytest.raises(Withheld, match=f"{len(data)} bytes after .* limit {limit}"):
            await show.source().weights(head, base, held=0)


async def test_windows_that_follow_each_other_share_their_states(tmp_path: Path) -> None:
    async with shown(tmp_path) as show:
        await show.miner.worker.close()
        windows = show.held.windows
        assert len(windows) == 3
        assert all(windows[before].closing is windows[after].opening for before, after in pairwise(sorted(windows)))


async def test_a_state_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with shown(tmp_path) as show:
        evidence = await show.close()

        def again(_: object) -> Tree:
            raise AssertionError("the tree was there already")

        monkeypatch.setattr(Tree, "of", again)
        for index in range(2):
            root = evidence.heads[0].weights
            await show.source().pieces(0, [(NamedState("weights", root, show.values), index)])


async def test_while_the_round_is_open_nothing_is_shown(tmp_path: Path) -> None:
    async with shown(tmp_path) as show:
        refusal = await show.refused()
        assert isinstance(refusal, Unavailable)
        assert refusal.message == "the ledger of round 0 is still open; ask after CUT"
        assert refusal.retry_after
        root = (await show.close()).heads[0].weights
        await show.source().pieces(0, [(NamedState("weights", root, show.values), 0)])


async def test_before_all_seeds_are_known_nothing_is_shown(tmp_path: Path) -> None:
    async with shown(tmp_path) as show:
        await show.close(settled=False)
        refusal = await show.refused()
        assert isinstance(refusal, Unavailable)
        assert refusal.message == "a seed of round 0 is not known here; ask again"


async def test_only_picked_windows_are_shown_and_their_units(tmp_path: Path) -> None:
    async with shown(tmp_path) as show:
        evidence = await show.close(count=1)
        hotkey = show.miner.identity.hotkey
        ((picked, _),) = pick_windows(evidence.heads, seeds=[SEED], hotkey=hotkey, count=1)
        assert not show.held.windows
        assert list(show.held.picked) == [picked.version]
        source = show.source()
        for head in evidence.heads:
            leaf = evidence.window(head.version)[0]
            if head is picked:
                state = NamedState("next_optimizer", head.next_optimizer, 2 * show.values)
                await source.pieces(head.version, [(state, 0)])
                assert (await source.unit(leaf)).input.numel()
                continue
            for wanted in (show.refused(version=head.version), show.refused(unit=leaf.sample)):
                refusal = await wanted
                assert isinstance(refusal, NotPicked)
                assert f"window {head.version} of round 0 is none that its slot's seed picks" in refusal.message


async def test_a_picked_window_that_was_lost_is_said_to_be(tmp_path: Path) -> None:
    """As after a restart, when only the tables are here."""
    async with shown(tmp_path) as show:
        evidence, held = await show.close(), show.held
        held.clear()
        held.restore(evidence)
        held.seeded(0, show.pick(1))
        refusal = await show.refused(version=min(held.picked))
        assert isinstance(refusal, Dropped)
        assert "is not kept here: given up, or lost in a restart" in refusal.message


async def test_a_miner_that_was_killed_finds_its_files_and_shows_all_but_what_it_had_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shown(tmp_path, on_disk=True) as show:
        put, reached = Folder.put, asyncio.Event()

        async def put_or_die(self: Folder, name: str, encoded: Encoded) -> None:
            if name.endswith("window-00000002.safetensors"):  # killed before this is written
                reached.set()
                await asyncio.Event().wait()
            await put(self, name, encoded)

        monkeypatch.setattr(Folder, "put", put_or_die)
        closing = asyncio.create_task(show.close())
        await reached.wait()
        evidence, killed = show.held.evidence, show.miner.archive
        assert evidence is not None
        closing.cancel()
        for task in killed._working:
            task.cancel()
        base = show.held.weights(0)
        assert base is not None
        await show.library.put(0, Merged(base.clone(), torch.empty(0)))

        again = Archive(shelf=shelf_of(tmp_path, show.swarm.loaded))
        await again.recall(0)
        held = again.open(0)
        held.restore(evidence)
        held.desk = Desk(show.miner.identity.hotkey, [b"payload"], evidence=evidence.root)
        held.seeded(0, show.pick(8))
        held.audience = Audience(show.shares, show.sizes)
        killed._rounds = again._rounds  # whom the open axon asks
        assert again.bytes == 0
        assert list(held.picked) == [0, 1, 2]
        for head in evidence.heads[:2]:
            for part, count in (("weights", show.values), ("next_optimizer", 2 * show.values)):
                state = NamedState(part, getattr(head, part), count)  # type: ignore[arg-type]
                await show.source().pieces(head.version, [(state, 0)])
            for leaf in evidence.window(head.version):
                assert torch.is_tensor((await show.source().unit(leaf)).input)
            _, theta = await show.source().weights(head, base, held=0)
            assert torch.equal(theta, show.picked(head.version).weights)
        refusal = await show.refused(version=2)
        assert isinstance(refusal, Dropped)
        assert "is not kept here: given up, or lost in a restart" in refusal.message
        refusal = await show.refused(parts=["closing"])
        assert isinstance(refusal, Dropped), "it stood behind the window that was not written"


async def test_what_is_not_there_is_refused_by_what_is_wrong_with_it(tmp_path: Path) -> None:
    async with shown(tmp_path) as show:
        await show.close()
        count = pieces_of(4 * show.values)
        for index in (count, 2**32 - 1):
            refusal = await show.refused(pieces=[index])
            assert isinstance(refusal, MalformedRequest)
            assert f"weights: piece {index} of {count}" in refusal.message
        assert isinstance(await show.refused(version=3), NotPicked)
        assert isinstance(await show.refused(version=2**32 - 1), NotPicked)
        assert isinstance(await show.refused(unit=2**63 - 1), Dropped)
        assert isinstance(await show.refused(run="00" * 8), UnknownRun)
        assert isinstance(await show.refused(round=1), Unavailable)
        show.held.keep_cut(Cut())
        refusal = await show.refused(parts=["owed"])
        assert isinstance(refusal, Dropped)
        assert "owed" in refusal.message


async def test_a_piece_that_the_seed_does_not_name_is_refused_and_those_that_it_names_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "POOL", 1)
    async with shown(tmp_path) as show:
        evidence = await show.close()
        hotkey, total = show.miner.identity.hotkey, pieces_of(4 * show.values)
        for head in evidence.heads:
            (named,) = select_pool(total, seed=SEED, hotkey=hotkey, version=head.version)
            state = NamedState("next_weights", head.next_weights, show.values)
            await show.source().pieces(head.version, [(state, named)])
            for other in set(range(total)) - {named}:
                refusal = await show.refused(version=head.version, parts=["next_weights"], pieces=[other])
                assert isinstance(refusal, NotPicked)
                assert refusal.message == (
                    f"next_weights of window {head.version}: piece {other} is none of the 1 that its window's seed "
                    "names; ask for those"
                )
                with pytest.raises(Withheld, match="none of the 1"):
                    await show.source().pieces(head.version, [(state, other)])


@pytest.mark.parametrize(
    "fields",
    [
        {"pieces": [-1]},
        {"pieces": [2**32]},
        {"version": -1},
        {"parts": ["moments"]},
        {"parts": []},
        {"pieces": [0] * (STATE_PIECES + 1), "parts": ["weights"] * (STATE_PIECES + 1)},
        {"pieces": [0, 1]},
    ],
)
def test_a_request_for_what_cannot_be_is_none(fields: dict[str, object]) -> None:
    good = {"run": "00" * 8, "round": 0, "version": 0, "parts": ["weights"], "pieces": [0]}
    StateRequest.model_validate(good)
    with pytest.raises(ValueError):
        StateRequest.model_validate({**good, **fields})


def test_a_vector_has_the_pieces_of_its_tree() -> None:
    vector = Vector(torch.arange(20_000, dtype=torch.float32))
    assert vector.tree().count == 2
    assert b"".join(vector.piece(index).numpy().tobytes() for index in range(2)) == vector.values.numpy().tobytes()
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"piece {index} of 2"):
            vector.piece(index)
