"""One adversary in a whole swarm, kind by kind and seed by seed, against the same swarm without one.

    python -m scripts.bench.cheats --kinds noise sign-flip --seeds 3 --out runs/bench/cheats

Each run is a local swarm in processes of its own, kept in OUT; a run that is there is not repeated, so a grid that was
stopped goes on with the same command. Said of each kind: the round of its conviction, its weight round by round, how
far honest miners' shares are from those of the clean swarm and validators from each other, and the validation loss at
equal tokens against the clean runs. Result: JSON on standard output and in OUT/cheats.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean

from pydantic import BaseModel, ConfigDict

from scripts.bench.churn import Curve, curve, loss_at
from scripts.bench.report import report
from scripts.bench.swarm import run_swarm

CLEAN = "clean"
KINDS = ("noise", "sign-flip", "low-precision", "replay", "no-backward", "wrong-data", "withheld-evidence")
"""One of each way to cheat that stages of the small preset can play: its last has one layer and none to skip."""
LATEST = 2
"""A cheater weighs nothing by so many rounds after the one that was audited."""


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Cheater(_Read):
    """What a summary says of an adversary."""

    uid: int
    convicted_round: int | None
    reason: str | None
    weights: dict[int, float]
    """By round, the mean over honest validators."""


class MinerRead(_Read):
    uid: int
    stage: int


class ChainRead(_Read):
    weights: dict[int, dict[int, float]]
    """By validator and miner, as read back at the end."""


class Summary(_Read):
    """What is taken from a run's summary.json."""

    adversaries: list[Cheater]
    miners: list[MinerRead]
    chain: ChainRead
    audits: dict[str, object]


@dataclass(frozen=True, slots=True)
class Run:
    """One swarm that has ended."""

    kind: str
    seed: int
    summary: Summary
    curve: Curve

    @property
    def shares(self) -> dict[int, float]:
        """What a stage's honest miners earn together, as a share of what all honest ones do: once a cheater is benched,
        its siblings do its work and are paid for it."""
        cheats = {cheater.uid for cheater in self.summary.adversaries}
        rows = self.summary.chain.weights.values()
        by_stage: dict[int, float] = {}
        for miner in self.summary.miners:
            if miner.uid not in cheats:
                earned = mean(row.get(miner.uid, 0.0) for row in rows)
                by_stage[miner.stage] = by_stage.get(miner.stage, 0.0) + earned
        total = sum(by_stage.values())
        return {stage: earned / total for stage, earned in sorted(by_stage.items())} if total else by_stage

    @property
    def disagreement(self) -> float:
        """The largest relative difference of two validators' weights for one honest miner."""
        cheats = {cheater.uid for cheater in self.summary.adversaries}
        worst = 0.0
        for one, other in combinations(self.summary.chain.weights.values(), 2):
            for uid in (one.keys() | other.keys()) - cheats:
                a, b = one.get(uid, 0.0), other.get(uid, 0.0)
                worst = max(worst, abs(a - b) / max(a, b, 1e-12))
        return worst


def play(out: Path, kind: str, seed: int, flags: Sequence[str]) -> Run:
    """The run of a kind and seed: the one that is kept, or a new one."""
    folder = out / f"{kind}-{seed}"
    kept = folder / "summary.json"
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
        extra = [] if kind == CLEAN else [f"--adversary={kind}"]
        run_swarm(folder, [*flags, f"--seed={seed}", *extra])
    return Run(kind, seed, Summary.model_validate_json(kept.read_text()), curve(folder))


def row(run: Run, clean: Run) -> dict[str, object]:
    """One cheated run against the clean one of its seed."""
    common = min(run.curve[-1][0], clean.curve[-1][0])
    (cheater,) = run.summary.adversaries
    deadline = None if cheater.convicted_round is None else cheater.convicted_round + LATEST
    late = [weight for number, weight in cheater.weights.items() if deadline is not None and number >= deadline]
    expected, found = clean.shares, run.shares
    return {
        "seed": run.seed,
        "convicted_round": cheater.convicted_round,
        "reason": cheater.reason,
        "weights": cheater.weights,
        "zero_in_time": bool(late) and not any(late),
        "at_end": [weights.get(cheater.uid, 0.0) for weights in run.summary.chain.weights.values()],
        "honest_shift": max(abs(found.get(stage, 0.0) / share - 1) for stage, share in expected.items()),
        "disagreement": run.disagreement,
        "microbatches": common,
        "excess_loss": loss_at(run.curve, common) / loss_at(clean.curve, common) - 1,
        "audit_flops_share": run.summary.audits.get("flops_share"),
        "audit_bytes_share": run.summary.audits.get("bytes_share"),
    }


def of_kind(runs: Sequence[Run], clean: Mapping[int, Run]) -> dict[str, object]:
    rows = [row(run, clean[run.seed]) for run in runs]
    losses = [float(str(one["excess_loss"])) for one in rows]
    return {"mean_excess_loss": mean(losses), "runs": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.cheats", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/cheats"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--model", default="pico", help="model preset (default: pico)")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--round-seconds", type=float, default=12.0)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    flags = [
        f"--model={options.model}",
        f"--stages={options.stages}",
        f"--replicas={options.replicas}",
        f"--rounds={options.rounds}",
    ]
    flags += [f"--round-seconds={options.round_seconds:g}"]
    seeds = range(options.seeds)
    clean = {seed: play(options.out, CLEAN, seed, flags) for seed in seeds}
    found = {kind: of_kind([play(options.out, kind, seed, flags) for seed in seeds], clean) for kind in options.kinds}
    calm = [
        {"seed": run.seed, "disagreement": run.disagreement, "convictions": run.summary.audits.get("convictions")}
        for run in clean.values()
    ]
    report("cheats", options.out, {"flags": flags, "clean": calm, "kinds": json.loads(json.dumps(found))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
