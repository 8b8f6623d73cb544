"""What the internet costs a swarm of 48 miners: the same swarm without any link limit, over links, and with kills.

    python -m scripts.bench.scale --out runs/bench               # 16 stages x 3 replicas
    python -m scripts.bench.scale --quick                        # 3 x 2, for CI

Compute is stood in for (`scripts.bench.standin`): a stage holds its thread for a set time, while the real workers,
axons and dendrites move real, signed bytes through sockets of this machine. The times are those of the 100b model's
stages for a microbatch of 8,192 tokens on A100s, at `EFFICIENCY` of their peak and without recomputing, divided by
`--scale`; so are the bytes of a boundary. Latency is not: it weighs `--scale` times as much as in a real run. Links are
the medians of the published run. A killed replica loses everything and is back after `--back-after` seconds.

Rows take turns, `--repeats` times. A row's rate counts microbatches that came back between the end of the warm-up and
the end of the measurement, each once. `ratio_links` and `ratio_churn` are medians over the repeats of a row's rate over
that of the row without limit. They mean something only where the machine has processor time to spare: `cores_busy` is
what the swarm used and `late` by what share more than asked for compute was held. Merges and audits are not part of it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from model.accounting import stage_flops, stage_parameters
from model.config import preset
from model.split import split
from scripts.bench.report import report
from scripts.bench.standin.launch import free_ports, run
from scripts.bench.standin.measured import Measured, Node
from scripts.bench.standin.spec import Boundary, Kill, Place, Spec, Steady
from subnet.transport.shaping import Link

MODEL = "100b"
TOKENS = 8_192
"""In a microbatch."""
PEAK = 312e12
"""FLOP/s of an A100, dense bf16."""
EFFICIENCY = 0.6
MEMORY_BANDWIDTH = 2.0e12
"""Bytes per second of an A100 80 GB."""
STEP_BYTES = 14
"""That an optimizer step moves per parameter: weight, gradient and two moments read, all but the gradient written."""
LINK = Link(latency_s=0.03, up_bps=856e6, down_bps=1_322e6)
ACCUMULATION = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One swarm and how long it is looked at."""

    stages: int
    replicas: int
    scale: float
    warm_up: float
    seconds: float
    processes: int
    kill_every: float
    back_after: float


