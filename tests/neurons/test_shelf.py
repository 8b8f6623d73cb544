"""What a miner puts on disk of what seeds picked: it comes back as it was, within a bound, and goes with its round."""

from __future__ import annotations

import asyncio
import errno
import math
import re
import threading
from pathlib import Path

import psutil
import pytest
import torch

import model.checkpoint
from model.checkpoint import Encoded
from neurons.archive import Archive
from neurons.kept import Cut, PickedWindow, Vector
from neurons.shelf import Shelf
from subnet.trust.audit import UnitTensors
from subnet.trust.ledger import Direction, UnitKey
from subnet.trust.pool import Pool
from subnet.trust.quota import ROUNDS_KEPT
from subnet.trust.tree import PIECE_VALUES
from tests.neurons.swarm import one_vector
from tests.neurons.test_archive import HOTKEY, STATE, UNIT, VALUES, Training, picking, whole_window

RUN = "00" * 32
Lost = list[tuple[int, int | None, str]]


def shelf(folder: Path, *, limit: int = 1 << 30, manifest_hash: str = RUN) -> Shelf:
    return Shelf(folder, "miner", manifest_hash=manifest_hash, limit=limit)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def play(archive: Archive, number: int, *, windows: int = 4) -> Training:
    """A round with error feedback, of whose windows the seed picks one."""
    training = Training(archive.open(number))
    for _ in range(windows):
        training.window(0)
    training.held.end(training.now.weights)
    training.held.keep_cut(Cut(training.now.weights, Vector(torch.zeros(VALUES)), Vector(torch.ones(VALUES))))
    training.held.seeded(0, picking(0))
    archive.cut_is_whole(number)
    return training


def only(training: Training) -> PickedWindow:
    (window,) = training.held.picked.values()
    assert window is not None
    return window


async def test_a_window_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    values = 70 * PIECE_VALUES + 100
    whole = whole_window(values)
    x, g, y = torch.randn(500, 999).bfloat16(), torch.randn(2, 3).bfloat16(), torch.randint(0, 9, (2, 3))
    whole.units = {
        UnitKey(7, Direction.FORWARD): UnitTensors(x, None, y),
        UnitKey(7, Direction.BACKWARD): UnitTensors(x, g, None),
    }
    pool = Pool.of(one_vector(values), seed=b"seed", hotkey=HOTKEY, version=3)
    before = PickedWindow.of(whole, pool)
    place = shelf(tmp_path)
    after = await place.put_window(5, 3, before)
    assert torch.equal(after.weights, before.weights)
    assert after.parts.keys() == before.parts.keys()
    for part, pieces in before.parts.items():
        for index in pool.moments if part.endswith("optimizer") else pool.weights:
            assert torch.equal(after.parts[part].piece(index), pieces.piece(index))
            assert after.parts[part].proof(index) == pieces.proof(index)
    assert after.units.keys() == before.units.keys()
    for key, unit in before.units.items():
        for name in ("input", "gradient", "output"):
            old, new = getattr(unit, name), getattr(after.units[key], name)
            assert (old is None and new is None) or (old.dtype == new.dtype and torch.equal(old, new))
    assert not list(after.tensors()), "the system may take its memory back"
    (path,) = files(tmp_path)
    assert str(path) in {entry.path for entry in psutil.Process().memory_maps()}, "it is not read"
    assert path.name == "round-00005-window-00000003.safetensors"
    held = {id(tensor): tensor.nbytes for tensor in before.tensors()}
    assert place.bytes == path.stat().st_size < sum(held.values()) + x.nbytes // 2, "x is written once"


