"""Fetching a stage's public state from whoever has it: in pieces, from many at once, each proven on arrival.

The digest on chain fixes the leaf hashes, and these fix every piece, so no source is trusted: one that serves
something else is dropped and named. A source that fails rests a while and its piece goes to another; one that has
failed for `PATIENCE` seconds is dropped. Towards the end, when nothing is left to begin, a piece that is long under way
is asked of a second source too, so that the slowest does not decide when the state is here. With a folder, pieces are
also written to disk, and a download that was killed goes on with what is there and still hashes to its leaf.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from subnet.messages import StatePieceRequest, StateTreeRequest, Tensors, piece_specs, tree_specs
from subnet.swarm import content
from subnet.swarm.merge import Merged
from subnet.swarm.public import PARTS, Part, PublicTree, pieces_of, span_of
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import Busy, Refused, TransportError, Unavailable, Unreachable
from subnet.transport.synapse import tensor_bytes

log = logging.getLogger("orion.neurons.download")

STREAMS = 2
"""Pieces asked of one source at a time: the next one is under way while one arrives, and pushes find a stream free."""
DEADLINE = 40.0
"""Seconds a piece may take: what an axon needs at its minimum rate, 1 Mbit/s."""
PATIENCE = 15.0
PAUSE = 0.2
LONGEST_PAUSE = 2.0
HEDGE_FLOOR = 2.0
HEDGE_FACTOR = 3.0
"""A piece is asked of a second source after this many times what pieces take on average, `HEDGE_FLOOR` at least."""


class DownloadError(Exception):
    """No source is left: one line with what is missing, why, and the remedy."""


@dataclass(frozen=True, slots=True)
class Download:
    """A public state, and what it took."""

    state: Merged
    received: int
    """Bytes of leaf hashes and pieces that arrived, whether or not they were needed."""
    sources: tuple[str, ...]
    """Hotkeys that served at least one piece."""
    dropped: dict[str, str]
    """Why a source was given up, by hotkey."""


async def download(
    dendrite: Dendrite,
    endpoint_of: Callable[[str], str | None],
    *,
    sources: Sequence[str],
    run: bytes,
    held: int,
    agreed: bytes,
    counts: Mapping[Part, int],
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Download:
    """The public state with `held` rounds merged into it, from those of `sources` that serve it.

    Args:
        endpoint_of: a hotkey's axon now; asked again at every try.
        sources: hotkeys, those first that are to be asked first.
        run: the run's id, 8 bytes.
        agreed: the state's digest, as committed on chain.
        counts: values of each part; 0 for a momentum that the codec does without.
        folder: where pieces are kept until `forget`; what another download left there is removed.
        progress: told (pieces here, pieces in all) after every piece.

    Raises:
        DownloadError: no source is left, or the folder cannot be written.
    """
    fetch = _Fetch(dendrite, endpoint_of, sources, StateTreeRequest(run=run.hex(), round=held), dict(counts))
    tree = await fetch.tree(agreed)
    shelf = _Shelf(tree, counts, folder, agreed)
    try:
        missing = await asyncio.to_thread(shelf.open)
        await fetch.pieces(shelf, missing, progress or (lambda _done, _total: None))
    except OSError as error:
        raise DownloadError(
            f"pieces cannot be kept in {folder} ({error.strerror or error}): free space there or give another folder"
        ) from error
    return Download(
        Merged(shelf.tensors["theta"], shelf.tensors["momentum"]), fetch.received, tuple(fetch.served), fetch.dropped
    )


def forget(folder: Path) -> None:
    """Remove the pieces of any download from `folder`, once the state is safe elsewhere."""
    for path in folder.glob("*.partial"):
        path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Piece:
    part: Part
    index: int

    def __str__(self) -> str:
        return f"piece {self.index} of {self.part}"


_Item = _Piece | None
"""What is fetched: a piece, or None for the leaf hashes."""


class _Shelf:
    """Where pieces are put: one tensor a part and, with a folder, one file a part that a later download finds."""

    def __init__(self, tree: PublicTree, counts: Mapping[Part, int], folder: Path | None, agreed: bytes) -> None:
        self._tree = tree
        self._counts = counts
        self._folder = folder
        self._paths = {} if folder is None else {part: folder / f"{agreed.hex()}-{part}.partial" for part in counts}
        self.tensors: dict[Part, torch.Tensor] = {}
        self._views: dict[Part, memoryview] = {}
        self.total = sum(pieces_of(count) for count in counts.values())

    def open(self) -> list[_Piece]:
        """Make room, take what is on disk and hashes to its leaf; returns what is missing. Raises `OSError`."""
        self.tensors = {part: torch.empty(count, dtype=torch.float32) for part, count in self._counts.items()}
        self._views = {part: tensor_bytes(tensor) for part, tensor in self.tensors.items()}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in set(self._folder.glob("*.partial")) - set(self._paths.values()):
                path.unlink()
        return [
            _Piece(part, index)
            for part, count in self._counts.items()
            for index in self._missing(part, pieces_of(count))
        ]

    def _missing(self, part: Part, pieces: int) -> list[int]:
        path = self._paths.get(part)
        if path is None:
            return list(range(pieces))
        path.touch()
        missing = []
        with path.open("rb") as file:
            for index in range(pieces):
                start, end = span_of(self._counts[part], index)
                file.seek(start)
                room = self._views[part][start:end]
                if file.readinto(room) != end - start or content.leaf(room) != self._tree.leaves(part)[index]:
                    missing.append(index)
        return missing

    def put(self, piece: _Piece, data: torch.Tensor) -> bool:
        """Store a piece; False if it does not hash to its leaf. Raises `OSError`."""
        raw = tensor_bytes(data)
        if content.leaf(raw) != self._tree.leaves(piece.part)[piece.index]:
            return False
        start, end = span_of(self._counts[piece.part], piece.index)
        self._views[piece.part][start:end] = raw
        path = self._paths.get(piece.part)
        if path is not None:
            with path.open("r+b") as file:
                file.seek(start)
                file.write(raw)
        return True


@dataclass(eq=False)
class _Source:
    hotkey: str
    flights: int = 0
    failures: int = 0
    failing_since: float = 0.0
    rests_until: float = 0.0


@dataclass(frozen=True, slots=True)
class _Flight:
    source: _Source
    item: _Item
    start: float


@dataclass
class _Average:
    """Mean seconds of the pieces so far."""

    total: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        self.total, self.count = self.total + seconds, self.count + 1

    @property
    def patience(self) -> float:
        return max(HEDGE_FLOOR, HEDGE_FACTOR * self.total / self.count if self.count else 0.0)


Accept = Callable[[_Item, dict[str, torch.Tensor]], bool]
"""Takes what was served; False if it is not what the digest says. May run in a thread."""


@dataclass
class _Fetch:
    """One download: who is asked for what."""

    dendrite: Dendrite
    endpoint_of: Callable[[str], str | None]
    hotkeys: Sequence[str]
    request: StateTreeRequest
    counts: dict[Part, int]
    received: int = 0
    served: dict[str, int] = field(default_factory=dict)
    """Pieces by source, in order of the first."""
    dropped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sources = [_Source(hotkey) for hotkey in dict.fromkeys(self.hotkeys)]

    async def tree(self, agreed: bytes) -> PublicTree:
        """The leaf hashes behind `agreed`."""
        found: list[PublicTree] = []

        def accept(_item: _Item, tensors: dict[str, torch.Tensor]) -> bool:
            tree = PublicTree(*(tuple(bytes(tensor_bytes(row)) for row in tensors[part]) for part in PARTS))
            if tree.digest == agreed:
                found.append(tree)
            return tree.digest == agreed

        await self._gather([None], accept)
        return found[0]

    async def pieces(self, shelf: _Shelf, missing: Sequence[_Piece], progress: Callable[[int, int], None]) -> None:
        here = shelf.total - len(missing)
        progress(here, shelf.total)

        def accept(item: _Item, tensors: dict[str, torch.Tensor]) -> bool:
            return item is not None and shelf.put(item, tensors["data"])

        await self._gather(missing, accept, lambda left: progress(shelf.total - left, shelf.total))

    async def _gather(
        self, items: Sequence[_Item], accept: Accept, told: Callable[[int], None] = lambda _left: None
    ) -> None:
        """Fetch every item from somebody. Raises `DownloadError` when nobody is left."""
        loop = asyncio.get_running_loop()
        waiting, open_items = deque(items), set(items)
        flights: dict[asyncio.Task[dict[str, torch.Tensor]], _Flight] = {}
        average = _Average()
        try:
            while open_items:
                for source, item in self._plan(waiting, flights.values(), average.patience):
                    task = asyncio.create_task(self._ask(source, item))
                    flights[task] = _Flight(source, item, loop.time())
                    source.flights += 1
                if not flights and not self._sources:
                    raise DownloadError(self._complaint(open_items))
                nap = self._nap(flights.values(), average.patience)
                for task in await _first(flights, nap):
                    flight = flights.pop(task)
                    flight.source.flights -= 1
                    if await self._land(flight, task, accept):
                        average.add(loop.time() - flight.start)
                        open_items.discard(flight.item)
                        told(len(open_items))
                    elif flight.item in open_items and all(other.item != flight.item for other in flights.values()):
                        waiting.appendleft(flight.item)
                for task, flight in flights.items():
                    if flight.item not in open_items or flight.source.hotkey in self.dropped:
                        task.cancel()
        finally:
            for task, flight in flights.items():
                task.cancel()
                flight.source.flights -= 1
            await asyncio.gather(*flights, return_exceptions=True)

    def _plan(
        self, waiting: deque[_Item], flights: Collection[_Flight], patience: float
    ) -> Iterator[tuple[_Source, _Item]]:
        """Who is to be asked for what now. The caller counts each as a flight before it takes the next."""
        now = asyncio.get_running_loop().time()
        while waiting and (source := self._free(now)) is not None:
            yield source, waiting.popleft()
        asked = Counter(flight.item for flight in flights)
        for flight in list(flights):
            if not waiting and asked[flight.item] == 1 and now - flight.start >= patience:
                source = self._free(now, but=flight.source)
                if source is not None:
                    yield source, flight.item

    def _free(self, now: float, *, but: _Source | None = None) -> _Source | None:
        """The least busy source that may be asked, the first of several."""
        free = [s for s in self._sources if s is not but and s.flights < STREAMS and s.rests_until <= now]
        return min(free, key=lambda source: source.flights, default=None)

    def _nap(self, flights: Collection[_Flight], patience: float) -> float | None:
        """Seconds until there may be something to plan, though nothing has arrived."""
        now = asyncio.get_running_loop().time()
        times = [source.rests_until for source in self._sources] + [flight.start + patience for flight in flights]
        return min((moment - now for moment in times if moment > now), default=None)

    async def _ask(self, source: _Source, item: _Item) -> dict[str, torch.Tensor]:
        endpoint = self.endpoint_of(source.hotkey)
        if endpoint is None:
            raise Unreachable(f"{source.hotkey} serves no axon at the last finalized block")
        run, held = self.request.run, self.request.round
        _, tensors = await self.dendrite.call(
            endpoint,
            source.hotkey,
            self.request if item is None else StatePieceRequest(run=run, round=held, part=item.part, piece=item.index),
            reply=Tensors,
            reply_specs=tree_specs(self.counts) if item is None else piece_specs(self.counts[item.part], item.index),
            deadline=DEADLINE,
        )
        self.received += sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    async def _land(self, flight: _Flight, task: asyncio.Task[dict[str, torch.Tensor]], accept: Accept) -> bool:
        """Whether the item is here now, and what its source is to expect from us next."""
        source, item = flight.source, flight.item
        if task.cancelled():
            return False
        try:
            tensors = task.result()
        except (Unreachable, Busy, Unavailable) as error:
            self._rest(flight, error)
            return False
        except TransportError as error:
            self._drop(source, str(error))
            return False
        if not await asyncio.to_thread(accept, item, tensors):
            what = "the leaf hashes" if item is None else str(item)
            log.warning("%s serves something else as %s than the chain says", source.hotkey, what)
            self._drop(source, f"served something else as {what} than the chain says")
            return False
        source.failures = 0
        if item is not None:
            self.served[source.hotkey] = self.served.get(source.hotkey, 0) + 1
        return True

    def _rest(self, flight: _Flight, error: Unreachable | Refused) -> None:
        now, source = asyncio.get_running_loop().time(), flight.source
        if not source.failures:
            source.failing_since = flight.start
        source.failures += 1
        if now - source.failing_since >= PATIENCE:
            self._drop(source, str(error))
            return
        asked = error.retry_after if isinstance(error, Refused) else None
        source.rests_until = now + min(asked or PAUSE * 2 ** min(source.failures - 1, 8), LONGEST_PAUSE)

    def _drop(self, source: _Source, why: str) -> None:
        if source in self._sources:
            self._sources.remove(source)
            self.dropped[source.hotkey] = why
            log.info("%s is no source any more: %s", source.hotkey, why)

    def _complaint(self, missing: Collection[_Item]) -> str:
        what = "the leaf hashes" if None in missing else f"{len(missing)} pieces"
        why = "; ".join(f"{hotkey}: {reason}" for hotkey, reason in self.dropped.items()) or "none was given"
        return (
            f"{what} of the public state with {self.request.round} rounds merged cannot be had "
            f"from {len(self.dropped)} sources ({why}): "
            "download the state that the records on chain name now, from replicas that hold it"
        )


async def _first(
    flights: Collection[asyncio.Task[dict[str, torch.Tensor]]], nap: float | None
) -> set[asyncio.Task[dict[str, torch.Tensor]]]:
    """The tasks done once one is, or none after `nap` seconds."""
    if not flights:
        await asyncio.sleep(nap or 0.0)
        return set()
    done, _ = await asyncio.wait(flights, timeout=nap, return_when=asyncio.FIRST_COMPLETED)
    return done
