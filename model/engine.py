"""The compute of one replica: forwards, backwards and optimizer steps of a stage, kept apart from any
network.

A unit (one microbatch) is known by a key. `forward` keeps its input until `backward` brings the gradient of
its output. With `Recompute.FULL` the graph is rebuilt then; else it is held, as long as the weights it
was made with are still in place: after a step a kept graph would mix old activations with new weights and
silently corrupt gradients, so each step drops all graphs and later backwards recompute at the current
weights. Kept, selective (`recompute.py`) and rebuilt graphs give the same bits. Everything is synchronous and
tied to no thread; callers serialise their calls.

What finds no memory is done again with less of it (`relief.py`). autograd adds a unit's gradients to the accumulated
ones parameter by parameter, each whole or not at all, so a backward that died midway is made again for the parameters
that had not got theirs: the sum is that of a run which never was short.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from model.layout import Layout
from model.optimizer import (
    Kind,
    OptimizerConfig,
    build_optimizer,
    clip_bound,
    clip_gradients,
    learning_rate,
    takes_muon,
)
from model.recompute import Recompute, runner
from model.relief import Holding, Relief, brief, out_of_memory, release
from model.split import StagePlan
from model.stage import Stage, assign_flat, on_host

T = TypeVar("T")


class EngineError(RuntimeError):
    """A call that the engine refuses; nothing has changed."""


class CapacityError(EngineError):
    """The cache of open units is full."""


class UnknownUnitError(EngineError):
    """No open unit has this key."""


class DuplicateUnitError(EngineError):
    """A unit with this key is open already."""


class NonFiniteError(EngineError):
    """A loss that is not a finite number; no gradient of the unit was kept."""


class StateError(EngineError):
    """A saved state that does not fit this stage and optimizer."""


class OutOfRoomError(EngineError):
    """No memory is left on the device, and nothing that could be given up. The engine is of no use any more: what was
    being added to weights or gradients may be there in part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step: the weight version after it, its rate, the gradient's norm before clipping, what was
    done."""

    version: int
    lr: float
    grad_norm: float
    clipped: bool
    finite: bool


@dataclass(slots=True)
class _Unit:
    """An open unit: its input and, where its graph is held, the graph's leaf and output until the next step."""

    x: Tensor
    tokens: Tensor | None
    """Of the unit, where the stage restores them."""
    leaf: Tensor | None = None
    y: Tensor | None = None


