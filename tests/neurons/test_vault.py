"""Checkpoints survive what disks, stores and killed writers do to them: whole and proven, or the one before."""

import asyncio
import multiprocessing
import os
import resource
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from obstore.store import MemoryStore
from torch import Tensor

from model.checkpoint import (
    CheckpointContentError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointInfo,
    CheckpointMismatchError,
    content_digest,
    dumps,
    save,
)
from neurons.stores import (
    Bucket,
    Folder,
    Store,
    StoreContentError,
    StoreError,
    StoreFullError,
    StoreNameError,
    StoreTimeoutError,
    StoreUrlError,
    open_store,
)
from neurons.vault import Vault, replica_file, stage_file
from tests.neurons.s3 import FakeS3, serve_s3

RUN, OTHER = "ab" * 32, "cd" * 32
HOTKEY = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"


def state(seed: int, numbers: int = 300) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.a.weight": torch.randn(numbers, generator=generator),
        "outer.momentum": torch.randn(5, generator=generator).bfloat16(),
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return content_digest(found) == content_digest(wanted)


def files(folder: Path, pattern: str = "*") -> list[str]:
    return [path.name for path in folder.rglob(pattern) if path.is_file()]


@pytest.fixture
async def s3(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeS3]:
    fake = FakeS3()
    async with serve_s3(fake) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT", endpoint)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AWS_REGION", "auto")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield fake


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, s3: FakeS3) -> Store:
    """Every kind of store; `raw_put` writes to each behind the vault's back."""
    match request.param:
        case "folder":
            return Folder(tmp_path)
        case "memory":
            return Bucket(MemoryStore(), "memory://")
        case _:
            return open_store("s3://bucket/run", deadline=20)


async def raw_put(store: Store, name: str, data: bytes) -> None:
    if isinstance(store, Folder):
        path = store.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    else:
        assert isinstance(store, Bucket)
        await store._store.put_async(name, data)


def vault(store: Store, *, keep: int = 3, run: str = RUN) -> tuple[Vault, list[str]]:
    lines: list[str] = []
    return Vault(store, manifest_hash=run, keep=keep, report=lines.append), lines


async def test_states_come_back_and_old_ones_go(store: Store) -> None:
    held, lines = vault(store)
    for number in (1, 2, 3, 4, 5, 100_000):
        assert await held.put_stage(1, number, state(number), 7) == content_digest(state(number))
    assert await held.rounds(1) == (100_000, 5, 4)
    assert await held.rounds(0) == ()
    for at_most, wanted in ((None, 100_000), (99_999, 5), (4, 4)):
        found = await held.newest(1, at_most=at_most)
        assert found is not None
        assert found[0] == wanted
        assert same(found[1], state(wanted))
    assert await held.newest(1, at_most=3) is None
    assert same(await held.load_stage(1, 5), state(5))
    await held.put_replica(HOTKEY, 5, state(50))
    mine = await held.newest_replica(HOTKEY)
    assert mine is not None
    assert mine[0] == 5
    assert same(mine[1], state(50))
    assert not lines


async def test_the_newest_that_fails_gives_way_to_the_one_before(store: Store) -> None:
    held, lines = vault(store, keep=8)
    for number in range(1, 8):
        await held.put_stage(0, number, state(number), 0)
    whole = dumps(state(7), CheckpointInfo(manifest_hash=RUN, round=7, version=0), subject="checkpoints/stage-00")
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    foreign = dumps(state(4), CheckpointInfo(manifest_hash=OTHER, round=4, version=0), subject="checkpoints/stage-00")
    another = dumps(state(3), CheckpointInfo(manifest_hash=RUN, round=3, version=0), subject="checkpoints/stage-01")
    for number, data in ((7, bytes(flipped)), (6, whole[:-1]), (5, b""), (4, foreign), (3, another), (2, whole)):
        await raw_put(store, stage_file(0, number), data)
    found = await held.newest(0)
    assert found is not None
    assert found[0] == 1
    assert same(found[1], state(1))
    reasons = (
        "has content",
        "bytes of",
        "no whole header",
        "belongs to manifest",
        "of 'checkpoints/stage-01'",
        "of round 7",
    )
    assert len(lines) == len(reasons)
    for number, reason, line in zip(range(7, 1, -1), reasons, lines, strict=True):
        assert held.place(stage_file(0, number)) in line
        assert reason in line
    assert await held.rounds(0) == (7, 6, 5, 4, 3, 2, 1)
    assert await held.complete(1) == (1,)
    with pytest.raises(CheckpointCorruptError):
        await held.load_stage(0, 7)
    # What was refused is written anew, and believed again.
    await held.put_stage(0, 7, state(70), 0)
    assert await held.complete(1) == (7, 1)


