"""Every benchmark of speed, one after the other, and a gate on their ratios.

    python -m scripts.bench.all --quick                # what CI runs: minutes on two cores
    python -m scripts.bench.all --out runs/bench       # everything at full size
    python -m scripts.bench.all --quick --accept       # write the baseline anew

Every benchmark compares side by side in one run, so its ratios belong to the code and not to the machine. The gate
holds them against docs/benchmarks/quick.json: one that falls below its `floor`, or by more than `SLACK` below what the
baseline has, fails the run and is named with both figures. Absolute times are kept in the JSON and judged by nobody.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BASELINE = Path(__file__).parents[2] / "docs" / "benchmarks" / "quick.json"
SLACK = 0.5
"""By so large a share a ratio may fall: short runs on two cores that others use too vary by half of it and more."""
LONGEST = 900.0
"""Seconds after which a benchmark is stopped and has failed."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A ratio of a benchmark's result that must not fall, by the path of keys to it; the higher the better."""

    key: str
    floor: float = 0.0
    """Whatever the baseline says."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A module of this folder and what is watched of its result."""

    name: str
    gates: tuple[Gate, ...]


BENCHMARKS = (
    Benchmark("overhead", (Gate("headroom", floor=1.0),)),
    Benchmark("transport", (Gate("ratio_vs_gloo"), Gate("ratio_hashed_vs_gloo"))),
    Benchmark("load", (Gate("ratio", floor=0.9),)),
    Benchmark("schedule", (Gate("least_over_ours"),)),
    Benchmark("scale", (Gate("ratio_links", floor=0.6), Gate("ratio_churn", floor=0.4))),
    Benchmark("stage", (Gate("memory_agreement", floor=0.85),)),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A ratio beside what it is held against."""

    benchmark: str
    key: str
    value: float | None
    """None where the benchmark could not measure it here."""
    least: float

    @property
    def holds(self) -> bool:
        return self.value is None or self.value >= self.least

    def __str__(self) -> str:
        name = f"{self.benchmark}.{self.key}"
        if self.value is None:
            return f"{name:<40} not measured here"
        verdict = "holds" if self.holds else "has FALLEN: mend it, or say why and run again with --accept"
        return f"{name:<40} {self.value:>8.3f}  at least {self.least:.3f}  {verdict}"


def judge(benchmark: Benchmark, result: Mapping[str, object], baseline: Mapping[str, float]) -> list[Finding]:
    """What the gates of one benchmark find. Raises `KeyError` for a ratio that the result lacks."""
    findings = []
    for gate in benchmark.gates:
        name = f"{benchmark.name}.{gate.key}"
        value = result[gate.key]
        if value is not None and not isinstance(value, int | float):
            raise KeyError(f"{name} is {value!r}; it must be a number, or null where it cannot be measured")
        least = max(gate.floor, (1 - SLACK) * baseline.get(name, 0.0))
        findings.append(Finding(benchmark.name, gate.key, None if value is None else float(value), least))
    return findings


def run(name: str, out: Path, *, quick: bool) -> dict[str, object]:
    """Run one benchmark in a process of its own; its result. Raises `CalledProcessError`, `TimeoutExpired`."""
    command = [sys.executable, "-m", f"scripts.bench.{name}", "--out", str(out), *(["--quick"] if quick else [])]
    with (out / f"{name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, timeout=LONGEST)
    result: dict[str, object] = json.loads((out / f"{name}.json").read_text())
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.all", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--quick", action="store_true", help="small sizes, for CI")
    parser.add_argument("--accept", action="store_true", help="write what is measured into the baseline")
    parser.add_argument("--only", choices=[benchmark.name for benchmark in BENCHMARKS], action="append")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    baseline: dict[str, float] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    findings: list[Finding] = []
    failed = False
    for benchmark in BENCHMARKS:
        if options.only and benchmark.name not in options.only:
            continue
        start = time.perf_counter()
        try:
            result = run(benchmark.name, options.out, quick=options.quick)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"{benchmark.name}: {error}; its output is in {options.out / f'{benchmark.name}.log'}")
            failed = True
            continue
        found = judge(benchmark, result, baseline)
        findings += found
        print(f"{benchmark.name}: {time.perf_counter() - start:.0f} s")
        for finding in found:
            print(f"  {finding}")
    if options.accept:
        baseline |= {f"{f.benchmark}.{f.key}": round(f.value, 3) for f in findings if f.value is not None}
        BASELINE.write_text(json.dumps(dict(sorted(baseline.items())), indent=2) + "\n")
    return int(failed or not all(finding.holds for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
