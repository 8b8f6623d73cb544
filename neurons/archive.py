"""What a miner keeps so that others can check it: tensors of its units, states of its windows, its tables.

Nobody knows which windows of a slot an audit will pick before the slot's seed, so until then all of them stay in host
memory. Once the seed is there only those it picks stay, and of them what it leaves to be asked for, until the round
after next begins. All of it together keeps within a limit: where windows come faster than seeds, the oldest that no
seed has picked is given up, which costs the miner that window's evidence and nobody else anything. What is picked, and
what a cut was taken from, lies on disk as soon as it is written, so host memory is for what is not picked yet.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping

import torch

from model.checkpoint import CheckpointError
from neurons.exchange import Desk
from neurons.kept import Cut, KeptWindow, PickedWindow, Provable, State, Vector, unit_tensors
from neurons.quota import Audience
from neurons.shelf import Shelf
from neurons.stores import StoreError
from subnet.messages import StatePart
from subnet.trust.audit import UnitTensors
from subnet.trust.heads import WindowHead
from subnet.trust.ledger import Evidence, UnitKey
from subnet.trust.pool import Pool
from subnet.trust.quota import ROUNDS_KEPT

log = logging.getLogger("orion.neurons.archive")

Pick = Callable[[Iterable[WindowHead]], Mapping[int, Pool]]
"""From the heads of a round to the windows of one slot that its seed picks, by version, each with the pieces of its
states that may be asked for."""


class Tally:
    """Bytes of tensors that are held, each counted once however many windows share it."""

    def __init__(self) -> None:
        self.bytes = 0
        self._holders: Counter[int] = Counter()

    def take(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self._holders[id(tensor)] += 1
            if self._holders[id(tensor)] == 1:
                self.bytes += tensor.nbytes

    def leave(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self._holders[id(tensor)] -= 1
            if not self._holders[id(tensor)]:
                del self._holders[id(tensor)]
                self.bytes -= tensor.nbytes


class RoundArchive:
    """One round of one replica. Tensors are as they crossed the wire.

    A window is opened, gets its units, is closed in a slot and entered with its head; all windows of a slot are, before
    the slot's seed picks among them.
    """

    def __init__(
        self,
        tally: Tally | None = None,
        *,
        grown: Callable[[], None] = lambda: None,
        thinned: Callable[[int, PickedWindow], None] = lambda _version, _window: None,
    ) -> None:
        """`grown` is called when there is more of it, `thinned` with a window that a seed has picked."""
        self.windows: dict[int, KeptWindow] = {}
        """Those whose slots' seeds are not known, by version, oldest first."""
        self.picked: dict[int, PickedWindow | None] = {}
        """Those that their slots' seeds picked, by version; None for one that is not here."""
        self.audience: Audience | None = None
        """Who may ask for how much, once that and all seeds are known."""
        self.cut = Cut()
        self.evidence: Evidence | None = None
        self.desk: Desk | None = None
        """What it has of the round's merge, once it takes part in that."""
        self.packed: dict[tuple[int, int], int] = {}
        """Bytes of deltas that were packed before, by version and rounds merged into what they are taken from."""
        self._tally = tally or Tally()
        self._grown = grown
        self._thinned = thinned
        self._versions: dict[UnitKey, int] = {}
        self._open: int | None = None
        self._hashing: dict[int, int] = {}
        """Slots by version of windows that are closed but have no head yet."""
        self._heads: list[WindowHead] = []
        self._slot: float = 0
        """Windows that close from here on lie in this slot or later."""
        self._picks: dict[int, Pick] = {}
        """By slot: known and not applied yet."""

    # -- as the round goes on ---------------------------------------------------------------------------------------

    def open_window(self, version: int, state: State, previous: Vector | None = None) -> None:
        """Units of `version` come from here on. One that was open and has none is replaced. `previous` are the weights
        before a merge was taken over."""
        if self._open is not None:
            self._drop(self._open)
        self._open = version
        self.windows[version] = KeptWindow(state, previous=previous)
        self._tally.take(self.windows[version].tensors())
        self._grown()

    def add(self, version: int, key: UnitKey, unit: UnitTensors) -> None:
        """A unit of the open window."""
        self.windows[version].units[key] = unit
        self._versions[key] = version
        self._tally.take(unit_tensors(unit))
        self._grown()

    def close_window(self, slot: int, after: State) -> None:
        """The open window ends in `slot`; its head follows."""
        assert self._open is not None  # noqa: S101 - one is opened when the round begins
        window = self.windows[self._open]
        window.closing, window.slot = after, slot
        self._hashing[self._open] = slot
        self._open = None
        self._tally.take((after.weights.values, after.moments.values))
        self.reach(slot)
        self._grown()

    def enter(self, head: WindowHead) -> None:
        """The head of a window that is closed."""
        del self._hashing[head.version]
        self._heads.append(head)
        self._apply()

    def reach(self, slot: float) -> None:
        """Windows that close from here on lie in `slot` or later."""
        self._slot = max(self._slot, slot)
        self._apply()

    def end(self, closing: Vector) -> None:
        """The round's last window is closed; `closing` are the weights then."""
        if self._open is not None:
            self._drop(self._open)
            self._open = None
        self.keep_cut(Cut(closing))
        self.reach(math.inf)

    def keep_cut(self, cut: Cut) -> None:
        """What the cut was taken from, in the place of what was known of it."""
        self._tally.leave(self.cut.tensors())
        self.cut = cut
        self._tally.take(cut.tensors())
        self._grown()

    def recall(self, windows: Mapping[int, PickedWindow], cut: Cut) -> None:
        """What was put on disk before a restart: windows by version, and what the cut was taken from."""
        for version, window in windows.items():
            self.picked[version] = window
            self._versions |= dict.fromkeys(window.units, version)
        self.keep_cut(cut)

    def restore(self, evidence: Evidence) -> None:
        """Of a round that ended before a restart the tables are here, and what was on disk: other windows that its
        seeds pick are lost."""
        self.evidence, self._heads = evidence, list(evidence.heads)
        self.reach(math.inf)

    def seeded(self, slot: int, pick: Pick) -> None:
        """A slot's seed is known: what it does not pick goes as soon as all windows of the slot have heads."""
        self._picks[slot] = pick
        self._apply()

    def give_up(self) -> int | None:
        """Let go of the oldest window that is closed and not picked; its version, None if there is none."""
        version = next((version for version in self.windows if version != self._open), None)
        if version is not None:
            self._drop(version)
        return version

    def put_away(self, version: int, window: PickedWindow | None) -> None:
        """A picked window lies on disk; or, without one there, it is given up."""
        held = self.picked[version]
        assert held is not None  # noqa: S101 - it was put away
        self.picked[version] = window
        self._tally.leave(held.tensors())
        if window is None:
            for key in held.units:
                del self._versions[key]

    def clear(self) -> None:
        """Let go of everything."""
        for version in tuple(self.windows):
            self._drop(version)
        for version, window in self.picked.items():
            if window is not None:
                self._tally.leave(window.tensors())
                self.picked[version] = None
        self._versions.clear()
        self.keep_cut(Cut())

    def _apply(self) -> None:
        for slot in [slot for slot in self._picks if slot < self._slot and slot not in self._hashing.values()]:
            chosen = self._picks.pop(slot)(self._heads)
            for version, window in tuple(self.windows.items()):
                if version != self._open and window.slot == slot and version not in chosen:
                    self._drop(version)
            for version, pool in chosen.items():
                self._thin(version, pool)

    def _thin(self, version: int, pool: Pool) -> None:
        whole = self.windows.pop(version, None)
        if whole is None:
            self.picked.setdefault(version, None)
            return
        thin = PickedWindow.of(whole, pool)
        self.picked[version] = thin
        self._tally.take(thin.tensors())
        self._tally.leave(whole.tensors())
        self._thinned(version, thin)

    def _drop(self, version: int) -> None:
        window = self.windows.pop(version)
        self._tally.leave(window.tensors())
        for key in window.units:
            del self._versions[key]

    # -- what is here -----------------------------------------------------------------------------------------------

    def unit(self, key: UnitKey) -> UnitTensors | None:
        """What a unit took and gave; None if it is not here."""
        version = self._versions.get(key)
        if version is None:
            return None
        window = self.windows.get(version) or self.picked.get(version)
        return None if window is None else window.units[key]

    def weights(self, version: int) -> torch.Tensor | None:
        """What a picked window began with, fp32 (n,); None if it is not here."""
        window = self.picked.get(version)
        return None if window is None else window.weights

    def part(self, version: int, part: StatePart) -> Provable | None:
        """A part of a picked window, or of the cut whatever the version; None if it is not here."""
        match part:
            case "closing":
                return self.cut.closing
            case "owed":
                return self.cut.owed
            case "still_owed":
                return self.cut.still_owed
            case _:
                window = self.picked.get(version)
                return None if window is None else window.parts.get(part)


