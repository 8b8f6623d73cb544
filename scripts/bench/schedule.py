"""How long one step takes over slow links: PyTorch's 1F1B over gloo, and Orion, on the same links.

    python -m scripts.bench.schedule     (as root on Linux; --quick: Orion alone, small, on links of this process)

Stages in a row, each a process whose compute is held for F and B, not done (`scripts.bench.standin`,
`scripts.bench.pipelining`); boundary tensors and their gradients are real bytes. A step begins when the first stage
starts its first microbatch and ends with the last backward there; the mean of some, after `WARM_UP` that open the
connections' windows.

    one_f_one_b     torch.distributed.pipelining, Schedule1F1B over gloo; links of the kernel
    orion           the real stage worker, axon and dendrite; links of the kernel
    orion_shaper    the same on the emulated link of `subnet.transport.shaping`, over loopback

Links of the kernel are network namespaces joined by a switch (`scripts.bench.links`), with TCP BBR at all ends. Where
they cannot be had, rows that need them say why instead of figures. Beside the measured stand the least times by
arithmetic (`scripts.bench.ideal`). Measured 1F1B takes longer than its own: PyTorch's schedule sends a tensor and waits
for one in a single step, and gloo begins to send when the receiver has begun to wait.

Result: JSON on standard output and in OUT/schedule.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from scripts.bench import pipelining
from scripts.bench.ideal import Line, deep, one_f_one_b
from scripts.bench.links.namespace import LinksError
from scripts.bench.links.network import CONGESTION, QUEUE_S, Network
from scripts.bench.report import report
from scripts.bench.standin.launch import free_ports, run
from scripts.bench.standin.spec import Boundary, Place, Spec, Steps
from subnet.transport.shaping import Link

WARM_UP: Final = 3
"""Steps that do not count: a new connection's window opens over several tensors."""
PORT: Final = 29_511
"""Of every node in a namespace of its own."""
PATIENCE_S: Final = 20.0
"""Seconds for processes to start, on top of four times what 1F1B needs at least."""


class UnfinishedError(Exception):
    """A row was begun and has no result, in one line."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is run."""

    stages: int
    microbatches: int
    forward: float
    backward: float
    boundary: tuple[int, int, int]
    """(microbatch, sequence, width), bf16."""
    link: Link
    steps: int

    @property
    def bytes(self) -> int:
        """Of a boundary tensor, in one direction."""
        return 2 * self.boundary[0] * self.boundary[1] * self.boundary[2]

    @property
    def line(self) -> Line:
        return Line(
            stages=self.stages,
            microbatches=self.microbatches,
            forward=self.forward,
            backward=self.backward,
            transfer=8 * self.bytes / self.link.up_bps,
            latency=self.link.latency_s,
        )

    @property
    def patience(self) -> float:
        return PATIENCE_S + 4 * (self.steps + WARM_UP) * one_f_one_b(self.line)


