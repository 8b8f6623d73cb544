"""The nodes' own coroutines under a virtual clock, and a chain that keeps the same time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Mapping
from typing import TypeVar

from subnet.metagraph import BLOCK_SECONDS
from subnet.swarm.record import Record

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Does not wait: moves the clock to where the wait would end."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everybody waits for ever")
        if not ready:
            self.now += max(0.0, timeout or 0.0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer when everybody waits. Nothing may run beside it."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def virtually(work: Awaitable[T]) -> T:
    """Run on a virtual clock that starts at 0."""

    async def whole() -> T:
        return await work

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(whole())


class Chain:
    """Blocks at fixed times, final at once; what is published lands in the next one."""

    def __init__(self) -> None:
        self._log: list[tuple[int, str, bytes, bytes]] = []

    @property
    def height(self) -> int:
        return int(asyncio.get_running_loop().time() / BLOCK_SECONDS + 1e-6)

    def put(self, hotkey: str, record: Record, *, until: int) -> int | None:
        """The block it lands in; None if that would be after `until`."""
        block = self.height + 1
        if block > until:
            return None
        self._log.append((block, hotkey, record.encode(), record.shards))
        return block

    async def wait(self, block: int) -> None:
        await asyncio.sleep(block * BLOCK_SECONDS - asyncio.get_running_loop().time())

    async def records_at(self, block: int) -> Mapping[str, Record | None]:
        await self.wait(block)
        return {hotkey: Record.decode(raw, shards) for at, hotkey, raw, shards in self._log if at <= block}