class Archive:
    """The rounds a miner still answers for, within `limit` bytes of tensors in host memory.

    What is picked goes to the `shelf`, in the background and one after the other; without one, or while it has no room,
    it stays in memory.
    """

    def __init__(
        self,
        *,
        limit: float = math.inf,
        shelf: Shelf | None = None,
        given_up: Callable[[int, int], None] = lambda _number, _version: None,
        lost: Callable[[int, int | None, str], None] = lambda _number, _version, _reason: None,
    ) -> None:
        """`given_up` hears of the first window of each round that had to go before its seed: (round, version); `lost`
        of a picked one, or of a cut (None), that could not be put away, and why."""
        self._limit = limit
        self._shelf = shelf
        self._given_up = given_up
        self._lost = lost
        self._tally = Tally()
        self._rounds: dict[int, RoundArchive] = {}
        self._poorer: set[int] = set()
        """Rounds that had to give up a window."""
        self._stuck: dict[tuple[int, int], str] = {}
        """Picked windows, by round and version, that the shelf had no room for, and why: in memory while that lasts."""
        self._working: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        """To write or delete on the shelf: in the order in which that was asked for."""

    @property
    def bytes(self) -> int:
        """Of all tensors held in host memory."""
        return self._tally.bytes

    @property
    def bytes_on_disk(self) -> int:
        return 0 if self._shelf is None else self._shelf.bytes

    def open(self, number: int) -> RoundArchive:
        """A round's archive; those too old to be asked for are forgotten."""
        if number not in self._rounds:
            held = RoundArchive(
                self._tally,
                grown=self._grown,
                thinned=lambda version, window: self._put_away(number, version, window),
            )
            self._rounds[number] = held
        self._forget(number - ROUNDS_KEPT)
        return self._rounds[number]

    def get(self, number: int) -> RoundArchive | None:
        return self._rounds.get(number)

    @property
    def newest(self) -> int:
        """Number of the newest round, -1 before the first."""
        return max(self._rounds, default=-1)

    def cut_is_whole(self, number: int) -> None:
        """All that the cut of a round was taken from is here, and nothing of it is still to be changed."""
        if self._shelf is not None:
            self._start(self._write_cut(self._shelf, number, self._rounds[number].cut))

    async def recall(self, number: int | None) -> None:
        """Find again what an earlier life put away of round `number`; what it left of others goes. Raises
        `StoreError`."""
        if self._shelf is None:
            return
        async with self._turn:
            await self._shelf.forget(lambda other: other != number)
            if number is not None:
                self.open(number).recall(*await self._shelf.find(number))

    async def settle(self) -> None:
        """Until everything lies where it belongs."""
        while self._working:
            await asyncio.gather(*self._working)

    async def close(self) -> None:
        """Nobody asks any more: let go of everything, on disk too."""
        self._forget(self.newest)
        await self.settle()

    def _forget(self, newest: int) -> None:
        """All rounds up to this one."""
        old = [number for number in self._rounds if number <= newest]
        for number in old:
            self._rounds.pop(number).clear()
            self._poorer.discard(number)
        self._stuck = {key: reason for key, reason in self._stuck.items() if key[0] not in old}
        if old and self._shelf is not None:
            self._start(self._clear_shelf(self._shelf, newest))

    def _grown(self) -> None:
        for number in sorted(self._rounds):
            while self._tally.bytes > self._limit:
                version = self._rounds[number].give_up()
                if version is None:
                    break
                if number not in self._poorer:
                    self._poorer.add(number)
                    self._given_up(number, version)
        while self._tally.bytes > self._limit and self._stuck:
            number, version = min(self._stuck)
            self._rounds[number].put_away(version, None)
            self._lost(number, version, self._stuck.pop((number, version)))

    # -- the shelf --------------------------------------------------------------------------------------------------

    def _put_away(self, number: int, version: int, window: PickedWindow) -> None:
        if self._shelf is not None:
            self._start(self._write_window(self._shelf, number, version, window))

    async def _write_window(self, shelf: Shelf, number: int, version: int, window: PickedWindow) -> None:
        async with self._turn:
            held = self._rounds.get(number)
            if held is None or held.picked.get(version) is not window:
                return
            try:
                written = await shelf.put_window(number, version, window)
            except (StoreError, CheckpointError) as error:
                if number in self._rounds:
                    log.warning("round %d: window %d stays in memory: %s", number, version, error)
                    self._stuck[number, version] = str(error)
                    self._grown()
                return
            if held.picked.get(version) is window:
                held.put_away(version, written)
        stuck, self._stuck = list(self._stuck), {}
        for other, one in stuck:  # there is room again
            again = self._rounds[other].picked.get(one)
            if again is not None:
                self._put_away(other, one, again)

    async def _write_cut(self, shelf: Shelf, number: int, cut: Cut) -> None:
        async with self._turn:
            held = self._rounds.get(number)
            if held is None or held.cut is not cut:
                return
            try:
                written = await shelf.put_cut(number, cut)
            except (StoreError, CheckpointError) as error:
                if self._tally.bytes <= self._limit:
                    log.warning("round %d: what its cut was taken from stays in memory: %s", number, error)
                    return
                self._lost(number, None, str(error))
                written = Cut()
            if held.cut is cut:
                held.keep_cut(written)

    async def _clear_shelf(self, shelf: Shelf, newest: int) -> None:
        async with self._turn:
            try:
                await shelf.forget(lambda number: number <= newest)
            except StoreError as error:
                log.error("evidence that nobody asks for stays: %s", error)  # noqa: TRY400 - a line for a person

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)