FULL = Size(stages=16, replicas=3, scale=20, warm_up=15, seconds=90, processes=4, kill_every=30, back_after=5)
QUICK = Size(stages=3, replicas=2, scale=20, warm_up=2, seconds=7, processes=1, kill_every=4, back_after=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kind of run."""

    name: str
    link: Link | None
    kills: bool


ROWS = (
    Row(name="unlimited", link=None, kills=False),
    Row(name="links", link=LINK, kills=False),
    Row(name="churn", link=LINK, kills=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run showed."""

    row: str
    microbatches_per_second: float
    of_capacity: float
    """The rate over what the slowest stage's compute could do."""
    busy: list[float]
    """Per stage: share of the time for which its replicas' compute was held."""
    late: float
    cores_busy: float
    """By the swarm."""
    load_average: float
    """Of the machine, others included, over the last minute."""
    depth: float
    """Microbatches in flight per head, mean over heads at the end."""
    pushes_per_second: float
    """Of activations and gradients, since the start."""
    refused: int
    rerouted: int
    chased: int
    adopted: int
    kills: int


def times(size: Size) -> tuple[list[float], list[float], float]:
    """Forward and backward seconds of every stage, and those of an optimizer step, scaled."""
    config = preset(MODEL)
    plans = split(config, size.stages) if size.stages == FULL.stages else split(config, FULL.stages)[: size.stages]
    seconds = [[flops * TOKENS / (PEAK * EFFICIENCY) for flops in stage_flops(config, plan)] for plan in plans]
    step = max(stage_parameters(config, plan) for plan in plans) * STEP_BYTES / MEMORY_BANDWIDTH
    forward, backward = ([each[way] / size.scale for each in seconds] for way in (0, 1))
    return forward, backward, step / size.scale


def spec_of(size: Size, row: Row, *, seed: int) -> Spec:
    forward, backward, step = times(size)
    count = size.stages * size.replicas
    places = [Place(host="127.0.0.1", port=port, link=row.link) for port in free_ports(count)]
    width = preset(MODEL).boundary_width
    return Spec(
        stages=size.stages,
        replicas=size.replicas,
        forward=forward,
        backward=backward,
        step=step,
        accumulation=ACCUMULATION,
        boundary=Boundary(batch=1, sequence=round(TOKENS / size.scale), width=width),
        nodes=places,
        seed=seed,
        kills=kills_of(size, seed=seed) if row.kills else [],
        steady=Steady(warm_up=size.warm_up, seconds=size.seconds),
    )


def kills_of(size: Size, *, seed: int) -> list[Kill]:
    """One every `kill_every` seconds of the measurement, the first after half of that; stages in a drawn order."""
    generator = np.random.default_rng(seed)
    moments = np.arange(size.warm_up + size.kill_every / 2, size.warm_up + size.seconds, size.kill_every)
    order = [stage for _ in range(len(moments)) for stage in generator.permutation(size.stages)]
    return [
        Kill(
            node=int(stage) * size.replicas + int(generator.integers(size.replicas)),
            at=float(at),
            back_after=size.back_after,
        )
        for at, stage in zip(moments, order, strict=False)
    ]


def figures_of(row: Row, spec: Spec, found: Sequence[Measured]) -> Figures:
    nodes = {number: node for process in found for number, node in process.nodes.items()}
    begin = max(process.window[0] for process in found)
    end = min(process.window[1] for process in found)
    done: dict[int, float] = {}
    for node in nodes.values():
        for sample, at in node.done:
            done[sample] = min(at, done.get(sample, at))
    rate = sum(begin <= at < end for at in done.values()) / (end - begin)
    units = [f + b + spec.step / spec.accumulation for f, b in zip(spec.forward, spec.backward, strict=True)]
    heads = [node.depth for node in nodes.values() if node.stage == 0]
    asked = sum(node.counts.held_seconds for node in nodes.values())
    calls = [traffic for node in nodes.values() for route, traffic in node.routes.items() if route in PUSHES]
    return Figures(
        row=row.name,
        microbatches_per_second=round(rate, 3),
        of_capacity=round(rate * max(units) / spec.replicas, 4),
        busy=[round(_busy(nodes, stage, spec, end - begin), 3) for stage in range(spec.stages)],
        late=round(sum(node.counts.busy_seconds for node in nodes.values()) / asked - 1, 4),
        cores_busy=round(sum(process.cpu_seconds for process in found) / (end - begin), 3),
        load_average=round(os.getloadavg()[0], 2),
        depth=round(sum(heads) / len(heads), 1),
        pushes_per_second=round(sum(traffic["calls"] for traffic in calls) / end, 1),
        refused=sum(traffic["refused"] for traffic in calls),
        rerouted=sum(node.counts.rerouted for node in nodes.values()),
        chased=sum(node.counts.chased for node in nodes.values()),
        adopted=sum(node.counts.adopted for node in nodes.values()),
        kills=sum(node.lives - 1 for node in nodes.values()),
    )


PUSHES = ("forward", "backward")


def _busy(nodes: dict[int, Node], stage: int, spec: Spec, seconds: float) -> float:
    held = sum(node.counts.held_seconds for node in nodes.values() if node.stage == stage)
    return held / (seconds * spec.replicas)


async def measure(size: Size, repeats: int, out: Path, *, seed: int) -> list[dict[str, Figures]]:
    """Every row in turn, as often as asked for."""
    count = size.stages * size.replicas
    groups = [list(range(count))[process :: size.processes] for process in range(size.processes)]
    found = []
    for repeat in range(repeats):
        rows = {}
        for row in ROWS:
            spec = spec_of(size, row, seed=seed + repeat)
            rows[row.name] = figures_of(row, spec, await run(spec, out, groups))
            print(rows[row.name], file=sys.stderr)
        found.append(rows)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--quick", action="store_true", help="3 stages x 2 replicas for seconds, for CI")
    parser.add_argument("--repeats", type=int, help="how often each row is measured (default: 3, quick: 1)")
    parser.add_argument("--seed", type=int, default=0)
    for name, kind in (("stages", int), ("replicas", int), ("processes", int)):
        parser.add_argument(f"--{name}", type=kind)
    for name in ("scale", "warm-up", "seconds", "kill-every", "back-after"):
        parser.add_argument(f"--{name}", type=float)
    options = parser.parse_args(argv)
    chosen = QUICK if options.quick else FULL
    given = {name: value for name in asdict(chosen) if (value := getattr(options, name)) is not None}
    size = Size(**{**asdict(chosen), **given})
    repeats = options.repeats or (1 if options.quick else 3)
    options.out.mkdir(parents=True, exist_ok=True)
    found = asyncio.run(measure(size, repeats, options.out, seed=options.seed))
    report("scale", options.out, summary(size, found))
    return 0


def summary(size: Size, found: Sequence[dict[str, Figures]]) -> dict[str, object]:
    def ratio(row: str) -> float:
        rates = [(rows[row].microbatches_per_second, rows["unlimited"].microbatches_per_second) for rows in found]
        return round(median(rate / most if most else 0.0 for rate, most in rates), 4)

    forward, backward, step = times(size)
    return {
        "ratio_links": ratio("links"),
        "ratio_churn": ratio("churn"),
        "size": asdict(size),
        "forward_seconds": [round(seconds, 5) for seconds in forward],
        "backward_seconds": [round(seconds, 5) for seconds in backward],
        "step_seconds": round(step, 5),
        "boundary_bytes": 2 * round(TOKENS / size.scale) * preset(MODEL).boundary_width,
        "link": {**asdict(LINK), "published": "medians of the run of 2026: 856 Mbit/s up, 1,322 down"},
        "not_included": "merges, audits",
        "runs": [asdict(figures) for rows in found for figures in rows.values()],
    }


if __name__ == "__main__":
    sys.exit(main())