async def test_a_reader_may_object(store: Store) -> None:
    held, lines = vault(store)
    for number in (1, 2):
        await held.put_stage(0, number, state(number), 0)

    def check(number: int, tensors: object) -> str | None:
        return "the chain says otherwise" if number == 2 else None

    found = await held.newest(0, check=check)
    assert found is not None
    assert found[0] == 1
    assert "round-00002.safetensors is sound but not the one wanted: the chain says otherwise" in lines[0]
    with pytest.raises(CheckpointMismatchError, match="chain says"):
        await held.load_stage(0, 2, check=check)


async def test_pruning_spares_sound_common_and_foreign_files(store: Store) -> None:
    held, _ = vault(store, keep=2)
    other, _ = vault(store, keep=2, run=OTHER)
    for number in (1, 2):
        await other.put_stage(0, number, state(number), 0)
    await raw_put(store, stage_file(0, 3), b"of whom?")
    await held.put_stage(1, 5, state(5), 0)  # stage 1 stops here
    for number in range(4, 10):
        await held.put_stage(0, number, state(number), 0)
    # 5 is the newest that both stages have; 1 and 2 are the other run's, 3 is nobody's.
    assert await held.rounds(0) == (9, 8, 5, 3, 2, 1)
    assert await held.complete(2) == (5,)
    # Two unsound files must not push out the last sound one.
    for number in (8, 9):
        info = CheckpointInfo(manifest_hash=RUN, round=number, version=0)
        flipped = bytearray(dumps(state(9), info, subject="checkpoints/stage-00"))
        flipped[-9] ^= 1
        await raw_put(store, stage_file(0, number), bytes(flipped))
    found = await held.newest(0)
    assert found is not None
    assert found[0] == 5
    await held.put_stage(0, 10, state(10), 0)
    assert await held.complete(1) == (10, 5)
    await held.put_stage(0, 11, state(11), 0)
    assert await held.rounds(0) == (11, 10, 5, 3, 2, 1)


async def test_going_back_leaves_younger_files_alone(store: Store) -> None:
    held, _ = vault(store, keep=1)
    await held.put_stage(0, 9, state(9), 0)
    for number in (4, 5):
        await held.put_stage(0, number, state(number), 0)
    assert await held.rounds(0) == (9, 5)


async def test_another_runs_file_is_not_overwritten(store: Store) -> None:
    theirs, _ = vault(store, run=OTHER)
    await theirs.put_stage(0, 1, state(1), 0)
    held, _ = vault(store)
    with pytest.raises(CheckpointMismatchError, match="belongs to manifest cdcdcdcdcdcdcdcd…"):
        await held.put_stage(0, 1, state(2), 0)
    assert same(await theirs.load_stage(0, 1), state(1))


async def test_replicas_of_a_stage_write_the_same_file_at_once(store: Store) -> None:
    vaults = [vault(store, keep=2)[0] for _ in range(3)]
    for number in range(1, 6):
        digests = await asyncio.gather(*(held.put_stage(0, number, state(number), 1) for held in vaults))
        assert set(digests) == {content_digest(state(number))}
    assert await vaults[0].rounds(0) == (5, 4)
    assert await vaults[0].complete(1) == (5, 4)


async def test_a_reader_never_sees_half(store: Store) -> None:
    held, _ = vault(store)
    states = [state(seed, 1_000_000) for seed in (1, 2)]
    wanted = {content_digest(tensors) for tensors in states}
    await held.put_stage(0, 1, states[0], 0)

    async def rewrite() -> None:
        for turn in range(10):
            await held.put_stage(0, 1, states[turn % 2], 0)

    writing = asyncio.create_task(rewrite())
    seen = set()
    while not writing.done():
        seen.add(content_digest(await held.load_stage(0, 1)))
    await writing
    assert seen <= wanted


