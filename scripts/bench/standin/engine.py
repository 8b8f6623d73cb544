"""The stand-in for a stage's arithmetic: it holds the compute thread, as a GPU would, and computes nothing.

The real `StageEngine` runs on a `Stage` whose forward and backward wait for set times and give boundary tensors of the
manifest's shape. Underneath lies one layer of a few dozen weights, so windows, states and optimizer steps are real. A
wait releases the GIL: whatever else the process does goes on meanwhile, as beside a GPU.

What comes out is drawn, not computed, and new each time: a receiver refuses a tensor that it has had for another
sample. It is in the wire's dtype, as what comes off a device is: casts are a device's work.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.engine import StageEngine, StepReport
from model.optimizer import OptimizerConfig
from model.recompute import Recompute
from model.split import StagePlan
from model.stage import Stage
from subnet.transport.memory import POOLED, Memory
from subnet.transport.synapse import tensor_bytes

MARKS = 8
"""Elements of a tensor that are drawn anew each time, its first ones."""
GRADIENT = 1e-3
"""Of every weight that has one."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds for which one stage's compute is held."""

    forward: float
    backward: float
    step: float


class Hold:
    """Waits in place of a device, and knows how long it was asked to and did. `end` makes every wait end at once."""

    def __init__(self) -> None:
        self.asked = 0.0
        self.took = 0.0
        self._ended = threading.Event()

    def __call__(self, seconds: float) -> None:
        if seconds <= 0:
            return
        start = time.monotonic()
        self._ended.wait(seconds)
        self.asked += seconds
        self.took += time.monotonic() - start

    def end(self) -> None:
        self._ended.set()


class Copies(Memory):
    """Pages that hold a drawing from their first use on. Off a device it would come without the processor's help."""

    def __init__(self, drawing: Tensor) -> None:
        super().__init__()
        self._bytes = tensor_bytes(drawing)

    def _new(self, room: int) -> npt.NDArray[np.uint8]:
        pages = super()._new(room)
        pages[: self._bytes.nbytes] = self._bytes
        return pages


class StandInStage(Stage):
    """A stage by interface. Without a graph `forward` takes its time; with one it is the recompute of a backward, whose
    time is the backward's own."""

    def __init__(self, config: ModelConfig, plan: StagePlan, times: Times, hold: Hold, *, seed: str) -> None:
        """`config` says what crosses the boundaries; `seed` is unlike that of every other stage that ever runs."""
        small = replace(
            config,
            vocab=2,
            hidden=2,
            layers=plan.count,
            heads=1,
            kv_heads=1,
            boundary=BoundaryConfig(form=BoundaryForm.A, width=1),
        )
        super().__init__(small, replace(plan, first_layer=plan.index, last_layer=plan.index + 1))
        for parameter in self.parameters():
            torch.nn.init.ones_(parameter)
        self.config = config
        self.times = times
        self.hold = hold
        draw = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little")
        self._generator = torch.Generator().manual_seed(draw)
        self._drawing = torch.empty(0)
        self._copies = Copies(self._drawing)

    @property
    def dtype(self) -> torch.dtype:
        """Of what crosses its boundaries."""
        return torch.bfloat16

    @property
    def anchor(self) -> Tensor:
        """The weight through which graphs of this stage lead."""
        return next(self.parameters())

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:  # noqa: ARG002 - what a stage takes
        """(B, T) tokens or (B, T, width) to (B, T, width)."""
        self.check_input(x)
        if not torch.is_grad_enabled():
            self.hold(self.times.forward)
            return self.drawn(x)
        out: Tensor = _Boundary.apply(x, self.anchor, self)  # type: ignore[no-untyped-call]
        return out

    def loss(self, x: Tensor, targets: Tensor, tokens: Tensor | None = None) -> Tensor:  # noqa: ARG002 - as above
        """A scalar; its backward takes the stage's backward time."""
        self.check_input(x)
        self.hold(self.times.forward)
        out: Tensor = _Loss.apply(x, self.anchor, self)  # type: ignore[no-untyped-call]
        return out

    def drawn(self, x: Tensor) -> Tensor:
        """What leaves the stage for an input `x`: bf16 (B, T, width)."""
        drawing = self.like(x)
        if drawing.nbytes < POOLED:
            out = drawing.clone()
        else:
            out = torch.frombuffer(self._copies.take(drawing.nbytes), dtype=self.dtype).view(drawing.shape)
        out.view(-1)[:MARKS] = torch.randn(min(MARKS, out.numel()), generator=self._generator)
        return out

    def like(self, x: Tensor) -> Tensor:
        """The same for what nobody looks at."""
        shape = (*x.shape[:2], self.config.boundary_width)
        if self._drawing.shape != shape:
            self._drawing = torch.randn(shape, generator=self._generator).to(self.dtype)
            self._copies = Copies(self._drawing)
        return self._drawing.detach()

    def returned(self, x: Tensor, *, wanted: bool) -> tuple[Tensor | None, Tensor]:
        """After the backward's time: gradients of `x`, if there is one, and of the anchor."""
        self.hold(self.times.backward)
        return self.drawn(x) if wanted else None, torch.full_like(self.anchor, GRADIENT)


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, stage: StandInStage) -> Tensor:  # noqa: ANN401, ARG004
        ctx.stage = stage
        ctx.save_for_backward(x)
        return stage.like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:  # noqa: ANN401, ARG004
        (x,) = ctx.saved_tensors
        dx, anchor = ctx.stage.returned(x, wanted=ctx.needs_input_grad[0])
        return dx, anchor, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, stage: StandInStage) -> Tensor:  # noqa: ANN401, ARG004
        ctx.stage = stage
        ctx.save_for_backward(x)
        return torch.ones(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:  # noqa: ANN401, ARG004
        (x,) = ctx.saved_tensors
        dx, anchor = ctx.stage.returned(x, wanted=ctx.needs_input_grad[0])
        return dx, anchor, None


class StandInEngine(StageEngine):
    """The real engine over a stand-in stage; its optimizer step takes its time too."""

    def __init__(
        self, stage: StandInStage, optimizer: OptimizerConfig, plan: StagePlan, *, accumulation: int, capacity: int
    ) -> None:
        super().__init__(
            stage,
            optimizer,
            plan,
            n_total_params=plan.count * sum(p.numel() for p in stage.parameters()),
            accumulation=accumulation,
            recompute=Recompute.FULL,
            capacity=capacity,
        )
        self._held = stage

    def step(self) -> StepReport:
        self._held.hold(self._held.times.step)
        return super().step()
