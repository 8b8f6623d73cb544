"""What strangers can take from a node's honest neighbours: throughput under attack over throughput without.

    python -m scripts.bench.load --json            (four minutes; --quick: two)
    python -m scripts.bench.load --only abuser

A node on one core, its honest neighbour and the strangers on the other, which do what they can. The neighbour pushes a
256 KiB tensor every hundredth of a second, as much as the line of a miner of the published run carries. For the control
strangers compute without sending anything; control and attack take turns within a run, and a ratio is the attack's
pushes per second over the mean of the controls beside it, the median over rounds. Beside it: how long the latest
hundredth of pushes took, what of its core the node used, and what it held (memory, files, tasks) under attack.
Result: JSON on standard output and in OUT/load.json; without --json a table goes before it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from scripts.bench.load_ends import ATTACKS
from scripts.bench.report import report

PATIENCE: Final = 120.0
SETTLE: Final = 2.0
"""Seconds that an attack has to unfold before anything is measured."""
NONE: Final = "none"
STAT: Final = TypeAdapter(dict[str, int])
PACE: Final = TypeAdapter(dict[str, float])


class LoadError(Exception):
    """An end that did not do its part, in one line."""


@dataclass(slots=True)
class Found:
    """Of one attack."""

    ratios: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    """p99, ms."""
    cpu: list[float] = field(default_factory=list)
    """Share of a core."""
    most: dict[str, int] = field(default_factory=dict)
    """That the node held, by kind."""
    did: dict[str, int] = field(default_factory=dict)
    """Connections that were made, and answers by status."""


class End:
    """A process of `scripts.bench.load_ends`."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process = process
        self._name = name

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, *arguments: str) -> AsyncIterator[End]:
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "scripts.bench.load_ends", *arguments)
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        try:
            yield cls(process, arguments[0])
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def line(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - a pipe
        line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE)
        if not line:
            raise LoadError(f"{self._name} ended before it answered: its traceback is above")
        return line.decode().strip()

    async def ask(self, text: str) -> str:
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        self._process.stdin.write(f"{text}\n".encode())
        return await self.line()

    async def end(self) -> str:
        """Close its input; its last line."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        self._process.stdin.close()
        return await self.line()


async def under(kind: str, port: str, node: End, neighbour: End, seconds: float, found: Found) -> float:
    """Pushes per second while somebody does that."""
    async with End.of("attack", kind, port) as stranger:
        await stranger.line()
        await asyncio.sleep(SETTLE)
        before, start = STAT.validate_json(await node.ask("stat")), time.perf_counter()
        pace = PACE.validate_json(await neighbour.ask(str(seconds)))
        held, took = STAT.validate_json(await node.ask("stat")), time.perf_counter() - start
        found.cpu.append((held.pop("cpu_us") - before["cpu_us"]) / 1e6 / took)
        found.late.append(pace["p99_ms"])
        found.most = {name: max(value, found.most.get(name, 0)) for name, value in held.items()}
        did = STAT.validate_json(await stranger.end())
        found.did = {name: found.did.get(name, 0) + did.get(name, 0) for name in found.did | did}
    return pace["rate"]


async def measure(kinds: Sequence[str], *, rounds: int, seconds: float) -> dict[str, Found]:
    """Each attack between two controls, `rounds` times."""
    founds = {kind: Found() for kind in (NONE, *kinds)}
    async with End.of("serve") as node:
        port = await node.line()
        async with End.of("honest", port) as neighbour:
            await neighbour.ask("1")  # connected and warm
            for _ in range(rounds):
                before = await under(NONE, port, node, neighbour, seconds, founds[NONE])
                for kind in kinds:
                    rate = await under(kind, port, node, neighbour, seconds, founds[kind])
                    after = await under(NONE, port, node, neighbour, seconds, founds[NONE])
                    founds[kind].ratios.append(2 * rate / (before + after))
                    told = f"{rate:6.1f} pushes/s, {before:.1f} and {after:.1f} without"
                    print(f"{kind:<16} {told}", file=sys.stderr)
                    before = after
    return founds


def table(founds: dict[str, Found]) -> str:
    lines = [
        f"{'attack':<16} {'ratio':>6} {'p99 ms':>7} {'core':>5} {'MB':>6} {'files':>6} {'tasks':>6}  what came back"
    ]
    for kind, found in founds.items():
        ratio = f"{statistics.median(found.ratios):.2f}" if found.ratios else ""
        most, did = found.most, ", ".join(f"{count} {name}" for name, count in sorted(found.did.items()))
        late, cpu = statistics.median(found.late), statistics.median(found.cpu)
        lines.append(
            f"{kind:<16} {ratio:>6} {late:>7.1f} {cpu:>5.2f} {most['bytes'] / 1e6:6.0f} {most['files']:6} "
            f"{most['tasks']:6}  {did}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(prog="python -m scripts.bench.load", description=__doc__.splitlines()[0])
    flags.add_argument("--quick", action="store_true", help="one round of two seconds each")
    flags.add_argument("--only", choices=[kind for kind in ATTACKS if kind != NONE], action="append")
    flags.add_argument("--json", action="store_true", help="print no table")
    flags.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for load.json")
    options = flags.parse_args(argv)
    kinds = options.only or [kind for kind in ATTACKS if kind != NONE]
    rounds, seconds = (1, 2.0) if options.quick else (3, 3.0)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        founds = asyncio.run(measure(kinds, rounds=rounds, seconds=seconds))
    except LoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not options.json:
        print(table(founds))
    ratios = {kind: statistics.median(founds[kind].ratios) for kind in kinds}
    figures = {
        "ratio": min(ratios.values()),
        "ratios": {kind: round(ratio, 3) for kind, ratio in ratios.items()},
        "rounds": {kind: [round(ratio, 3) for ratio in founds[kind].ratios] for kind in kinds},
        "p99_ms": {kind: round(statistics.median(found.late), 2) for kind, found in founds.items()},
        "core": {kind: round(statistics.median(found.cpu), 3) for kind, found in founds.items()},
        "most_bytes_mb": {kind: round(found.most["bytes"] / 1e6, 1) for kind, found in founds.items()},
        "most_files": {kind: found.most["files"] for kind, found in founds.items()},
        "did": {kind: founds[kind].did for kind in kinds},
    }
    report("load", options.out, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