async def test_tensors_that_change_under_the_pen_are_not_written(tmp_path: Path, s3: FakeS3) -> None:
    class Restless(Folder):
        async def put(self, name: str, encoded: object) -> None:
            tensors["layers.0.a.weight"][0] += 1
            await super().put(name, encoded)  # type: ignore[arg-type]

    tensors = state(1)
    held, _ = vault(Restless(tmp_path))
    with pytest.raises(CheckpointContentError, match="hand in a copy"):
        await held.put_stage(0, 1, tensors, 0)
    assert files(tmp_path) == []

    held, _ = vault(open_store("s3://bucket/run", deadline=20))
    tensors = state(1, 20_000_000)

    async def change() -> None:
        await s3.started.wait()
        tensors["layers.0.a.weight"][-1] += 1

    changing = asyncio.create_task(change())
    with pytest.raises(CheckpointContentError, match="hand in a copy"):
        await held.put_stage(0, 1, tensors, 0)
    await changing
    assert s3.objects == {}
    assert s3.uploads == {}


async def test_an_upload_in_parts_is_whole_or_absent(s3: FakeS3) -> None:
    held, _ = vault(open_store("s3://bucket/run", deadline=20))
    large = state(1, 5_000_000)
    await held.put_stage(0, 1, large, 0)
    assert sum("partNumber" in request for request in s3.requests) == 3
    found = await held.newest(0)
    assert found is not None
    assert same(found[1], large)
    before = dict(s3.objects)
    s3.fail_part = 2
    for number in (1, 2):
        with pytest.raises(StoreError, match=rf"round-0000{number}\.safetensors: .*403 Forbidden.*: check the store"):
            await held.put_stage(0, number, state(2, 5_000_000), 0)
    assert s3.objects == before
    assert s3.uploads == {}, "a failed upload is aborted"


async def test_a_store_that_lies_hangs_or_breaks_off_is_named(s3: FakeS3) -> None:
    held, lines = vault(open_store("s3://bucket/run", deadline=1))
    await held.put_stage(0, 1, state(1), 0)
    s3.drop_puts = True
    with pytest.raises(StoreContentError, match="just put: does another replica"):
        await held.put_stage(0, 1, state(2), 0)
    with pytest.raises(StoreContentError, match=r"round-00002\.safetensors is not what was just put there"):
        await held.put_stage(0, 2, state(2), 0)
    s3.drop_puts = False
    s3.truncate = 100
    with pytest.raises(StoreError, match=r"round-00001\.safetensors: "):
        await held.newest(0)
    s3.truncate = None
    before = dict(s3.objects)
    s3.hang = True
    for call in (held.newest(0), held.put_stage(0, 2, state(2), 0), held.complete(1)):
        with pytest.raises(StoreTimeoutError, match="no answer within 1 s"):
            await call
    s3.hang = False
    assert s3.objects == before
    assert same(await held.load_stage(0, 1), state(1))
    assert not lines


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """`folder` on a disk of 1 MiB; without the right to mount one, files of at most 256 KiB."""
    folder.mkdir(exist_ok=True)
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "orion-test", str(folder)]
    if mount and os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)  # noqa: S607
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_harms_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk"):
        held, _ = vault(Folder(tmp_path / "disk"))
        await held.put_stage(0, 1, state(1), 0)
        for number in (1, 2):
            with pytest.raises(StoreFullError, match=rf"round-0000{number}.*the disk is full .*: make room"):
                await held.put_stage(0, number, state(2, 500_000), 0)
        assert files(tmp_path / "disk") == ["round-00001.safetensors"]
        assert same(await held.load_stage(0, 1), state(1))
        await held.put_stage(0, 2, state(3), 0)
        assert await held.complete(1) == (2, 1)


