"""How fast a tensor reaches one neighbour: Orion's axon and dendrite, bittensor 10.5.0's, and gloo's send and recv.

`orion` is what nodes do: who pushes a tensor knows its digest, which stands in the ledger's leaf of the unit that made
it, so a push hashes on the receiving side alone (`scripts.bench.overhead` has what the leaf's hash costs). `hashed` is
the same for a tensor that is in no ledger: both sides hash.

    python -m scripts.bench.transport --json      (two minutes, and one more the first time; --quick: half a minute)

For each, a receiver and a sender process on loopback TCP; the same fp32 tensors, as many of them, as many in flight.
Rounds take turns: every round measures all, one after the other, while the others' processes are idle, so a machine
that slows down slows all. A ratio is the median over rounds of the quotients within a round; above one, Orion is
faster. Orion's and bittensor's messages are signed, checked and answered one by one; gloo's are bare bytes.

bittensor 10.5.0 lives in a virtual environment of its own, made under --venv on first use from the package registry;
it finds this environment's torch there. Without a registry its row says so and its ratio is null. CPU time is of both
ends together. Result: JSON on standard output and in OUT/transport.json; without --json a table goes before it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import torch

from scripts.bench.report import report

PEER: Final = "10.5.0"
SIZES: Final = {"64KiB": 64 << 10, "2MiB": 2 << 20, "16MiB": 16 << 20}
MESSAGES: Final = {"64KiB": 256, "2MiB": 128, "16MiB": 24}
"""Of one round."""
LARGE: Final = ("2MiB", "16MiB")
"""What the headline ratios are the least of."""
RATIOS: Final = {
    "ratio_vs_bittensor10": ("orion", "bittensor10"),
    "ratio_vs_gloo": ("orion", "gloo"),
    "ratio_hashed_vs_bittensor10": ("hashed", "bittensor10"),
    "ratio_hashed_vs_gloo": ("hashed", "gloo"),
}
"""Whose speed over whose."""
PATIENCE_S: Final = 120.0
HERE: Final = Path(__file__).parent


class Unmeasured(Exception):  # noqa: N818
    """Why a transport has no figures, in one line."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One transport, one size, one round."""

    seconds: float
    cpu_seconds: float


