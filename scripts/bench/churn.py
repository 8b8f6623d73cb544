"""What a massacre costs: one replica of every stage killed at once, in mid-round, against the same run undisturbed.

    python -m scripts.bench.churn --out runs/bench

For each seed two local swarms run one after the other, with and without `--kill stage:S@round1` for every stage. Their
validation losses are compared at the same number of trained tokens (the smaller of the two totals, log-linear between
the points that validators measured). Result: JSON on standard output and in OUT/churn.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from itertools import pairwise
from pathlib import Path

from neurons.telemetry import MicrobatchDone, Validated
from scripts.bench.report import report
from scripts.bench.swarm import run_swarm
from scripts.tally import LogFollower

Curve = list[tuple[int, float]]
"""(microbatches trained before, validation loss), rising."""


def curve(run: Path) -> Curve:
    """A run's validation losses by how many microbatches, each counted once, had been trained before."""
    done: set[tuple[int, int]] = set()
    losses: dict[int, float] = {}
    for _, stamped in LogFollower(run / "events").read():
        match stamped.event:
            case MicrobatchDone(round=number, sample=sample):
                done.add((number, sample))
            case Validated(round=number, loss=loss):
                losses[number] = loss
    return [(sum(number < start for number, _ in done), loss) for start, loss in sorted(losses.items())]


def loss_at(points: Curve, microbatches: int) -> float:
    """Loss after so many microbatches: log-linear between the points on either side."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= microbatches <= x1:
            share = (microbatches - x0) / (x1 - x0) if x1 > x0 else 1.0
            return math.exp(math.log(y0) * (1 - share) + math.log(y1) * share)
    raise ValueError(f"{microbatches} microbatches are outside the curve's {points[0][0]} to {points[-1][0]}")


def compare(out: Path, seed: int, options: argparse.Namespace) -> dict[str, object]:
    flags = [f"--stages={options.stages}", f"--replicas={options.replicas}", f"--rounds={options.rounds}"]
    flags += [f"--round-seconds={options.round_seconds:g}", f"--seed={seed}"]
    kills = [f"--kill=stage:{stage}@round1" for stage in range(options.stages)]
    summaries, curves = [], []
    for name, extra in (("calm", []), ("killed", kills)):
        summaries.append(run_swarm(out / f"{name}-{seed}", [*flags, *extra]))
        curves.append(curve(out / f"{name}-{seed}"))
    common = min(points[-1][0] for points in curves)
    calm, killed = (loss_at(points, common) for points in curves)
    units = summaries[1]["microbatches"]
    return {
        "seed": seed,
        "microbatches": common,
        "calm_loss": round(calm, 4),
        "killed_loss": round(killed, 4),
        "excess": round(killed / calm - 1, 4),
        "killed_run": units,
        "recovery": summaries[1].get("recovery"),
        "replicas_identical": summaries[1]["replicas_identical"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.churn", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--seeds", type=int, default=3, help="how many pairs of runs (default: 3)")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-seconds", type=float, default=40.0)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [compare(options.out, seed, options) for seed in range(options.seeds)]
    excess = [float(str(run["excess"])) for run in runs]
    report("churn", options.out, {"runs": runs, "mean_excess": round(sum(excess) / len(excess), 4)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
