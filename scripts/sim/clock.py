"""The event loop of a simulation: its clock jumps, and what runs on it belongs to somebody who may be paused or killed.

Every callback runs in a context, and a context says whose life it is part of (`LIFE`). Of a paused life nothing runs
until it goes on, like a process under SIGSTOP; of an ended one nothing runs any more, not even its `finally`, like a
process under SIGKILL. What a thread would do is done at once, and its answer comes a little later.

A run is a function of its seed: nothing waits for a real thing, and what is kept in sets (tasks, futures) has a number
for a hash and not its address.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import numpy as np

T = TypeVar("T")

THREAD_SECONDS: Final = 0.02
"""Most that the answer of a thread takes."""
FIRST_NUMBER: Final = 1 << 20
"""File numbers of simulated sockets begin where a machine's never come to."""
_numbers = itertools.count()


@dataclass(eq=False)
class Life:
    """One incarnation of a node: everything that runs in it."""

    name: str
    paused: bool = False
    ended: bool = False
    over: bool = False
    """Its program has ended by itself."""
    backlog: list[events.Handle] = field(default_factory=list)
    """What would have run while it was paused."""
    kept: list[object] = field(default_factory=list)
    """What it leaves behind when it is killed; let go, coroutines would run their last lines."""
    on_signal: Callable[[], object] | None = None

    def ready(self, handle: events.Handle) -> bool:
        """Whether a callback of it may run now; it is kept for later, or for ever, if not."""
        if not self.paused and not self.ended:
            return True
        (self.kept if self.ended else self.backlog).append(handle)
        return False


LIFE: Final[ContextVar[Life | None]] = ContextVar("life", default=None)


class _Task(asyncio.Task[Any]):
    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - as the loop makes them
        self._number = next(_numbers)
        context: Context | None = options.get("context")
        self.life = LIFE.get() if context is None else context.get(LIFE)
        super().__init__(*args, **options)

    def __hash__(self) -> int:
        return self._number


class _Future(asyncio.Future[Any]):
    def __init__(self, *, loop: asyncio.AbstractEventLoop) -> None:
        self._number = next(_numbers)
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class End(Protocol):
    """A simulated socket, as far as the loop knows it."""

    waiters: dict[str, tuple[Callable[..., object], tuple[Any, ...], Context]]
    """Whom to call, and in which context, when it is ready; sides are `reader` and `writer`."""
    woken: set[str]
    """Sides at which somebody is about to be called."""

    def ready(self, side: str) -> bool: ...

    def stir(self) -> None:
        """Look whom to wake."""