class Ends:
    """A sender and a receiver process of one transport."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._command = command
        self._ends: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Self:
        try:
            port = await self._start("serve")
            await self._start("send", port)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for end in reversed(self._ends):
            if end.stdin is not None:
                end.stdin.close()
            try:
                await asyncio.wait_for(end.wait(), 10)
            except TimeoutError:
                end.kill()
                await end.wait()

    async def _start(self, *arguments: str) -> str:
        pipe = asyncio.subprocess.PIPE
        end = await asyncio.create_subprocess_exec(*self._command, *arguments, stdin=pipe, stdout=pipe)
        self._ends.append(end)
        return await self._line() if arguments == ("serve",) else ""

    async def _line(self) -> str:
        stdout = self._ends[-1].stdout
        line = b"" if stdout is None else await asyncio.wait_for(stdout.readline(), PATIENCE_S)
        if not line:
            raise Unmeasured(f"{self.name} ended before it answered: its traceback is above")
        return line.decode().strip()

    async def measure(self, size: int, messages: int, in_flight: int) -> Sample:
        """Send `messages` tensors of `size` bytes."""
        stdin = self._ends[-1].stdin
        if stdin is None:
            raise Unmeasured(f"{self.name} has no standard input")
        before = self._cpu_seconds()
        stdin.write(f"{size} {messages} {in_flight}\n".encode())
        seconds = float(await self._line())
        return Sample(seconds, self._cpu_seconds() - before)

    def _cpu_seconds(self) -> float:
        """Of all threads of both ends, from the scheduler's counters."""
        tasks = (task for end in self._ends for task in Path(f"/proc/{end.pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def peer_python(venv: Path) -> Path:
    """An interpreter with bittensor 10.5.0 and this environment's torch. Raises `Unmeasured`."""
    python, ready = venv / "bin" / "python", venv / f"bittensor-{PEER}"
    if ready.exists():
        return python
    print(f"making {venv} with bittensor {PEER}", file=sys.stderr)
    steps = (
        (sys.executable, "-m", "venv", "--clear", str(venv)),
        (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"bittensor=={PEER}"),
    )
    for step in steps:
        done = subprocess.run(step, check=False, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise Unmeasured(f"not measured: {' '.join(step[1:4])} failed ({reason}); is a package registry in reach?")
    # After the environment's own packages, so that of what both have, its own is taken.
    packages = next((venv / "lib").glob("python*/site-packages"))
    (packages / "zz_torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    ready.touch()
    return python


async def measure(
    all_ends: Sequence[Ends], *, rounds: int, in_flight: int, scale: float
) -> dict[tuple[str, str], list[Sample]]:
    """Samples by (transport, size), one a round. The first round warms up and does not count."""
    samples: dict[tuple[str, str], list[Sample]] = {}
    for number in range(rounds + 1):
        for size, nbytes in SIZES.items():
            messages = max(in_flight, round(MESSAGES[size] * scale)) if number else in_flight
            for ends in all_ends:
                sample = await ends.measure(nbytes, messages, in_flight)
                if number:
                    per_message = Sample(sample.seconds / messages, sample.cpu_seconds / messages)
                    samples.setdefault((ends.name, size), []).append(per_message)
    return samples


def ratio(samples: Mapping[tuple[str, str], list[Sample]], ours: str, other: str, size: str) -> float | None:
    """How many times as fast as `other` one of ours is; None if either was not measured."""
    if (other, size) not in samples or (ours, size) not in samples:
        return None
    pairs = zip(samples[other, size], samples[ours, size], strict=True)
    return round(statistics.median(theirs.seconds / own.seconds for theirs, own in pairs), 3)


def figures(samples: Mapping[tuple[str, str], list[Sample]], notes: Mapping[str, str]) -> dict[str, object]:
    """What the report says."""
    result: dict[str, object] = {}
    for key, (ours, other) in RATIOS.items():
        by_size = {size: ratio(samples, ours, other, size) for size in SIZES}
        large = [by_size[size] for size in LARGE]
        known = [value for value in large if value is not None]
        result[key] = min(known) if len(known) == len(large) else None
        result[f"{key}_by_size"] = by_size
    rows: dict[str, object] = dict(notes)
    for name in dict.fromkeys(name for name, _ in samples):
        rows[name] = {size: row(nbytes, samples[name, size]) for size, nbytes in SIZES.items()}
    return result | {"transports": rows}


def row(nbytes: int, samples: Sequence[Sample]) -> dict[str, float]:
    """Medians over the rounds, per message of `nbytes`."""
    seconds = statistics.median(sample.seconds for sample in samples)
    return {
        "milliseconds": round(1e3 * seconds, 3),
        "megabytes_per_second": round(nbytes / 1e6 / seconds, 1),
        "cpu_milliseconds": round(1e3 * statistics.median(sample.cpu_seconds for sample in samples), 3),
    }


def table(results: Mapping[str, object]) -> str:
    """The rows as text, one transport and size a line."""
    rows = results["transports"]
    lines = [f"{'':12}{'':>8}{'ms':>10}{'MB/s':>10}{'CPU ms':>10}"]
    for name, sizes in rows.items() if isinstance(rows, dict) else ():
        if isinstance(sizes, str):
            lines.append(f"{name:12}{sizes}")
            continue
        lines += [
            f"{name:12}{size:>8}" + "".join(f"{value:10,.2f}" for value in sizes[size].values()) for size in sizes
        ]
    return "\n".join([*lines, *(f"{key}: {results[key]}" for key in RATIOS)])


async def run(options: argparse.Namespace) -> dict[str, object]:
    ours = (sys.executable, "-m", "scripts.bench.transport_ends")
    commands: dict[str, Sequence[str]] = {name: (*ours, name) for name in ("orion", "hashed", "gloo")}
    notes: dict[str, str] = {}
    try:
        if options.quick and not (options.venv / f"bittensor-{PEER}").exists():
            raise Unmeasured(f"not measured: --quick makes no {options.venv}")
        commands["bittensor10"] = (str(peer_python(options.venv)), str(HERE / "bittensor10.py"))
    except Unmeasured as reason:
        notes["bittensor10"] = str(reason)
        print(reason, file=sys.stderr)
    async with AsyncExitStack() as stack:
        ends = [await stack.enter_async_context(Ends(name, command)) for name, command in commands.items()]
        samples = await measure(ends, rounds=options.rounds, in_flight=options.in_flight, scale=options.scale)
    return figures(samples, notes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.transport", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--venv", type=Path, default=Path("runs/bench") / f"bittensor-{PEER}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--in-flight", type=int, default=2, help="messages at a time, of every transport (default: 2)")
    parser.add_argument("--json", action="store_true", help="print the JSON alone")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    options.scale = 1.0
    if options.quick:
        options.rounds, options.scale = 3, 0.5
    results = asyncio.run(run(options))
    if not options.json:
        print(table(results))
    report(
        "transport",
        options.out,
        {
            "torch": torch.__version__,
            "peer": f"bittensor {PEER}",
            "rounds": options.rounds,
            "in_flight": options.in_flight,
            "messages_per_round": {size: round(count * options.scale) for size, count in MESSAGES.items()},
            **results,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
