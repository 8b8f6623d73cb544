"""One stage of PyTorch's own pipeline: `torch.distributed.pipelining` 1F1B over gloo, its compute held, not done.

    python -m scripts.bench.pipelining SPEC RANK

SPEC is a `Spec` as JSON. Every rank is a process, on a machine or in a network namespace of its own. The first prints
as JSON how long each step took, from its start to the end of the last backward at the first stage. Nothing here is
Orion's: forward and backward hold their thread for set times, boundary tensors and all messages are PyTorch's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Spec:
    """A pipeline and its run."""

    hosts: tuple[str, ...]
    """Address per stage."""
    port: int
    """Where the first one keeps the meeting place."""
    interface: str
    """Network interface that gloo uses."""
    forward: float
    """Seconds."""
    backward: float
    boundary: tuple[int, int, int]
    """(microbatch, sequence, width) of what crosses, in bf16."""
    microbatches: int
    steps: int
    """Those that count."""
    warm_up: int
    """Those that go before."""


class _Held(torch.autograd.Function):
    """Takes its time in each direction and returns tensors of the right shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, spec: Spec) -> Tensor:  # noqa: ANN401
        ctx.spec = spec
        ctx.save_for_backward(x, anchor)
        time.sleep(spec.forward)
        return torch.zeros(spec.boundary, dtype=DTYPE)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        x, anchor = ctx.saved_tensors
        time.sleep(ctx.spec.backward)
        return torch.zeros_like(x), torch.zeros_like(anchor), None


class HeldStage(nn.Module):
    """A stage that computes nothing for as long as a real one would compute."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self._spec = spec

    def forward(self, x: Tensor) -> Tensor:
        """(microbatch, sequence, width), or tokens (microbatch, sequence), to (microbatch, sequence, width)."""
        out: Tensor = _Held.apply(x, self.anchor, self._spec)  # type: ignore[no-untyped-call]
        return out


def loss_of(output: Tensor, _target: Tensor) -> Tensor:
    """A scalar whose gradient costs next to nothing."""
    return output.view(-1)[0].float()


def run(spec: Spec, rank: int) -> list[float]:
    """Seconds per step at this rank."""
    stages, first, last = len(spec.hosts), rank == 0, rank == len(spec.hosts) - 1
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = spec.interface
    dist.init_process_group("gloo", init_method=f"tcp://{spec.hosts[0]}:{spec.port}", rank=rank, world_size=stages)
    stage = PipelineStage(HeldStage(spec), rank, stages, torch.device("cpu"))
    schedule = Schedule1F1B(stage, spec.microbatches, loss_fn=loss_of)
    rows = spec.microbatches * spec.boundary[0]
    tokens = torch.zeros((rows, spec.boundary[1]), dtype=torch.int64)
    target = torch.zeros(rows)
    seconds = []
    for _ in range(spec.warm_up + spec.steps):
        dist.barrier()
        start = time.monotonic()
        if first:
            schedule.step(tokens)
        elif last:
            schedule.step(target=target)
        else:
            schedule.step()
        seconds.append(time.monotonic() - start)
    dist.destroy_process_group()
    return seconds[spec.warm_up :]


def main() -> int:
    spec, rank = json.loads(sys.argv[1]), int(sys.argv[2])
    seconds = run(Spec(**{**spec, "hosts": tuple(spec["hosts"]), "boundary": tuple(spec["boundary"])}), rank)
    if rank == 0:
        print(json.dumps({"step_seconds": [round(value, 4) for value in seconds]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