async def test_a_full_disk_by_limit_of_file_size(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, hard))
    try:
        with pytest.raises(StoreFullError, match="make room"):
            await vault(Folder(tmp_path))[0].put_stage(0, 1, state(2, 500_000), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == []


def write_on(folder: str, ready: object, first: int) -> None:
    """A writer's process: one round after the other until it is killed."""

    async def play() -> None:
        held = await Vault.open(folder, manifest_hash=RUN)
        for number in range(first, first + 1000):
            await held.put_stage(0, number, state(number, 200_000), number)
            ready.set()  # type: ignore[attr-defined]

    torch.set_num_threads(1)
    asyncio.run(play())


@pytest.mark.timeout(120)
async def test_writers_killed_at_any_moment_leave_a_sound_newest(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.neurons.test_vault"])
    generator = torch.Generator().manual_seed(4)
    newest, left = 0, 0
    for _ in range(20):
        ready = context.Event()
        writer = context.Process(target=write_on, args=(str(tmp_path), ready, newest + 1))
        writer.start()
        await asyncio.to_thread(ready.wait, 30)
        time.sleep(0.02 * float(torch.rand((), generator=generator)))  # noqa: ASYNC251 (the moment of the kill)
        writer.kill()
        await asyncio.to_thread(writer.join)
        left += len(files(tmp_path, ".*"))
        lines: list[str] = []
        held = await Vault.open(str(tmp_path), manifest_hash=RUN, report=lines.append)
        found = await held.newest(0)
        assert found is not None
        assert found[0] > newest
        newest = found[0]
        assert same(found[1], state(newest, 200_000))
        assert lines == []
        assert files(tmp_path, ".*") == []
        assert len(await held.rounds(0)) <= 4
    assert left, "no writer was killed while it wrote: make the state larger"


async def test_a_living_writers_temporary_stays(tmp_path: Path) -> None:
    class Slow(Folder):
        async def put(self, name: str, encoded: object) -> None:
            path = self.root / name
            path.parent.mkdir(parents=True)
            from model.checkpoint import _temporary

            descriptor, temporary = _temporary(path)
            await Vault.open(str(tmp_path), manifest_hash=RUN)
            assert temporary.exists()
            os.close(descriptor)
            await Vault.open(str(tmp_path), manifest_hash=RUN)
            assert not temporary.exists()
            await super().put(name, encoded)  # type: ignore[arg-type]

    await vault(Slow(tmp_path))[0].put_stage(0, 1, state(1), 0)


async def test_what_cannot_be_opened_or_named_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for address in ("r2://bucket", "https://example.org/files", "az://container/run", "s3://"):
        with pytest.raises(StoreUrlError, match=address):
            open_store(address)
    for address in ("s3://bucket/run", "gs://bucket", "https://abc.r2.cloudflarestorage.com/bucket"):
        assert open_store(address).place(stage_file(3, 12)) == (
            f"{address}/checkpoints/stage-03/round-00012.safetensors"
        )
    assert open_store(f"file://{tmp_path}/a%20b").place("x") == f"{tmp_path}/a b/x"
    held, _ = vault(Folder(tmp_path))
    for hotkey in ("", "../../etc", "a/b", "0OIl"):
        with pytest.raises(StoreNameError, match="no hotkey's address"):
            await held.put_replica(hotkey, 1, state(1))
    assert replica_file(HOTKEY, 1) == f"replicas/{HOTKEY}/round-00001.safetensors"
    with pytest.raises(ValueError, match="keep is 0"):
        Vault(Folder(tmp_path), manifest_hash=RUN, keep=0)
    await asyncio.to_thread(save, tmp_path / "file", state(1), CheckpointInfo(manifest_hash=RUN, round=0, version=0))
    with pytest.raises((StoreError, CheckpointError), match="file"):
        await vault(Folder(tmp_path / "file"))[0].put_stage(0, 1, state(1), 0)


async def test_the_loop_runs_on_while_files_are_written(tmp_path: Path) -> None:
    held, _ = vault(Folder(tmp_path))
    writing = asyncio.create_task(held.put_stage(0, 1, state(1, 10_000_000), 0))
    turns = 0
    while not writing.done():
        await asyncio.sleep(0.001)
        turns += 1
    await writing
    assert turns > 10
