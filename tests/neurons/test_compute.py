"""The compute thread: backward first, strict order when asked, failures where they belong."""

import asyncio
import threading

import pytest

from neurons.compute import ComputeThread, Lane


async def gated(thread: ComputeThread) -> tuple[threading.Event, asyncio.Future[bool]]:
    """Hold the thread so that jobs queue up behind it."""
    gate, begun = threading.Event(), threading.Event()

    def hold() -> bool:
        begun.set()
        return gate.wait(10)

    held = thread.submit(Lane.BACKWARD, 0, hold)
    assert await asyncio.to_thread(begun.wait, 10)
    return gate, held


async def test_backward_runs_before_forward() -> None:
    thread = ComputeThread(name="test")
    gate, first = await gated(thread)
    order: list[str] = []
    jobs = [thread.submit(Lane.FORWARD, i, lambda i=i: order.append(f"f{i}")) for i in (1, 0)]
    jobs += [thread.submit(Lane.BACKWARD, i, lambda i=i: order.append(f"b{i}")) for i in (5, 4)]
    gate.set()
    await asyncio.gather(first, *jobs)
    assert order == ["b4", "b5", "f0", "f1"]
    thread.stop()


async def test_ordered_lanes_wait_for_the_next_index() -> None:
    thread = ComputeThread(name="test", ordered=True)
    order: list[int] = []
    late = [thread.submit(Lane.FORWARD, i, lambda i=i: order.append(i)) for i in (2, 1)]
    await asyncio.sleep(0)
    assert order == []
    await asyncio.gather(thread.submit(Lane.FORWARD, 0, lambda: order.append(0)), *late)
    assert order == [0, 1, 2]
    thread.stop()


async def test_failures_reach_whoever_awaits_and_nothing_else() -> None:
    thread = ComputeThread(name="test")
    with pytest.raises(ZeroDivisionError):
        await thread.submit(Lane.FORWARD, 0, lambda: 1 // 0)
    assert await thread.submit(Lane.FORWARD, 1, lambda: 7) == 7
    thread.stop()


async def test_clear_cancels_what_has_not_run() -> None:
    thread = ComputeThread(name="test")
    gate, first = await gated(thread)
    queued = thread.submit(Lane.FORWARD, 0, lambda: 1)
    thread.clear()
    gate.set()
    assert await first
    await thread.idle()
    assert queued.cancelled()
    thread.stop()
