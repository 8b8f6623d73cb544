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
that of the row without limit; how far each row is from what its compute could do is `of_capacity`. Ratios mean
something only where the machine has processor time to spare. So scales are tried in the order of `--scales`, and the
first at which the swarm leaves a fifth of the cores idle and compute is not held much longer than asked for (`fits`)
gives the result, with all its repeats; of the others one repeat is kept beside it. Merges and audits are no part of it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from model.accounting import stage_flops, stage_parameters
from model.config import preset
from model.split import split
from scripts.bench.report import report
from scripts.bench.standin.launch import HURRY, free_ports, run
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


FULL = Size(stages=16, replicas=3, scale=20, warm_up=10, seconds=60, processes=4, kill_every=30, back_after=5)
QUICK = Size(stages=3, replicas=2, scale=20, warm_up=2, seconds=6, processes=1, kill_every=4, back_after=1)
SCALES = (20.0, 10.0, 5.0)
SPARE = 0.2
"""Share of the machine's cores that a swarm must leave idle."""
LATEST = 0.05
"""Share by which compute may be held longer than asked for: more is what waiting for a core costs."""
LIVES = 4
"""Times its computing that the last microbatch may take to come back: what is in flight waits for what is before it."""


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
    """By what share compute was held longer than asked for."""
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


Sized = tuple[Size, list[dict[str, Figures]]]
"""A size and the rows of each repeat."""


def sized(size: Size, scale: float) -> Size:
    """The same swarm at another scale; what is slower takes longer to fill."""
    return replace(size, scale=scale, warm_up=size.warm_up * max(1.0, size.scale / scale))


async def measure(size: Size, out: Path, *, seed: int) -> dict[str, Figures]:
    """Every row in turn."""
    count = size.stages * size.replicas
    groups = [list(range(count))[process :: size.processes] for process in range(size.processes)]
    rows = {}
    for row in ROWS:
        spec = spec_of(size, row, seed=seed)
        drain = LIVES * (sum(spec.forward) + sum(spec.backward))
        rows[row.name] = figures_of(row, spec, await run(spec, out, groups, patience=HURRY + drain))
        print(rows[row.name], file=sys.stderr)
    return rows


def fits(rows: Mapping[str, Figures], cores: int) -> bool:
    """Whether the swarm, and not the machine or what else it runs, set the pace."""
    return all(figures.cores_busy <= (1 - SPARE) * cores and figures.late <= LATEST for figures in rows.values())


async def search(sizes: Sequence[Size], repeats: int, out: Path, *, seed: int) -> list[Sized]:
    """One repeat of each size until one fits, that one with all its repeats; where none does, the last one."""
    cores = len(os.sched_getaffinity(0))
    found = []
    for size in sizes:
        runs = [await measure(size, out, seed=seed)]
        found.append((size, runs))
        if fits(runs[0], cores) or size is sizes[-1]:
            runs += [await measure(size, out, seed=seed + repeat) for repeat in range(1, repeats)]
            break
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--quick", action="store_true", help="3 stages x 2 replicas for seconds, for CI")
    parser.add_argument("--repeats", type=int, help="how often each row is measured (default: 2, quick: 1)")
    parser.add_argument("--scales", type=_scales, metavar="20,10,5", help="by what times are divided, first that fits")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("stages", "replicas", "processes"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("warm-up", "seconds", "kill-every", "back-after"):
        parser.add_argument(f"--{name}", type=float)
    options = parser.parse_args(argv)
    chosen = asdict(QUICK if options.quick else FULL)
    given = {name: value for name in chosen if (value := getattr(options, name, None)) is not None}
    size = Size(**{**chosen, **given})
    sizes = [sized(size, scale) for scale in options.scales or (SCALES[:1] if options.quick else SCALES)]
    options.out.mkdir(parents=True, exist_ok=True)
    found = asyncio.run(search(sizes, options.repeats or (1 if options.quick else 2), options.out, seed=options.seed))
    report("scale", options.out, summary(found))
    return 0


def _scales(text: str) -> tuple[float, ...]:
    scales = tuple(float(part) for part in text.split(","))
    if not all(1 <= scale < math.inf for scale in scales):
        raise argparse.ArgumentTypeError(f"{text} has a scale below 1: give numbers from 1 on, largest first")
    return scales


def summary(found: Sequence[Sized]) -> dict[str, object]:
    """Of the last size, with all sizes beside it."""
    cores = len(os.sched_getaffinity(0))
    sizes = [
        {
            "scale": size.scale,
            "fits": all(fits(rows, cores) for rows in runs),
            "ratio_links": _ratio(runs, "links"),
            "ratio_churn": _ratio(runs, "churn"),
            "links_of_capacity": round(median(rows["links"].of_capacity for rows in runs), 4),
            "boundary_bytes": 2 * round(TOKENS / size.scale) * preset(MODEL).boundary_width,
            "seconds": dict(zip(("forward", "backward", "step"), times(size), strict=True)),
            "runs": [asdict(figures) for rows in runs for figures in rows.values()],
        }
        for size, runs in found
    ]
    return {
        **{key: sizes[-1][key] for key in ("scale", "fits", "ratio_links", "ratio_churn", "links_of_capacity")},
        "size": asdict(found[-1][0]),
        "link": asdict(LINK),
        "not_included": "merges, audits",
        "sizes": sizes,
    }


def _ratio(runs: Sequence[dict[str, Figures]], row: str) -> float:
    rates = [(rows[row].microbatches_per_second, rows["unlimited"].microbatches_per_second) for rows in runs]
    return round(median(rate / most if most else 0.0 for rate, most in rates), 4)


if __name__ == "__main__":
    sys.exit(main())