class SimLoop(asyncio.SelectorEventLoop):
    """See above. `generator` says how long threads take."""

    def __init__(self, generator: np.random.Generator) -> None:
        super().__init__()
        self.now = 0.0
        self.ahead = 0.0
        """By how much the clock is ahead within a computation that runs now."""
        self.calls = 0
        self.ends: dict[int, End] = {}
        """Sockets of the simulated network, by number."""
        self._generator = generator
        self._runnable: deque[events.Handle] = self._ready  # type: ignore[attr-defined]
        self._timers: list[tuple[float, int, events.TimerHandle]] = []
        self.set_task_factory(lambda loop, coroutine, **options: _Task(coroutine, loop=loop, **options))

    def time(self) -> float:
        return self.now + self.ahead

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(loop=self)

    def _run_once(self) -> None:
        """All that can run now; if nothing can, time jumps to where something does."""
        runnable, timers = self._runnable, self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not runnable and timers:
            self.now = max(self.now, timers[0][0])
        elif not runnable:
            raise RuntimeError("everybody waits for ever")
        while timers and timers[0][0] <= self.now:
            runnable.append(heapq.heappop(timers)[2])
        for _ in range(len(runnable)):
            handle = runnable.popleft()
            if handle.cancelled():
                continue
            life = handle._context.get(LIFE)  # type: ignore[attr-defined]
            if life is None or life.ready(handle):
                self.calls += 1
                handle._run()

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> events.Handle:  # type: ignore[override]  # noqa: ANN401
        handle = events.Handle(callback, args, self, context)
        self._runnable.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,  # noqa: ANN401 - as asyncio
        context: Context | None = None,
    ) -> events.TimerHandle:
        timer = events.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(_numbers), timer))
        return timer

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,  # noqa: ANN401 - as asyncio
        context: Context | None = None,
    ) -> events.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def run_in_executor(self, _executor: object, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]  # noqa: ANN401
        """Done at once; the answer comes within `THREAD_SECONDS`."""
        answer: asyncio.Future[T] = self.create_future()
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits the answer
            deliver: Callable[..., object] = answer.set_exception
            outcome: object = error
        else:
            deliver, outcome = answer.set_result, result

        def settle() -> None:
            if not answer.done():
                deliver(outcome)

        self.call_later(self._generator.random() * THREAD_SECONDS, settle)
        return answer

    # -- sockets of a simulated network -----------------------------------------------------------------------------

    def wake(self, end: End, side: str, *, at_once: bool = False) -> None:
        """Call who waits at one side of a socket, and again for as long as it is ready.

        `at_once` only where nobody's code runs: not later in this moment, which saves a turn of the loop.
        """
        waiter = end.waiters.get(side)
        if waiter is None or side in end.woken:
            return
        callback, args, context = waiter
        life = context.get(LIFE)
        if at_once and (life is None or not (life.paused or life.ended)):
            context.run(callback, *args)
            if end.ready(side):
                self.wake(end, side)
            return
        end.woken.add(side)

        def fire() -> None:
            end.woken.discard(side)
            waiting = end.waiters.get(side)
            if waiting is not None and end.ready(side):
                waiting[0](*waiting[1])
                end.stir()

        self.call_soon(fire, context=context)

    def _wait(self, fd: object, side: str, callback: Callable[..., object], args: tuple[Any, ...]) -> bool:
        end = self.ends.get(fd) if isinstance(fd, int) else None
        if end is None:
            return False
        end.waiters[side] = callback, args, copy_context()
        end.stir()
        return True

    def _unwait(self, fd: object, side: str) -> bool:
        end = self.ends.get(fd) if isinstance(fd, int) else None
        return end is not None and end.waiters.pop(side, None) is not None

    def add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> None:  # type: ignore[override]  # noqa: ANN401 - as asyncio
        if not self._wait(fd, "reader", callback, args):
            super().add_reader(fd, callback, *args)

    def remove_reader(self, fd: Any) -> bool:  # noqa: ANN401 - as asyncio
        return self._unwait(fd, "reader") if fd >= FIRST_NUMBER else super().remove_reader(fd)

    def add_writer(self, fd: Any, callback: Callable[..., object], *args: Any) -> None:  # type: ignore[override]  # noqa: ANN401 - as asyncio
        if not self._wait(fd, "writer", callback, args):
            super().add_writer(fd, callback, *args)

    def remove_writer(self, fd: Any) -> bool:  # noqa: ANN401 - as asyncio
        return self._unwait(fd, "writer") if fd >= FIRST_NUMBER else super().remove_writer(fd)

    async def sock_accept(self, sock: Any) -> Any:  # noqa: ANN401 - as asyncio
        while True:
            try:
                return sock.accept()
            except BlockingIOError:
                came = self.create_future()
                self.add_reader(sock.fileno(), _settle, came)
                try:
                    await came
                finally:
                    self.remove_reader(sock.fileno())

    # -- lives ------------------------------------------------------------------------------------------------------

    def add_signal_handler(self, _number: int, callback: Callable[..., object], *_args: object) -> None:
        life = LIFE.get()
        if life is not None:
            life.on_signal = callback

    def remove_signal_handler(self, _number: int) -> bool:
        life = LIFE.get()
        if life is None or life.on_signal is None:
            return False
        life.on_signal = None
        return True

    def begin(self, life: Life, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine, and all that comes of it, as part of a life."""
        context = copy_context()
        context.run(LIFE.set, life)
        task: asyncio.Task[T] = self.create_task(work, context=context)
        life.kept.append(task)
        return task

    def pause(self, life: Life) -> None:
        life.paused = True

    def go_on(self, life: Life) -> None:
        life.paused = False
        self._runnable.extend(life.backlog)
        life.backlog.clear()

    def end(self, life: Life) -> None:
        """Kill it: nothing of it runs any more."""
        life.ended = True
        life.kept += [task for task in asyncio.all_tasks(self) if isinstance(task, _Task) and task.life is life]
        life.kept += life.backlog
        life.backlog.clear()


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
