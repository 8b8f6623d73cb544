"""A small run's folder, and the page of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from scripts.dashboard.command import HOST, serve
from tests.scripts.dashboard.recording import small, write

Served = Callable[[Path], AbstractAsyncContextManager[str]]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    run = tmp_path / "small-run"
    write(run, small())
    return run


@pytest.fixture
def served() -> Served:
    """Serves a run while the context lasts; gives the page's address."""

    @asynccontextmanager
    async def serving(run: Path) -> AsyncIterator[str]:
        stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
        task = asyncio.create_task(serve(run, host=HOST, port=0, ready=address.set_result, stop=stop))
        await asyncio.wait({task, address}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task  # raises what has ended it
        try:
            yield address.result()
        finally:
            stop.set()
            await task

    return serving
