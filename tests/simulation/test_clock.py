"""Lives on the simulation's loop: what is paused goes on where it was, what is killed runs no line more."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from scripts.sim.clock import Life, SimLoop


def play(main: Coroutine[Any, Any, None], loop: SimLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(main)
    finally:
        asyncio.set_event_loop(None)


@pytest.fixture
def loop() -> SimLoop:
    return SimLoop(np.random.default_rng(0))


def test_time_jumps_and_nobody_waits_for_ever(loop: SimLoop) -> None:
    async def main() -> None:
        await asyncio.sleep(3600)
        assert loop.time() == 3600
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        assert loop.time() == 3605
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="everybody waits for ever"):
        play(main(), loop)


def test_a_paused_life_stands_still_and_a_killed_one_never_goes_on(loop: SimLoop) -> None:
    seen: list[tuple[str, float]] = []

    async def tick(name: str) -> None:
        try:
            while True:
                await asyncio.create_task(asyncio.sleep(1))  # a task of a task is part of the life too
                seen.append((name, loop.time()))
        finally:
            seen.append((f"{name} ended", loop.time()))

    async def main() -> None:
        lives = {name: Life(name) for name in "abc"}
        for name, life in lives.items():
            loop.begin(life, tick(name))
        await asyncio.sleep(2.5)
        loop.pause(lives["a"])
        loop.end(lives["b"])
        await asyncio.sleep(3)
        loop.go_on(lives["a"])
        await asyncio.sleep(1.8)

    play(main(), loop)
    times = {name: [at for who, at in seen if who == name] for name in "abc"}
    assert times == {"a": [1, 2, 5.5, 6.5], "b": [1, 2], "c": [1, 2, 3, 4, 5, 6, 7]}
    assert not [who for who, _ in seen if "ended" in who]


def test_threads_answer_a_little_later_and_errors_reach_who_waits(loop: SimLoop) -> None:
    async def main() -> None:
        assert await asyncio.to_thread(lambda: 7) == 7
        assert 0 < loop.time() < 0.1
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)

    play(main(), loop)
