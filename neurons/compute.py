"""The compute thread: one thread that does a replica's arithmetic, backward first, never waiting for the network.

Jobs are submitted from the event loop and answered through futures; between two jobs the thread asks nobody. Backward
before forward keeps inputs short-lived and lets gradients out early. With `ordered`, each direction runs strictly in
submission index, whatever order the network delivers in: the synchronous mode that parity tests need.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Lane(IntEnum):
    """What runs first."""

    BACKWARD = 0
    FORWARD = 1


class Job:
    """A call and where its answer goes."""

    __slots__ = ("_call", "_future", "index")

    def __init__(self, index: int, call: Callable[[], T], future: asyncio.Future[T]) -> None:
        self.index = index
        self._call: Callable[[], object] = call
        self._future = cast("asyncio.Future[object]", future)

    def __lt__(self, other: Job) -> bool:
        return self.index < other.index

    def cancel(self) -> None:
        self._future.cancel()

    def run(self) -> Callable[[], None]:
        """Do it; returns what delivers the answer, to be called in the event loop."""
        try:
            result = self._call()
        except Exception as caught:  # noqa: BLE001 - every failure belongs to whoever awaits the job
            return partial(self._deliver, self._future.set_exception, caught)
        return partial(self._deliver, self._future.set_result, result)

    def _deliver(self, setter: Callable[[Any], None], value: object) -> None:
        if not self._future.done():
            setter(value)


class ComputeThread:
    """Runs jobs one at a time. Create it inside the running event loop; `stop` ends the thread."""

    def __init__(
        self,
        *,
        name: str,
        ordered: bool = False,
        settle: Callable[[Callable[[], object]], object] = lambda answer: answer(),
    ) -> None:
        """`settle` answers a job, given what does so: at once, or when its results are in the host's memory."""
        self._loop = asyncio.get_running_loop()
        self._ordered = ordered
        self._settle = settle
        self._ready = threading.Condition()
        self._queues: dict[Lane, list[Job]] = {lane: [] for lane in Lane}
        self._next = dict.fromkeys(Lane, 0)
        self._busy = False
        self._stopped = False
        self.busy_seconds = 0.0
        """Time spent inside jobs, by the loop's clock."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, lane: Lane, index: int, call: Callable[[], T]) -> asyncio.Future[T]:
        """Queue a job. Its exception, if any, arrives through the future."""
        future: asyncio.Future[T] = self._loop.create_future()
        with self._ready:
            heapq.heappush(self._queues[lane], Job(index, call, future))
            self._ready.notify_all()
        return future

    def clear(self) -> None:
        """Forget queued jobs (their futures are cancelled) and start counting indices from 0 again."""
        with self._ready:
            forgotten = [job for queue in self._queues.values() for job in queue]
            for queue in self._queues.values():
                queue.clear()
            self._next = dict.fromkeys(Lane, 0)
        for job in forgotten:
            job.cancel()

    async def idle(self) -> None:
        """Wait until the job that runs now, if any, has been answered."""
        with self._ready:
            busy = self._busy
        if busy:
            await asyncio.to_thread(self._wait_idle)

    def stop(self) -> None:
        """End the thread after the job that runs now."""
        self.clear()
        with self._ready:
            self._stopped = True
            self._ready.notify_all()
        self._thread.join()

    def _wait_idle(self) -> None:
        with self._ready:
            self._ready.wait_for(lambda: not self._busy)

    def _take(self) -> Job | None:
        for lane, queue in self._queues.items():
            if queue and (not self._ordered or queue[0].index == self._next[lane]):
                self._next[lane] += 1
                return heapq.heappop(queue)
        return None

    def _run(self) -> None:
        while True:
            with self._ready:
                self._busy = False
                self._ready.notify_all()
                job = self._take()
                while job is None:
                    if self._stopped:
                        return
                    self._ready.wait()
                    job = self._take()
                self._busy = True
            start = self._loop.time()
            deliver = job.run()
            self.busy_seconds += self._loop.time() - start
            self._settle(partial(self._loop.call_soon_threadsafe, deliver))