FULL: Final = Setting(
    stages=8,
    microbatches=32,
    forward=0.033,
    backward=0.067,
    boundary=(1, 8192, 322),
    link=Link(latency_s=0.05, up_bps=200e6, down_bps=200e6, per_neighbour=True),
    steps=3,
)
QUICK: Final = Setting(
    stages=4,
    microbatches=8,
    forward=0.033,
    backward=0.067,
    boundary=(1, 2048, 322),
    link=Link(latency_s=0.05, up_bps=50e6, down_bps=50e6, per_neighbour=True),
    steps=2,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One way to run it."""

    step_seconds: tuple[float, ...]
    extra: dict[str, object]

    @property
    def seconds(self) -> float:
        return statistics.fmean(self.step_seconds)

    @property
    def figures(self) -> dict[str, object]:
        return {"seconds": round(self.seconds, 3), "step_seconds": self.step_seconds, **self.extra}


def by_pytorch(setting: Setting) -> Row:
    """1F1B over gloo on links of the kernel. Raises `LinksError`, `UnfinishedError`."""
    with Network(setting.stages, setting.link) as network:
        spec = pipelining.Spec(
            hosts=network.hosts,
            port=PORT,
            interface=network.interface,
            forward=setting.forward,
            backward=setting.backward,
            boundary=setting.boundary,
            microbatches=setting.microbatches,
            steps=setting.steps,
            warm_up=WARM_UP,
        )
        command = [sys.executable, "-m", "scripts.bench.pipelining", json.dumps(asdict(spec))]
        ranks = [
            subprocess.Popen(
                [*network.enter(rank), *command, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for rank in range(setting.stages)
        ]
        try:
            said, _ = ranks[0].communicate(timeout=setting.patience)
        except subprocess.TimeoutExpired:
            raise UnfinishedError(f"PyTorch's pipeline was not done within {setting.patience:.0f} s") from None
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()
        if not said:
            raise UnfinishedError("PyTorch's pipeline ended without a result: its ranks' errors stand above")
    return Row(tuple(json.loads(said)["step_seconds"]), _passed(network))


def by_orion(setting: Setting, out: Path, *, kernel: bool) -> Row:
    """The stand-in swarm of one replica per stage. Raises `LinksError`."""
    if not kernel:
        places = [Place(host="127.0.0.1", port=port, link=setting.link) for port in free_ports(setting.stages)]
        return _swarm(setting, out, places, [[] for _ in places])
    with Network(setting.stages, setting.link) as network:
        places = [Place(host=host, port=PORT) for host in network.hosts]
        row = _swarm(setting, out, places, [network.enter(node) for node in range(setting.stages)])
    return Row(row.step_seconds, row.extra | _passed(network))


def _swarm(setting: Setting, out: Path, places: list[Place], enter: Sequence[Sequence[str]]) -> Row:
    batch, sequence, width = setting.boundary
    spec = Spec(
        stages=setting.stages,
        replicas=1,
        forward=[setting.forward] * setting.stages,
        backward=[setting.backward] * setting.stages,
        accumulation=setting.microbatches,
        boundary=Boundary(batch=batch, sequence=sequence, width=width),
        nodes=places,
        steps=Steps(warm_up=WARM_UP, microbatches=setting.microbatches, count=setting.steps),
    )
    groups = [[node] for node in range(setting.stages)]
    found = asyncio.run(run(spec, out, groups, patience=setting.patience, enter=enter))
    nodes = [node for each in found for node in each.nodes.values()]
    refused = sum(route["refused"] for node in nodes for route in node.routes.values())
    failed = sum(route["failed"] for node in nodes for route in node.routes.values())
    head = found[0].nodes[0]
    return Row(
        tuple(round(value, 4) for value in head.step_seconds),
        {
            "depth": head.depth,
            "warm_up_seconds": round(head.warm_up_seconds, 3),
            "calls_refused": refused,
            "calls_failed": failed,
            "outputs_chased": sum(node.counts.chased for node in nodes),
            "cpu_seconds": round(sum(each.cpu_seconds for each in found), 1),
        },
    )


def _passed(network: Network) -> dict[str, object]:
    """What the switch says about itself."""
    return {} if network.passed is None else {"switch": asdict(network.passed)}


def measure(setting: Setting, out: Path, *, kernel: bool) -> dict[str, object]:
    """All rows, their ratios, and what they are to be compared with."""
    line = setting.line
    rows: dict[str, Row] = {}
    why: dict[str, object] = {}
    if kernel:
        for name in ("one_f_one_b", "orion"):
            try:
                rows[name] = by_pytorch(setting) if name == "one_f_one_b" else by_orion(setting, out, kernel=True)
            except (LinksError, UnfinishedError) as error:
                why[name] = {"not_measured": str(error)}
    rows["orion_shaper"] = by_orion(setting, out, kernel=False)

    def ratio(over: str, under: str) -> float | None:
        return round(rows[over].seconds / rows[under].seconds, 3) if over in rows and under in rows else None

    return {
        "setting": {
            "stages": setting.stages,
            "microbatches": setting.microbatches,
            "forward_seconds": setting.forward,
            "backward_seconds": setting.backward,
            "boundary_bytes": setting.bytes,
            "bits_per_second": setting.link.up_bps,
            "latency_seconds": setting.link.latency_s,
            "congestion_control": CONGESTION,
            "queue_seconds": QUEUE_S,
        },
        **{name: row.figures for name, row in rows.items()},
        **why,
        "least_seconds": {"one_f_one_b": round(one_f_one_b(line), 3), "orion": round(deep(line), 3)},
        "ratio_1f1b_over_ours": ratio("one_f_one_b", "orion"),
        "kernel_over_shaper": ratio("orion", "orion_shaper"),
        "least_over_ours": round(deep(line) / rows["orion_shaper"].seconds, 3),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.schedule", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--quick", action="store_true", help="Orion alone, 4 stages, on links of this process")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    figures = measure(QUICK if options.quick else FULL, options.out, kernel=not options.quick)
    report("schedule", options.out, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
