"""How large packed weight deltas are: what an auditor fetches of a picked window's weights, as a share of the weights.

    python -m scripts.bench.deltas --out docs/benchmarks      (ten minutes)

A model is trained in this process with real stages and real text. After so many local steps the weights are packed
against those of the round's start, as a miner does (`subnet.trust.delta`). The share depends on how finely a weight is
written: fp32, or bf16 with stochastic rounding, of which a run with two bytes a weight would keep no finer copy.
Engines here keep fp32, so for that each weight is rounded after each step: emulated.

It also depends on how far steps move a weight in units of its own size. A step moves it by about the rate, and a
matrix of a model `hidden` wide begins with a deviation of 1/sqrt(hidden). So every rate is measured as it is, and once
more as large as it is for the weights of the widest preset. Result: JSON on standard output and in OUT/deltas.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from model.config import preset
from model.optimizer import OptimizerConfig
from model.stage import flatten
from scripts.bench.report import report
from scripts.calibrate import Pipeline
from scripts.manifests import ACCUMULATION, BATCH, inner_of
from subnet.trust import delta

RATES = (1e-4, 3e-4)
STEPS = (1, 5, 10, 20, 40)
"""Local steps since the state that the delta is packed against: 20 are a round of the 100B run, 40 a round and the one
before, which a replica still carries until its merge is taken over."""
WIDE = "100b"
BYTES = {"fp32": 4, "bf16": 2}
"""Of one weight, as it is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The deltas of all stages after some steps."""

    weights: str
    """How they are kept."""
    lr: float
    hidden: int
    """Width of the model for whose weights the rate is that large."""
    steps: int
    share: float
    """Bytes of the deltas over those of the weights."""
    largest: float
    """Of one stage."""
    unchanged: float
    """Share of the weights that are the same to the bit."""


def stochastic_bf16(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 to neighbouring bf16 values, up with the probability that keeps the mean; as fp32 of the same shape."""
    bits = weights.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & ~0xFFFF).view(torch.float32)


def optimizer(lr: float) -> OptimizerConfig:
    """A large model's, at a constant rate."""
    return replace(inner_of("100b"), lr=lr, warmup_steps=0)


def shares(
    model: str, weights: str, lr: float, hidden: int, *, settled: int, steps: Sequence[int], stages: int, seed: int
) -> Iterator[Share]:
    """One training run: `settled` steps in which moments become what they are in a run, then the round."""
    scale = math.sqrt(hidden / preset(model).hidden)
    pipeline = Pipeline(model, stages, seed=seed, inner=optimizer(lr * scale))
    generator = torch.Generator().manual_seed(seed)

    def train(until: int) -> None:
        for done in range(pipeline.steps, until):
            pipeline.train(done + 1)
            if weights == "bf16":
                for engine in pipeline.engines:
                    engine.replace_weights(stochastic_bf16(flatten(engine.stage), generator))

    train(settled)
    start = [flatten(engine.stage) for engine in pipeline.engines]
    for goal in steps:
        train(settled + goal)
        now = [flatten(engine.stage) for engine in pipeline.engines]
        packed = [len(delta.encode(theta, base)) for theta, base in zip(now, start, strict=True)]
        whole = [BYTES[weights] * theta.numel() for theta in now]
        same = sum(int((theta == base).sum()) for theta, base in zip(now, start, strict=True))
        yield Share(
            weights=weights,
            lr=lr,
            hidden=hidden,
            steps=goal,
            share=round(sum(packed) / sum(whole), 4),
            largest=round(max(part / all_ for part, all_ in zip(packed, whole, strict=True)), 4),
            unchanged=round(same / sum(theta.numel() for theta in now), 4),
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.deltas", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--settled", type=int, default=40, help="steps before the round (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = [
        asdict(share)
        for weights in BYTES
        for hidden in (preset(options.model).hidden, preset(WIDE).hidden)
        for lr in RATES
        for share in shares(
            options.model,
            weights,
            lr,
            hidden,
            settled=options.settled,
            steps=STEPS,
            stages=options.stages,
            seed=options.seed,
        )
    ]
    figures = {
        "model": options.model,
        "stages": options.stages,
        "settled": options.settled,
        "seed": options.seed,
        "microbatch": {"sequences": BATCH, "accumulation": ACCUMULATION},
        "optimizer": asdict(optimizer(RATES[0])) | {"lr": list(RATES)},
        "bf16": "emulated: fp32 weights of the engine, each rounded stochastically to bf16 after every step",
        "bytes_per_weight": BYTES,
        "deltas": found,
    }
    report("deltas", options.out, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
