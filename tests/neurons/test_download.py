"""Downloads over real axons: many sources, liars, the dead and the frozen; what is on disk is not fetched again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from neurons import download as downloads
from neurons.download import Download, DownloadError, download, forget
from neurons.library import Library
from subnet.identity import Identity
from subnet.messages import StatePieceRequest, StateTreeRequest, Tensors, piece_specs
from subnet.swarm import content
from subnet.swarm.content import LEAF_BYTES
from subnet.swarm.merge import Merged
from subnet.swarm.public import Part, digest_of, pieces_of
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon, Reply
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import Dropped, MalformedRequest, Unavailable, UnknownRun
from subnet.transport.shaping import Link, Shaper

RUN = b"run-0001"
PIECE = 16 * 1024
COUNT = 20 * PIECE // 4 + 3  # 20 pieces and a bit
HELD = 3


def state(*, seed: int = 1, momentum: int = COUNT) -> Merged:
    generator = torch.Generator().manual_seed(seed)
    return Merged(torch.randn(COUNT, generator=generator), torch.randn(momentum, generator=generator))


def volume(counts: Mapping[Part, int]) -> int:
    """Bytes of both parts and of their leaf hashes."""
    return sum(4 * count + LEAF_BYTES * pieces_of(count) for count in counts.values())


class Source:
    """A replica: an axon and a library, and what it is made to do wrong."""

    def __init__(self, name: str) -> None:
        self.hotkey = Identity.from_uri(f"//{name}").hotkey
        self.axon = Axon(Admission(self.hotkey, allow=lambda _hotkey, _route: None, now_ns=time.time_ns))
        self.library = Library(RUN)
        self.asked: list[StatePieceRequest] = []
        self.sought = asyncio.Event()
        """Set once somebody asked for the leaf hashes."""
        self.lies = False
        self.lies_about_leaves = False
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.axon.serve(StateTreeRequest, self.tree, specs={})
        self.axon.serve(StatePieceRequest, self.piece, specs={})

    async def tree(self, caller: str, request: StateTreeRequest, tensors: Mapping[str, torch.Tensor]) -> Reply:
        self.sought.set()
        fields, served = await self.library.tree(caller, request, tensors)
        if self.lies_about_leaves:
            served["theta"][0, 0] ^= 1
        return fields, served

    async def piece(self, caller: str, request: StatePieceRequest, tensors: Mapping[str, torch.Tensor]) -> Reply:
        self.asked.append(request)
        await self.thawed.wait()
        fields, served = await self.library.piece(caller, request, tensors)
        if self.lies:
            data = served["data"].clone()
            data[-1] ^= 1
            return fields, {"data": data}
        return fields, served


class Stage:
    """Three replicas that hold a public state, and a joiner that holds nothing."""

    def __init__(self) -> None:
        self.sources = [Source(name) for name in ("one", "two", "three")]
        self.endpoints: dict[str, str] = {}
        self.dendrite = Dendrite(Identity.from_uri("//joiner"), now_ns=time.time_ns)
        self.state = state()

    async def hold(self, public: Merged, *, held: int = HELD) -> None:
        self.state = public
        for source in self.sources:
            await source.library.put(held, public)

    async def download(self, **changes: object) -> Download:
        arguments: dict[str, object] = {
            "sources": [source.hotkey for source in self.sources],
            "run": RUN,
            "held": HELD,
            "agreed": digest_of(self.state),
            "counts": {"theta": COUNT, "momentum": self.state.momentum.numel()},
        }
        return await download(self.dendrite, self.endpoints.get, **(arguments | changes))  # type: ignore[arg-type]

    def assert_whole(self, found: Download) -> None:
        assert torch.equal(found.state.theta, self.state.theta)
        assert torch.equal(found.state.momentum, self.state.momentum)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(downloads, "PATIENCE", 0.5)
    monkeypatch.setattr(downloads, "PAUSE", 0.05)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    async with AsyncExitStack() as stack:
        for source in stage.sources:
            await source.axon.start()
            stack.push_async_callback(source.axon.stop)
            stage.endpoints[source.hotkey] = source.axon.endpoint
        await stack.enter_async_context(stage.dendrite)
        await stage.hold(stage.state)
        yield stage
        for source in stage.sources:
            source.thawed.set()


def when(count: int, act: Callable[[], object]) -> Callable[[int, int], None]:
    """A progress callback that acts once, at the given number of pieces."""

    def progress(done: int, _total: int) -> None:
        if done == count:
            act()

    return progress


async def test_all_sources_serve_and_no_byte_comes_twice(stage: Stage) -> None:
    seen: list[tuple[int, int]] = []
    found = await stage.download(progress=lambda done, total: seen.append((done, total)))

    stage.assert_whole(found)
    assert set(found.sources) == {source.hotkey for source in stage.sources}
    assert found.dropped == {}
    assert found.received == volume({"theta": COUNT, "momentum": COUNT})
    assert seen == [(done, 42) for done in range(43)]
    asked = [(request.part, request.piece) for source in stage.sources for request in source.asked]
    assert len(asked) == len(set(asked)) == 42


async def test_a_piece_is_no_larger_than_a_piece() -> None:
    """Not even for the whole of a part: what is under way is bounded by the streams, not by the state."""
    assert piece_specs(COUNT, 0)["data"].nbytes == PIECE
    assert piece_specs(COUNT, 20)["data"].nbytes == 12


async def test_an_empty_momentum(stage: Stage) -> None:
    await stage.hold(state(momentum=0), held=HELD + 1)
    stage.assert_whole(await stage.download(held=HELD + 1))


@pytest.mark.parametrize("about", ["lies", "lies_about_leaves"])
async def test_a_liar_is_dropped_and_named(stage: Stage, about: str, caplog: pytest.LogCaptureFixture) -> None:
    liar = stage.sources[0]
    setattr(liar, about, True)
    found = await stage.download()

    stage.assert_whole(found)
    assert found.dropped.keys() == {liar.hotkey}
    assert "than the chain says" in found.dropped[liar.hotkey]
    assert any(liar.hotkey in record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert len(liar.asked) <= downloads.STREAMS


async def test_a_source_that_dies_leaves_its_pieces_to_the_others(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "HEDGE_FLOOR", 1e6)  # its end must be noticed, not hedged
    dying = stage.sources[0]
    deaths: list[asyncio.Task[None]] = []

    def progress(done: int, _total: int) -> None:
        if done == 12:
            dying.thawed.clear()
        if done == 30:
            deaths.append(asyncio.create_task(dying.axon.stop()))

    found = await stage.download(progress=progress)
    stage.assert_whole(found)
    assert dying.hotkey in found.sources
    assert found.received == volume({"theta": COUNT, "momentum": COUNT})
    repeated = [(request.part, request.piece) for source in stage.sources for request in source.asked]
    assert len(repeated) - len(set(repeated)) == downloads.STREAMS  # what it took with it
    await asyncio.gather(*deaths)


async def test_a_slow_and_lossy_link_changes_nothing_but_the_time(stage: Stage) -> None:
    link = Link(latency_s=0.005, up_bps=50e6, down_bps=50e6, loss=0.02)
    shaper = Shaper(link, np.random.default_rng(3))
    async with Dendrite(Identity.from_uri("//far"), now_ns=time.time_ns, shaper=shaper) as stage.dendrite:
        start = asyncio.get_running_loop().time()
        found = await stage.download()
        seconds = asyncio.get_running_loop().time() - start
    stage.assert_whole(found)
    assert found.dropped == {}
    assert seconds > 0.9 * found.received * 8 / link.down_bps


async def test_a_frozen_source_does_not_decide_when_the_rest_is_here(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "HEDGE_FLOOR", 0.2)
    monkeypatch.setattr(downloads, "DEADLINE", 1e6)
    frozen = stage.sources[0]
    frozen.thawed.clear()
    found = await stage.download()

    stage.assert_whole(found)
    assert frozen.hotkey not in found.sources
    assert len(frozen.asked) == downloads.STREAMS
    assert found.received == volume({"theta": COUNT, "momentum": COUNT})


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def tear(folder: Path) -> None:
    """Alter a byte of a piece that is there, and leave the file of another download."""
    (theta,) = folder.glob("*-theta.partial")
    raw = bytearray(theta.read_bytes())
    raw[0] ^= 1
    theta.write_bytes(raw)
    (folder / f"{'0' * 64}-theta.partial").write_bytes(b"of another state")


async def test_a_download_goes_on_with_what_is_on_disk(stage: Stage, tmp_path: Path) -> None:
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(asyncio.CancelledError):
        await stage.download(folder=tmp_path, progress=when(21, task.cancel))
    task.uncancel()
    for source in stage.sources:
        source.asked.clear()

    tear(tmp_path)
    begun: list[int] = []
    found = await stage.download(folder=tmp_path, progress=lambda done, _total: begun.append(done))
    stage.assert_whole(found)
    assert begun[0] >= 20
    asked = [(request.part, request.piece) for source in stage.sources for request in source.asked]
    assert len(asked) == 42 - begun[0]
    assert ("theta", 0) in asked
    assert len(names(tmp_path)) == 2

    for source in stage.sources:
        source.asked.clear()
    stage.assert_whole(await stage.download(folder=tmp_path))  # all of it is there now
    assert not any(source.asked for source in stage.sources)
    forget(tmp_path)
    assert names(tmp_path) == []


async def test_a_folder_that_cannot_be_written_is_named(stage: Stage, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("mine")
    with pytest.raises(DownloadError, match="another folder") as caught:
        await stage.download(folder=taken)
    assert str(taken) in str(caught.value)
    assert taken.read_text() == "mine"


async def test_a_state_that_nobody_has_as_committed_is_refused(stage: Stage) -> None:
    with pytest.raises(DownloadError) as caught:
        await stage.download(agreed=bytes(32))
    message = str(caught.value)
    assert "\n" not in message
    assert "leaf hashes" in message
    assert all(source.hotkey in message for source in stage.sources)

    with pytest.raises(DownloadError, match="leaf hashes"):  # a momentum where the codec has none
        await stage.download(counts={"theta": COUNT, "momentum": 0})


async def test_no_source_left_is_said_with_what_is_missing(stage: Stage) -> None:
    for source in stage.sources:
        source.lies = True
    with pytest.raises(DownloadError, match="42 pieces"):
        await stage.download()
    with pytest.raises(DownloadError, match="0 sources"):
        await stage.download(sources=[])
    stage.endpoints.clear()
    with pytest.raises(DownloadError, match="serves no axon"):
        await stage.download()


async def test_a_state_that_is_about_to_be_there_is_waited_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PATIENCE", 30.0)
    following = state(seed=5)
    waiting = asyncio.create_task(stage.download(held=HELD + 1, agreed=digest_of(following)))
    await stage.sources[0].sought.wait()
    assert not waiting.done()
    await stage.hold(following, held=HELD + 1)
    stage.assert_whole(await waiting)


async def test_a_library_lends_the_last_states_of_its_run() -> None:
    library = Library(RUN)
    states = [state(seed=seed) for seed in range(3)]
    digests = [await library.put(held, public) for held, public in enumerate(states)]
    assert digests == [digest_of(public) for public in states]
    library.clear()
    assert await library.put(1, states[1]) == digests[1]
    assert await library.put(2, states[2]) == digests[2]

    def request(**changes: object) -> StatePieceRequest:
        fields = {"run": RUN.hex(), "round": 2, "part": "theta", "piece": 0}
        return StatePieceRequest.model_validate(fields | changes)

    fields, tensors = await library.piece("", request(piece=20), {})
    assert isinstance(fields, Tensors)
    assert tensors["data"].numel() == 12
    for error, changes in (
        (Dropped, {"round": 0}),
        (Unavailable, {"round": 3}),
        (UnknownRun, {"run": "0" * 16}),
        (MalformedRequest, {"piece": 21}),
    ):
        with pytest.raises(error):
            await library.piece("", request(**changes), {})