async def test_what_is_picked_and_cut_leaves_host_memory_and_is_written_off_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, threads = model.checkpoint.write, set[int]()

    def noted(path: Path, encoded: Encoded) -> None:
        threads.add(threading.get_ident())
        write(path, encoded)

    monkeypatch.setattr(model.checkpoint, "write", noted)
    archive = Archive(shelf=shelf(tmp_path))
    for number in range(5):
        training = play(archive, number)
        assert archive.bytes > 0
        assert not only(training).mapped, "it is served from memory until it is written"
        await archive.settle()
        assert archive.bytes == 0
        assert only(training).mapped
        assert training.held.cut.mapped
        cut = training.held.part(0, "still_owed")
        assert cut is not None
        assert torch.equal(cut.piece(0).view(torch.float32), torch.ones(1, VALUES))
        assert cut.proof(0) == ()
        assert archive.bytes_on_disk == on_disk(tmp_path)
        rounds = {path.name[:11] for path in files(tmp_path)}
        assert rounds == {f"round-{kept:05d}" for kept in range(max(0, number + 1 - ROUNDS_KEPT), number + 1)}
        assert len(files(tmp_path)) == 2 * len(rounds)
    assert threads
    assert threading.get_ident() not in threads
    await archive.close()
    assert not files(tmp_path)
    assert archive.bytes == archive.bytes_on_disk == 0
    assert archive.get(4) is None


async def test_picked_windows_of_a_long_round_take_no_room_in_the_ring(tmp_path: Path) -> None:
    given_up: list[tuple[int, int]] = []
    limit = 6 * STATE + 5 * 2 * UNIT
    archive = Archive(
        limit=limit, shelf=shelf(tmp_path), given_up=lambda number, version: given_up.append((number, version))
    )
    training = Training(archive.open(0))
    for slot in range(20):
        for _ in range(3):
            training.window(slot)
            assert archive.bytes <= limit
        training.held.reach(slot + 1)
        training.held.seeded(slot, picking(slot, count=3))
        await archive.settle()
        assert archive.bytes == STATE, "the open one"
    assert len(training.held.picked) == 60
    assert all(window is not None and window.mapped for window in training.held.picked.values())
    assert not given_up


async def test_a_round_that_is_forgotten_while_it_is_written_leaves_nothing(tmp_path: Path) -> None:
    archive = Archive(shelf=shelf(tmp_path))
    held = play(archive, 0).held
    archive.open(ROUNDS_KEPT)
    await archive.settle()
    assert not files(tmp_path)
    assert set(held.picked.values()) == {None}

    play(archive, ROUNDS_KEPT)
    await asyncio.sleep(0)  # the first write has begun
    archive.open(2 * ROUNDS_KEPT)
    await archive.settle()
    assert not files(tmp_path)
    assert archive.bytes == archive.bytes_on_disk == 0


