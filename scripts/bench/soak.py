"""Whether a swarm that runs for long holds more and more: memory, descriptors and tasks of every node, round by round.

    python -m scripts.bench.soak                    (two hours; --minutes 10 is the long test's)

A local swarm of two stages of two replicas and two validators trains as `orion localnet` does; each node says as a
round begins what its process holds (`process_held` in its event log). The first third of the rounds is warming up. Of
the rest the most of the second half is held against the most of the first: what a miner keeps of its work comes and
goes with the slots of audits, and what it may need is the most of that. Result: JSON on standard output and in
OUT/soak.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from neurons.telemetry import ProcessHeld, read_log
from scripts.bench.report import report

ROUND_SECONDS: Final = 20.0
SHAPE: Final = ("--stages", "2", "--replicas", "2", "--validators", "2", "--model", "pico")
LEAST_ROUNDS: Final = 9
"""Fewer say nothing of growth."""
GROWTH: Final = 0.05
"""Of the memory, between the halves, that is called flat; and so many bytes whatever it is."""
SLACK_BYTES: Final = 16 << 20
SLACK_COUNT: Final = 16
"""Descriptors, and tasks, which come and go with neighbours."""


@dataclass(frozen=True, slots=True)
class Trend:
    """Of one node: the most that it held in the first and in the second half of what is looked at."""

    before: ProcessHeld
    after: ProcessHeld
    rounds: int
    """Between the halves."""

    @property
    def flat(self) -> bool:
        return (
            self.after.bytes <= self.before.bytes * (1 + GROWTH) + SLACK_BYTES
            and self.after.files <= self.before.files + SLACK_COUNT
            and self.after.tasks <= self.before.tasks + SLACK_COUNT
        )

    def bytes_per_day(self, round_seconds: float) -> float:
        return (self.after.bytes - self.before.bytes) / (self.rounds * round_seconds) * 86_400


def trend(held: Sequence[ProcessHeld]) -> Trend | None:
    """None of too few."""
    if len(held) < LEAST_ROUNDS:
        return None
    looked = held[len(held) // 3 :]
    middle = len(looked) // 2
    return Trend(_most(looked[:middle]), _most(looked[middle:]), middle)


def _most(held: Sequence[ProcessHeld]) -> ProcessHeld:
    return ProcessHeld(
        round=held[-1].round,
        bytes=max(one.bytes for one in held),
        files=max(one.files for one in held),
        tasks=max(one.tasks for one in held),
    )


def told(events: Path) -> dict[str, list[ProcessHeld]]:
    """What each node of a run held, round by round."""
    return {
        path.stem: [one.event for one in read_log(path) if isinstance(one.event, ProcessHeld)]
        for path in sorted(events.glob("*.jsonl"))
        if path.stem != "localnet"
    }


def figures(trends: Mapping[str, Trend], *, minutes: float) -> dict[str, object]:
    return {
        "minutes": minutes,
        "flat": all(one.flat for one in trends.values()),
        "nodes": {
            name: {
                "mb": [round(one.before.bytes / 1e6, 1), round(one.after.bytes / 1e6, 1)],
                "mb_per_day": round(one.bytes_per_day(ROUND_SECONDS) / 1e6, 1),
                "files": [one.before.files, one.after.files],
                "tasks": [one.before.tasks, one.after.tasks],
            }
            for name, one in trends.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(prog="python -m scripts.bench.soak", description=__doc__.splitlines()[0])
    flags.add_argument("--minutes", type=float, default=120.0)
    flags.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for soak.json")
    options = flags.parse_args(argv)
    rounds = round(options.minutes * 60 / ROUND_SECONDS)
    if rounds < LEAST_ROUNDS:
        print(
            f"error: --minutes {options.minutes:g} has {rounds} rounds, {LEAST_ROUNDS} say something", file=sys.stderr
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="orion-soak-") as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "scripts.cli", "localnet", "--plain", *SHAPE, "--rounds", str(rounds)]
        command += ["--round-seconds", f"{ROUND_SECONDS:g}", "--out", str(run)]
        status = subprocess.run(command, check=False, stdout=sys.stderr).returncode
        trends = {name: found for name, held in told(run / "events").items() if (found := trend(held)) is not None}
    if status or not trends:
        print(
            f"error: the swarm ended with status {status}, and {len(trends)} nodes say what they held", file=sys.stderr
        )
        return 1
    report("soak", options.out, figures(trends, minutes=options.minutes))
    return 0 if all(one.flat for one in trends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