class StageEngine:
    """Trains one stage. `accumulation` units make one step; at most `capacity` units are open at a time.

    `graphs` bounds those whose graph is held at a time; the others are recomputed, as with `Recompute.FULL`. A graph is
    held only if its backward is due before the next step, which would drop it: backwards come about in the order of the
    forwards. A stage that recomputes rebuilds its graphs as selective ones, so that a whole one never needs room.
    `compiled` is for CUDA devices, see `recompute.runner`.
    """

    def __init__(
        self,
        stage: Stage,
        optimizer_config: OptimizerConfig,
        plan: StagePlan,
        *,
        n_total_params: int,
        accumulation: int,
        recompute: Recompute,
        capacity: int,
        graphs: int | None = None,
        compiled: bool = False,
    ) -> None:
        if accumulation < 1 or capacity < 1:
            raise EngineError(
                f"accumulation is {accumulation} and capacity {capacity}; both must be at least 1: raise them"
            )
        self.stage = stage
        self.plan = plan
        self.layout = Layout.of(stage, optimizer_config.kind)
        self.accumulation = accumulation
        self.capacity = capacity
        held = 0 if recompute is Recompute.FULL else capacity if graphs is None else graphs
        self.holding = Holding(recompute, held)
        """What is held of open units now."""
        self.relieved: Callable[[Relief], None] = _unheard
        """Told, on the thread that computes, of each step down for want of memory."""
        self._compiled = compiled
        stage.run_block = runner(recompute, compiled=compiled)
        self._version = 0
        self._steps = 0
        self._used = False
        self._units: dict[Hashable, _Unit] = {}
        self._accumulated = 0
        self._parameters = tuple(stage.parameters())
        self._config = optimizer_config
        self._optimizer = build_optimizer(optimizer_config, stage, plan)
        self._clip = clip_bound(optimizer_config, sum(p.numel() for p in stage.parameters()), n_total_params)

    @property
    def device(self) -> torch.device:
        """Where the stage is, and with it inputs, gradients and results."""
        return self.stage.device

    @property
    def version(self) -> int:
        """Names the weights that the next unit will use: one more after each step, and after each replacement of
        weights that a unit was computed with."""
        return self._version

    @property
    def steps(self) -> int:
        """Optimizer steps done; what the learning rate is a function of."""
        return self._steps

    @property
    def units_accumulated(self) -> int:
        """Units whose gradients the next step will apply."""
        return self._accumulated

    def pending(self) -> tuple[Hashable, ...]:
        """Keys of the open units, oldest first."""
        return tuple(self._units)

    def forward(self, key: Hashable, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Runs the stage on `x`, remembers the unit and returns the detached boundary tensor (B, T, width).

        `tokens`, int64 (B, T), are the unit's, where the stage restores them.

        Raises `CapacityError`, `DuplicateUnitError`, or `StageInputError` for an input that does not fit.
        """
        if self.plan.is_last:
            raise EngineError(f"stage {self.plan.index} is the last and sends nothing on: call tail, not forward")
        if key in self._units:
            raise DuplicateUnitError(f"unit {key} is open already: wait for its backward or drop it")
        if len(self._units) >= self.capacity:
            raise CapacityError(
                f"{len(self._units)} units are open and capacity is {self.capacity}: "
                "wait for a backward or raise capacity"
            )
        self._used = True

        def work() -> tuple[_Unit, Tensor]:
            if not self._holds():
                return _Unit(x, tokens), replay_forward(self.stage, x, tokens)
            leaf = _leaf(x)
            y: Tensor = self.stage(leaf, tokens)
            return _Unit(x, tokens, leaf, y), y.detach()

        self._units[key], out = self.with_room(work)
        return out

    def backward(self, key: Hashable, g: Tensor) -> Tensor | None:
        """Adds the unit's weight gradients, given the gradient `g` of its output, and closes the unit.

        Returns the gradient of its input (B, T, width), or None at the first stage. Raises
        `UnknownUnitError`, or `EngineError` when `g` has another shape or dtype than the output; the unit
        stays open in both cases.
        """
        unit = self._units.get(key)
        if unit is None:
            raise UnknownUnitError(
                f"unit {key} is not open here: it was never forwarded, or is already done or dropped"
            )
        shape = (*unit.x.shape[:2], self.stage.config.boundary_width)
        if g.shape != shape or g.dtype != self.stage.dtype:
            raise EngineError(
                f"gradient of unit {key} is {g.dtype} {tuple(g.shape)}; {self.stage.dtype} {shape} is needed"
            )

        def graph() -> tuple[Tensor, Tensor]:
            leaf, y = unit.leaf, unit.y
            unit.leaf = unit.y = None  # a graph is walked once: a second try makes another
            if leaf is None or y is None:
                leaf = _leaf(unit.x)
                y = self.stage(leaf, unit.tokens)
            return leaf, y

        dx = self._accumulate(graph, g)
        del self._units[key]
        return dx

    def tail(
        self, key: Hashable, x: Tensor, targets: Tensor, tokens: Tensor | None = None
    ) -> tuple[float, Tensor | None]:
        """Forward, loss and backward of a unit at the last stage: (mean loss in nats per token, gradient of
        `x`).

        The gradient is that of loss / accumulation, so that a step sees the mean over its units; it is None
        for a solo stage. Raises `NonFiniteError` before any gradient is kept.
        """
        value = math.nan

        def graph() -> tuple[Tensor, Tensor]:
            nonlocal value
            loss, leaf = _tail_forward(self.stage, x, targets, tokens)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteError(f"loss of unit {key} is {value}: drop the unit and check its input")
            return leaf, loss / self.accumulation

        dx = self._accumulate(graph, None)
        return value, dx

    def drop(self, key: Hashable) -> None:
        """Forgets an open unit. Raises `UnknownUnitError`."""
        if self._units.pop(key, None) is None:
            raise UnknownUnitError(
                f"unit {key} is not open here: it was never forwarded, or is already done or dropped"
            )

    def step(self) -> StepReport:
        """Clips, applies the accumulated gradients and drops them, along with all kept graphs.

        Gradients that are not finite are dropped, the weights stay and get another version, so that no later step is
        taken for theirs, and the report says so.
        Raises `EngineError` when nothing is accumulated.
        """
        if self._accumulated == 0:
            raise EngineError("no unit has been accumulated since the last step: run a backward first")
        gradients = [p.grad for p in self.stage.parameters() if p.grad is not None]
        norm, clipped = clip_gradients(gradients, self._clip)
        lr = learning_rate(self._config, self._steps)
        if not math.isfinite(norm):
            self.discard_gradients()
            self._version += 1
            self._used = False
            return StepReport(version=self._version, lr=lr, grad_norm=norm, clipped=False, finite=False)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._drop_graphs()  # they end with these weights, and what the step computes with needs their room
        try:
            self._optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise self.spent(brief(error)) from None
        self.discard_gradients()
        self._steps += 1
        self._version += 1
        self._used = False
        return StepReport(version=self._version, lr=lr, grad_norm=norm, clipped=clipped, finite=True)

    def discard_gradients(self) -> None:
        """Forgets the gradients accumulated since the last step."""
        self._optimizer.zero_grad(set_to_none=True)
        self._accumulated = 0

    def replace_weights(self, flat: Tensor) -> int:
        """Takes over weights from outside (a merge) at a step boundary; `flat` is fp32 (n,) as `flatten` gives.

        Kept graphs no longer belong to the weights and go. Returns the version that names the new ones. Raises
        `EngineError` while gradients are accumulated: they belong to the old weights.
        """
        if self._accumulated:
            raise EngineError(
                f"{self._accumulated} units are accumulated: weights are replaced between steps, step or discard first"
            )
        assign_flat(self.stage, flat)
        self._drop_graphs()
        self._version += self._used
        self._used = False
        return self._version

    def with_room(self, work: Callable[[], T]) -> T:
        """What `work` returns; where it finds no memory the engine gives up some of what it holds, and `work` runs
        again from its start. Raises `OutOfRoomError` once there is nothing to give up."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = brief(error)
            self._step_down(reason)  # out here: the error's traceback holds what was computed so far

    def state(self) -> dict[str, Tensor]:
        """Weights, optimizer state, version and steps as named tensors in host memory, which the engine shares if it
        computes there."""
        tensors = {"version": torch.tensor(self._version), "steps": torch.tensor(self._steps)}
        for name, parameter in self.stage.named_parameters():
            tensors[f"weights.{name}"] = parameter.detach().cpu()
            for field, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{field}"] = value.cpu()
        return tensors

    def moments(self) -> Tensor:
        """The optimizer's moments as one fp32 vector in the order of `layout`: first moments of all weights in order of
        name, then second moments of those that have one; a copy in host memory, zeros before the first step."""
        named, state = dict(self.stage.named_parameters()), self._optimizer.state
        return on_host(
            state[named[place.name]][moment] if named[place.name] in state else torch.zeros(len(place.span))
            for moment in _MOMENTS
            for place in self.layout.places
            if moment == "exp_avg" or place.adaptive
        )

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over a state made by `state` on the same stage and optimizer; open units and gradients are
        dropped.

        Raises `StateError` naming the first tensor that is missing, surplus or of another shape; then
        nothing changed.
        """
        rest = dict(tensors)
        weights: dict[str, Tensor] = {}
        optimizer: dict[str, dict[str, Tensor]] = {}
        version = int(_take(rest, "version", torch.Size(())))
        steps = int(_take(rest, "steps", torch.Size(())))
        for name, parameter in self.stage.named_parameters():
            fields = _fields(self._config.kind, name, parameter) if steps else ()
            weights[name] = _take(rest, f"weights.{name}", parameter.shape)
            optimizer[name] = {
                field: _take(
                    rest,
                    f"optimizer.{name}.{field}",
                    parameter.shape if field in _MOMENTS else torch.Size(()),
                )
                for field in fields
            }
        if rest:
            raise StateError(f"state holds '{min(rest)}', which stage {self.plan.index} lacks: load its own checkpoint")
        self.stage.load_state_dict(weights)
        self._optimizer.state.clear()
        for name, parameter in self.stage.named_parameters():
            if optimizer[name]:
                self._optimizer.state[parameter] = {
                    field: value.to(parameter.device if field in _MOMENTS else "cpu", copy=True)
                    for field, value in optimizer[name].items()
                }
        self._version = version
        self._steps = steps
        self._used = False
        self._units.clear()
        self.discard_gradients()

    def _holds(self) -> bool:
        """Whether the next unit's graph is held."""
        due = len(self._units) < self.accumulation - self._accumulated
        return due and sum(unit.y is not None for unit in self._units.values()) < self.holding.graphs

    def _drop_graphs(self) -> None:
        for unit in self._units.values():
            unit.leaf = unit.y = None

    def _accumulate(self, graph: Callable[[], tuple[Tensor, Tensor]], g: Tensor | None) -> Tensor | None:
        """Adds one unit's weight gradients to the accumulated ones; returns the gradient of its input.

        Args:
            graph: makes (leaf, result); called once for each try.
            g: gradient of the result, None for 1.
        """
        before = [_mark(p) for p in self._parameters]

        def work() -> Tensor | None:
            leaf, y = graph()
            self._used = True
            left = [p for p, mark in zip(self._parameters, before, strict=True) if _mark(p) == mark]
            if len(left) == len(before):
                torch.autograd.backward(y, g)
            elif wanted := left + [leaf] * leaf.requires_grad:
                torch.autograd.backward(y, g, inputs=wanted)
            return leaf.grad

        dx = self.with_room(work)
        self._accumulated += 1
        return dx

    def _step_down(self, reason: str) -> None:
        """Hold less from now on, and nothing of what is held now. Raises `OutOfRoomError`."""
        before, after = self.holding, self.holding.lower()
        if after is None:
            raise self.spent(reason)
        self.holding = after
        self.stage.run_block = runner(after.recompute, compiled=self._compiled)
        self._drop_graphs()
        release(self.device)
        self.relieved(Relief(str(self.device), before, after, reason))

    def spent(self, reason: str) -> OutOfRoomError:
        """What ends a stage that can give up nothing more."""
        where = "machine" if self.device.type == "cpu" else "card"
        return OutOfRoomError(
            f"stage {self.plan.index} is out of memory on {self.device} and has nothing left to give up "
            f"({self.holding}; {reason}): stop other programs there, take a {where} with more memory, or join a run "
            "with more stages"
        )


def _mark(parameter: Tensor) -> int | None:
    """Differs before and after a gradient is added, which autograd does in place where there is one already."""
    return None if parameter.grad is None else parameter.grad._version


def _unheard(_relief: Relief) -> None:
    """Nobody listens."""


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _fields(kind: Kind, name: str, parameter: Tensor) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter."""
    if takes_muon(kind, name, parameter):
        return ("exp_avg",)
    return ("step", "mu_product", *_MOMENTS) if kind == "nadam" else ("step", *_MOMENTS)


def replay_forward(stage: Stage, x: Tensor, tokens: Tensor | None = None) -> Tensor:
    """What an honest `StageEngine.forward` returns for `x` with these weights; for auditors."""
    with torch.no_grad():
        y: Tensor = stage(x, tokens)
    return y


def replay_backward(stage: Stage, x: Tensor, g: Tensor, tokens: Tensor | None = None) -> Tensor | None:
    """What an honest `StageEngine.backward` returns for (`x`, `g`); leaves no gradients in the stage."""
    dx = _backward(stage, x, g, tokens)
    stage.zero_grad(set_to_none=True)
    return dx


def replay_tail(
    stage: Stage, x: Tensor, targets: Tensor, tokens: Tensor | None = None, *, accumulation: int
) -> tuple[float, Tensor | None]:
    """What an honest `StageEngine.tail` returns; leaves no gradients in the stage."""
    loss, dx = _tail_backward(stage, x, targets, tokens, accumulation)
    stage.zero_grad(set_to_none=True)
    return loss, dx


def replay_gradient(
    stage: Stage, units: Iterable[tuple[Tensor, Tensor, Tensor | None]], *, accumulation: int, clip: float
) -> tuple[Tensor, float]:
    """What an honest `StageEngine.step` gives its optimizer after the backwards of these units, in their order: the
    clipped gradient, fp32 (n,) in the order of `flatten`, and its norm before. Leaves no gradients in the stage.

    Args:
        units: input, gradient of the output (at the last stage targets) and, where the stage restores them, tokens.
        clip: the stage's bound, see `clip_bound`.
    """
    for x, target, tokens in units:
        if stage.plan.is_last:
            _tail_backward(stage, x, target, tokens, accumulation)
        else:
            _backward(stage, x, target, tokens)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in sorted(stage.named_parameters())]
    norm, _ = clip_gradients(gradients, clip)
    stage.zero_grad(set_to_none=True)
    return torch.cat([gradient.float().reshape(-1) for gradient in gradients]), norm


def _backward(stage: Stage, x: Tensor, g: Tensor, tokens: Tensor | None) -> Tensor | None:
    leaf = _leaf(x)
    torch.autograd.backward(stage(leaf, tokens), g)
    return leaf.grad


def _tail_backward(
    stage: Stage, x: Tensor, targets: Tensor, tokens: Tensor | None, accumulation: int
) -> tuple[float, Tensor | None]:
    loss, leaf = _tail_forward(stage, x, targets, tokens)
    torch.autograd.backward(loss / accumulation)
    return float(loss.detach()), leaf.grad


def _leaf(x: Tensor) -> Tensor:
    """`x` as the leaf of a new graph; tokens carry no gradient."""
    return x.detach().requires_grad_(x.is_floating_point())


def _tail_forward(stage: Stage, x: Tensor, targets: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    leaf = _leaf(x)
    return stage.loss(leaf, targets, tokens), leaf


def _take(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise StateError(f"state lacks '{name}': load a complete checkpoint of this stage")
    if tensor.shape != shape:
        raise StateError(f"state has '{name}' of shape {tuple(tensor.shape)}; this stage needs {tuple(shape)}")
    return tensor