@pytest.fixture
def lost() -> Lost:
    return []


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that the disk has no room for."""
    write, names = model.checkpoint.write, list[str]()

    def refuse(path: Path, encoded: Encoded) -> None:
        if any(name in path.name for name in names):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, encoded)

    monkeypatch.setattr(model.checkpoint, "write", refuse)
    return names


async def test_a_window_that_the_bound_leaves_no_room_for_is_given_up_and_nothing_else(
    tmp_path: Path, lost: Lost
) -> None:
    measured = Archive(shelf=shelf(tmp_path / "measured"))
    play(measured, 0)
    await measured.settle()
    (size,) = (path.stat().st_size for path in files(tmp_path / "measured") if "window" in path.name)
    archive = Archive(shelf=shelf(tmp_path / "bound", limit=2 * size + 1), lost=lambda *what: lost.append(what))
    training = Training(archive.open(0))
    for _ in range(3):
        training.window(0)
    training.held.reach(1)
    training.held.seeded(0, picking(0, count=3))
    await archive.settle()
    assert not lost
    assert training.held.unit(UnitKey(2, Direction.FORWARD)) is not None, "in memory, while there is room"
    archive._limit = archive.bytes - 1
    training.window(1)
    assert archive.bytes <= archive._limit
    assert [training.held.picked[version] is not None for version in range(3)] == [True, True, False]
    assert archive.bytes_on_disk == on_disk(tmp_path / "bound") <= 2 * size + 1
    ((number, version, reason),) = lost
    assert (number, version) == (0, 2)
    said = rf"{size} bytes beside {2 * size} are more than --evidence-disk \S+ takes: raise it"
    assert re.fullmatch(said, reason), reason
    assert training.held.unit(UnitKey(2, Direction.FORWARD)) is None
    assert training.held.unit(UnitKey(1, Direction.FORWARD)) is not None


async def test_what_a_full_disk_does_not_take_stays_in_memory_until_it_does(
    tmp_path: Path, lost: Lost, full: list[str]
) -> None:
    archive = Archive(shelf=shelf(tmp_path), lost=lambda *what: lost.append(what))
    full.append("round-00000")
    first = play(archive, 0)
    await archive.settle()
    assert not only(first).mapped
    assert first.held.part(0, "closing") is not None
    assert not files(tmp_path)
    full.clear()
    second = play(archive, 1)
    await archive.settle()
    assert only(first).mapped
    assert only(second).mapped
    assert not lost
    archive.open(ROUNDS_KEPT)
    await archive.close()
    assert not files(tmp_path)
    assert archive.bytes == 0


async def test_a_disk_that_is_full_costs_what_there_is_no_room_for_and_is_named(
    tmp_path: Path, lost: Lost, full: list[str]
) -> None:
    archive = Archive(shelf=shelf(tmp_path), lost=lambda *what: lost.append(what))
    full.append("round-0000")
    first = play(archive, 0)
    await archive.settle()
    (version,) = first.held.picked
    assert first.held.picked[version] is not None
    archive._limit = archive.bytes + STATE // 2
    Training(archive.open(1)).window(0)
    assert first.held.picked == {version: None}
    assert archive.bytes <= archive._limit
    ((number, what, reason),) = lost
    assert (number, what) == (0, version)
    assert "cannot be written, the disk is full" in reason
    assert reason.endswith("make room")
    assert "\n" not in reason
    assert not files(tmp_path)


async def test_what_neither_disk_nor_memory_has_room_for_is_lost_the_cut_too(
    tmp_path: Path, lost: Lost, full: list[str]
) -> None:
    archive = Archive(shelf=shelf(tmp_path), lost=lambda *what: lost.append(what))
    full.append("round-00000")
    first = play(archive, 0)
    archive._limit = 0
    await archive.settle()
    (version,) = first.held.picked
    assert first.held.picked == {version: None}
    assert first.held.part(0, "closing") is None
    assert [(number, what) for number, what, _ in lost] == [(0, version), (0, None)]
    for _, _, reason in lost:
        assert "cannot be written, the disk is full" in reason
        assert reason.endswith("make room")
        assert "\n" not in reason
    assert not files(tmp_path)
    assert archive.bytes == 0
    archive._limit = math.inf
    second = play(archive, 1)
    await archive.settle()
    assert only(second).mapped
    assert len(lost) == 2


async def test_of_an_earlier_life_the_round_that_is_answered_for_comes_back_and_the_rest_goes(tmp_path: Path) -> None:
    archive = Archive(shelf=shelf(tmp_path))
    rounds = [play(archive, number) for number in (6, 7)]
    await archive.settle()
    (version,) = rounds[1].held.picked
    folder = files(tmp_path)[0].parent
    (folder / ".round-00007-cut.safetensors.killed").write_bytes(b"half")
    again = Archive(shelf=shelf(tmp_path))
    await again.recall(7)
    held = again.open(7)
    assert held.picked.keys() == {version}
    assert torch.equal(held.picked[version].weights, only(rounds[1]).weights)  # type: ignore[union-attr]
    assert held.unit(UnitKey(version, Direction.FORWARD)) is not None
    assert held.part(0, "closing") is not None
    assert {path.name[:11] for path in files(tmp_path)} == {"round-00007"}
    assert again.bytes == 0
    assert again.bytes_on_disk == on_disk(tmp_path)
    nobody = Archive(shelf=shelf(tmp_path))
    await nobody.recall(None)
    assert not files(tmp_path)


async def test_a_file_that_is_not_whole_or_another_runs_is_no_evidence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = Archive(shelf=shelf(tmp_path))
    training = Training(archive.open(0))
    for _ in range(2):
        training.window(0)
    training.held.reach(1)
    training.held.seeded(0, picking(0, count=2))
    await archive.settle()
    first, _ = files(tmp_path)
    first.write_bytes(first.read_bytes()[:-1])
    again = Archive(shelf=shelf(tmp_path))
    await again.recall(0)
    assert list(again.open(0).picked) == [1]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"evidence is lost: checkpoint {first} has ")
    other = Archive(shelf=shelf(tmp_path, manifest_hash="11" * 32))
    await other.recall(0)
    assert not other.open(0).picked
