"""A stand-in swarm in several processes of this machine: started together, measured together, ended together."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from socket import socket
from typing import Any

from pydantic import TypeAdapter

from scripts.bench.standin.measured import Measured
from scripts.bench.standin.spec import Spec

_MEASURED = TypeAdapter(Measured)
HURRY = 60.0
"""Seconds for processes to be ready, and to say what they measured."""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


class LaunchError(Exception):
    """A process of the swarm ended or said nothing in time: one line."""


async def run(
    spec: Spec,
    folder: Path,
    groups: Sequence[Sequence[int]],
    *,
    patience: float = HURRY,
    enter: Sequence[Sequence[str]] | None = None,
) -> list[Measured]:
    """Run every group of nodes in a process of its own; what each measured. The spec is left in `folder`.

    Args:
        patience: seconds that steps may take, or that a steady run may take longer than it is meant to.
        enter: per group, words before the command that starts it.

    Raises `LaunchError`.
    """
    path = folder / "standin.json"
    path.write_text(spec.model_dump_json())
    if spec.steady is not None:
        patience += spec.steady.warm_up + spec.steady.seconds
    words = [()] * len(groups) if enter is None else enter
    processes = [await _start(path, group, before) for group, before in zip(groups, words, strict=True)]
    # In steps those without a head say what they measured when they are told that the heads are done.
    first = [spec.steady is not None or any(node < spec.replicas for node in group) for group in groups]
    said: dict[int, Any] = {}
    try:
        await asyncio.gather(*(_line(process, HURRY) for process in processes))
        for process in processes:
            _stdin(process).write(b"go\n")
        for turn in (True, False):
            numbers = [number for number, each in enumerate(first) if each is turn]
            if not turn:
                for process in processes:
                    _stdin(process).close()
            lines = await asyncio.gather(*(_line(processes[number], patience) for number in numbers))
            said.update(zip(numbers, lines, strict=True))
        await asyncio.gather(*(asyncio.wait_for(process.wait(), HURRY) for process in processes))
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*(process.wait() for process in processes))
    return [_MEASURED.validate_python(said[number]) for number in range(len(groups))]


async def _start(path: Path, group: Sequence[int], before: Sequence[str]) -> asyncio.subprocess.Process:
    numbers = ",".join(map(str, group))
    return await asyncio.create_subprocess_exec(
        *before,
        sys.executable,
        *("-m", "scripts.bench.standin", str(path), "--nodes", numbers),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 28,
    )


def _stdin(process: asyncio.subprocess.Process) -> asyncio.StreamWriter:
    assert process.stdin is not None  # noqa: S101 - it was asked for
    return process.stdin


async def _line(process: asyncio.subprocess.Process, seconds: float) -> Any:  # noqa: ANN401 - JSON
    assert process.stdout is not None  # noqa: S101 - it was asked for
    try:
        raw = await asyncio.wait_for(process.stdout.readline(), seconds)
    except TimeoutError:
        raise LaunchError(f"a process of the swarm said nothing for {seconds:.0f} s: give it fewer nodes") from None
    if not raw:
        raise LaunchError(f"a process of the swarm ended with {await process.wait()}: its log says why")
    return json.loads(raw)
