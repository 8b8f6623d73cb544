"""What a miner keeps of its rounds: until a seed is known everything, then what it picks, and never above its limit."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from model.config import BoundaryConfig, BoundaryForm
from model.split import split
from neurons.archive import Archive, Pick, RoundArchive
from neurons.kept import Cut, KeptWindow, NotNamedError, PickedWindow, State, Vector
from neurons.miner import Miner
from neurons.node import Node, NodeError
from neurons.ring import least_ring
from neurons.slots import keep_picked, pick, slot_seeds, slots_of
from subnet.metagraph import ChainState
from subnet.quantities import parse_size, written
from subnet.swarm.record import Flags, Phase, Record
from subnet.swarm.roster import Roster
from subnet.trust.audit import POOL, UnitTensors, pick_windows, select_pool, select_windows
from subnet.trust.heads import WindowHead, slot_end
from subnet.trust.ledger import Direction, UnitKey
from subnet.trust.pool import Pool
from subnet.trust.quota import ROUNDS_KEPT, Sizes
from subnet.trust.step import moments_beside
from subnet.trust.tree import PIECE_BYTES, PIECE_VALUES, pieces_of, proven
from tests.neurons.swarm import Swarm, manifest, one_vector, open_corpus, tiny, tokens_file
from tests.virtual import run

VALUES = 1000
STATE = 12 * VALUES
UNIT = 2 * 256
"""An input and an output."""
THIN = 4 * VALUES + 2 * STATE
"""A picked window without its units: its weights, and the only piece of each part, which takes no proof."""
HOTKEY, VALIDATOR = "5Miner", "5Validator"
RUN = b"a run id"
LAYOUT = one_vector(VALUES)
SIZES = Sizes(weights=4 * VALUES, flat=4 * VALUES, state=STATE, looks=0, forward=UNIT, backward=UNIT)


def state(values: int = VALUES, *, seed: int | None = None) -> State:
    vectors = [torch.zeros(count) for count in (values, 2 * values)]
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        vectors = [torch.randn(vector.shape, generator=generator) for vector in vectors]
    return State(*map(Vector, vectors))


def head(version: int, slot: int) -> WindowHead:
    root = bytes(32)
    return WindowHead(
        version=version,
        steps=version,
        slot=slot,
        forward=1,
        backward=1,
        merged=0,
        weights=root,
        optimizer=root,
        units=root,
        next_weights=root,
        next_optimizer=root,
    )


def picking(slot: int, count: int = 1) -> Pick:
    return partial(pick, seed=b"seed", hotkey=HOTKEY, slot=slot, count=count, layout=LAYOUT)


@dataclass
class Training:
    """A replica that trains window after window, two units in each."""

    held: RoundArchive
    now: State = field(default_factory=state)
    version: int = 0

    def __post_init__(self) -> None:
        self.held.open_window(self.version, self.now)

    def window(self, slot: int, *, hashed: bool = True) -> WindowHead:
        for direction in Direction:
            unit = UnitTensors(torch.zeros(256, dtype=torch.uint8), None, torch.zeros(256, dtype=torch.uint8))
            self.held.add(self.version, UnitKey(self.version, direction), unit)
        self.now = state()
        self.held.close_window(slot, self.now)
        entered = head(self.version, slot)
        if hashed:
            self.held.enter(entered)
        self.version += 1
        self.held.open_window(self.version, self.now)
        return entered


def test_states_and_tensors_that_windows_share_count_once() -> None:
    archive = Archive()
    training = Training(archive.open(0))
    assert archive.bytes == STATE
    for closed in range(1, 4):
        training.window(0)
        assert archive.bytes == (closed + 1) * STATE + closed * 2 * UNIT
    x = torch.zeros(100)
    training.held.add(3, UnitKey(90, Direction.FORWARD), UnitTensors(x, None, None))
    training.held.add(3, UnitKey(90, Direction.BACKWARD), UnitTensors(x, None, None))
    assert archive.bytes == 4 * STATE + 6 * UNIT + 400


def test_after_a_slots_seed_only_what_it_picks_is_left() -> None:
    archive = Archive()
    training = Training(archive.open(0))
    heads = [training.window(version // 6) for version in range(12)]
    held = training.held
    held.seeded(0, picking(0))
    (chosen,) = select_windows(heads, seed=b"seed", hotkey=HOTKEY, slot=0, count=1)
    assert set(held.windows) == set(range(6, 13))
    assert held.picked.keys() == {chosen.version}
    assert archive.bytes == 7 * STATE + THIN + 7 * 2 * UNIT
    for version in range(6):
        there = version == chosen.version
        assert (held.unit(UnitKey(version, Direction.FORWARD)) is not None) == there
        assert (held.part(version, "next_optimizer") is not None) == there
        assert (held.weights(version) is not None) == there
    held.seeded(1, picking(1))
    assert set(held.windows) == set(range(6, 13)), "slot 1 may still get windows"
    held.end(training.now.weights)
    (second,) = select_windows(heads, seed=b"seed", hotkey=HOTKEY, slot=1, count=1)
    assert not held.windows
    assert held.picked.keys() == {chosen.version, second.version}
    held.keep_cut(Cut())
    assert archive.bytes == 2 * THIN + 2 * 2 * UNIT


def test_a_seed_waits_for_the_heads_of_its_slot() -> None:
    training = Training(RoundArchive())
    heads = [training.window(0), training.window(0, hashed=False), training.window(1, hashed=False)]
    training.held.seeded(0, picking(0))
    assert set(training.held.windows) == {0, 1, 2, 3}
    training.held.enter(heads[1])
    (chosen,) = select_windows(heads, seed=b"seed", hotkey=HOTKEY, slot=0, count=1)
    assert set(training.held.windows) == {2, 3}
    assert training.held.picked.keys() == {chosen.version}


def whole_window(values: int) -> KeptWindow:
    opening, closing = state(values, seed=1), state(values, seed=2)
    unit = UnitTensors(torch.ones(8), None, torch.ones(8))
    previous = Vector(opening.weights.values + 1)
    return KeptWindow(opening, closing, units={UnitKey(0, Direction.FORWARD): unit}, previous=previous)


@pytest.mark.parametrize("values", [(POOL + 7) * PIECE_VALUES + 100, 3 * PIECE_VALUES, 100])
def test_of_a_picked_window_stay_its_weights_its_units_and_the_pieces_that_its_seed_names(values: int) -> None:
    window, total = whole_window(values), pieces_of(4 * values)
    assert window.closing is not None
    assert window.previous is not None
    pool = Pool.of(one_vector(values), seed=b"seed", hotkey=HOTKEY, version=3)
    assert pool.weights == select_pool(total, seed=b"seed", hotkey=HOTKEY, version=3)
    assert pool.moments == moments_beside(pool.weights, one_vector(values))
    picked = PickedWindow.of(window, pool)
    assert torch.equal(picked.weights, window.opening.weights.values)
    assert picked.units == window.units
    whole = {
        "weights": (window.opening.weights, pool.weights),
        "optimizer": (window.opening.moments, pool.moments),
        "next_weights": (window.closing.weights, pool.weights),
        "next_optimizer": (window.closing.moments, pool.moments),
        "previous_weights": (window.previous, pool.weights),
    }
    assert picked.parts.keys() == whole.keys()
    for part, (vector, numbers) in whole.items():
        pieces = picked.parts[part]  # type: ignore[index]
        count = vector.tree().count
        for index in range(count):
            if index not in numbers:
                with pytest.raises(NotNamedError, match=rf"^piece {index} is none of the {len(numbers)} that"):
                    pieces.piece(index)
                continue
            data, proof = pieces.piece(index), pieces.proof(index)
            assert torch.equal(data, vector.piece(index))
            assert proven(vector.tree().root, count=count, index=index, piece=data.numpy().data, proof=proof)
        for index in (-1, count):
            with pytest.raises(IndexError, match=f"piece {index} of {count}"):
                pieces.piece(index)
        held = pieces.data.untyped_storage().nbytes() + pieces.hashes.untyped_storage().nbytes()
        assert held <= len(numbers) * (PIECE_BYTES + 32 * 10), "what is not named is let go of"


def test_a_state_that_a_picked_window_shares_with_its_neighbours_is_counted_once_and_stays_theirs() -> None:
    archive = Archive()
    training = Training(archive.open(0))
    heads = [training.window(0) for _ in range(4)]
    held, every = training.held, picking(0, count=4)(heads)
    middle = {version: pool for version, pool in every.items() if version in (1, 2)}
    pending = held.windows[4]
    held.reach(1)
    held.seeded(0, lambda _: middle)
    assert held.picked.keys() == {1, 2}
    assert set(held.windows) == {4}
    assert archive.bytes == 2 * (THIN + 2 * UNIT) + STATE
    assert held.windows[4] is pending
    held.clear()
    assert archive.bytes == 0
    assert held.picked == {1: None, 2: None}


def test_a_full_ring_gives_up_the_oldest_that_is_not_picked_and_says_so_once_a_round() -> None:
    said: list[tuple[int, int]] = []
    limit = THIN + 3 * STATE + 4 * 2 * UNIT
    archive = Archive(limit=limit, given_up=lambda number, version: said.append((number, version)))
    training = Training(archive.open(0))
    heads = [training.window(0) for _ in range(3)]
    training.held.reach(1)
    training.held.seeded(0, picking(0))
    (chosen,) = select_windows(heads, seed=b"seed", hotkey=HOTKEY, slot=0, count=1)
    for _ in range(9):
        training.window(1)
        assert archive.bytes <= limit
        assert training.held.picked[chosen.version] is not None
        assert training.version in training.held.windows, "the open one"
    assert said == [(0, 3)]
    assert set(training.held.windows) == {10, 11, 12}
    training.held.end(training.now.weights)
    other = Training(archive.open(1))
    for _ in range(5):
        other.window(0)
    assert archive.bytes <= limit
    assert [number for number, _ in said] == [0, 1]


def test_what_was_given_up_can_still_be_picked_and_nothing_else_is_in_its_place() -> None:
    archive = Archive(limit=0)
    training = Training(archive.open(0))
    heads = [training.window(0) for _ in range(4)]
    training.held.end(training.now.weights)
    training.held.seeded(0, picking(0))
    assert training.held.picked == dict.fromkeys(picking(0)(heads))
    assert not training.held.windows


def test_rounds_that_are_over_leave_nothing() -> None:
    archive = Archive()
    sizes = []
    for number in range(5):
        training = Training(archive.open(number))
        for _ in range(4):
            training.window(0)
        training.held.end(training.now.weights)
        training.held.keep_cut(Cut(training.now.weights, Vector(torch.zeros(VALUES)), Vector(torch.zeros(VALUES))))
        training.held.seeded(0, picking(0))
        sizes.append(archive.bytes)
    assert archive.get(5 - ROUNDS_KEPT) is not None
    assert archive.get(4 - ROUNDS_KEPT) is None
    assert max(sizes) <= ROUNDS_KEPT * (THIN + 2 * UNIT + 12 * VALUES)
    for number in (6, 8):
        archive.open(number)
    assert archive.bytes == 0


# -- seeds from the chain ------------------------------------------------------------------------------------------


@dataclass
class Chain:
    """As much of a node as seeds take: blocks come one a second."""

    loaded: SimpleNamespace
    identity: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(hotkey=HOTKEY))

    async def seed(self, block: int, purpose: str) -> bytes:
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, block - now))
        return f"{purpose} {block}".encode()

    async def state(self, _block: int) -> ChainState:
        record = Record(run=RUN, round=0, phase=Phase.READY, flags=Flags.OBSERVER).encode()
        neuron = SimpleNamespace(
            hotkey=VALIDATOR, stake=2.0, validator_permit=True, record=record, record_block=1, shards=b""
        )
        return cast("ChainState", SimpleNamespace(neurons=(neuron,)))


def test_the_miner_keeps_what_every_validator_picks(tmp_path: Path) -> None:
    described = manifest(tiny(), tokens_file(tmp_path, count=2000), stages=2)
    rules = described.audit.model_copy(update={"slot": 5, "windows": 2, "seed_delay": 2})
    described = described.model_copy(update={"audit": rules})
    node = cast("Node", Chain(SimpleNamespace(manifest=described, run_id=RUN)))
    roster = replace(Roster.of([[HOTKEY], ["5Other"]]), block=100)
    slots = slots_of(described)
    assert slots == 3

    async def play() -> None:
        training, current, loop = Training(RoundArchive()), 0, asyncio.get_running_loop()
        heads: list[WindowHead] = []
        keeping = asyncio.create_task(keep_picked(node, roster, training.held, LAYOUT, SIZES, lambda: current))
        for slot in range(slots):
            heads += [training.window(slot) for _ in range(7)]
            await asyncio.sleep(100 + slot_end(slot, 5) + 1.5 - loop.time())
            assert len(training.held.windows) == 7 + 1, "before the seed all of its slot are here"
            current = slot + 1
            await asyncio.sleep(1)
            assert len(training.held.windows) == 1, "and then the open one"
            assert len(training.held.picked) == 2 * (slot + 1), "and what it picks"
        training.held.end(training.now.weights)
        await keeping
        assert training.held.audience is not None
        assert training.held.audience.shares == {VALIDATOR: 1.0}
        seeds = await slot_seeds(node, roster)
        chosen = {entry.version for entry, _ in pick_windows(heads, seeds=seeds, hotkey=HOTKEY, count=2)}
        assert training.held.picked.keys() == chosen
        assert None not in training.held.picked.values()
        assert len(chosen) == 2 * slots

    run(play())


# -- the limit -----------------------------------------------------------------------------------------------------


def test_a_ring_that_cannot_hold_what_is_picked_is_refused_by_its_option(tmp_path: Path) -> None:
    described = manifest(tiny(), tokens_file(tmp_path, count=2000), stages=2)
    plan = split(described.model.config(), 2)[0]
    least = least_ring(described, plan, LAYOUT)
    assert least > 2 * STATE + THIN

    def miner(ring: int) -> Miner:
        node = SimpleNamespace(
            loaded=SimpleNamespace(manifest=described, run_id=b"run", digest=bytes(32)),
            plans=[plan],
            layouts=[LAYOUT],
            config=SimpleNamespace(ring=ring, out=tmp_path, name="miner", evidence_disk=0),
        )
        return Miner(cast("Node", node), keeper=None)  # type: ignore[arg-type]

    miner(least)._require_ring(0)
    with pytest.raises(NodeError, match=r"^--ring \S+ is too small .* of stage 0, which takes \S+ at least: raise it$"):
        miner(least - 1)._require_ring(0)
    assert parse_size("ring", written(least)) >= least


async def test_training_goes_on_with_a_ring_that_is_full(tmp_path: Path) -> None:
    entry = tokens_file(tmp_path)
    described = manifest(tiny(boundary=BoundaryConfig(form=BoundaryForm.A, width=8)), entry, stages=2, wire="bfloat16")
    loaded = described.write(tmp_path / "manifest.toml")
    swarm = Swarm(loaded, open_corpus(tmp_path, described, entry))
    said: list[int] = []
    for member in swarm.members.values():
        member.archive = Archive(limit=1, given_up=lambda number, _version: said.append(number))
    async with swarm:
        await asyncio.wait_for(swarm.stage(0)[0].worker.drive(limit=20), 40)
        for hotkey, member in swarm.members.items():
            current, evidence = await member.worker.close()
            evidence.check(stage=swarm.roster.stage_of(hotkey) or 0, samples=range(4096))
            assert len(evidence.heads) == 5
            assert not current.archive.windows
    assert said == [0, 0]
