"""One unit as a cheater computes it: pure functions of a stage, an input and chance. No network, no ledger.

`honest` is what the unit should be; `falsify` what an adversary sends in its place. A result names everything that
follows from a unit: what is sent on, the loss it reports, and what it adds to its step. Every falsifier keeps the
shapes, so the ledger of who sends it is sound and only a replay can tell. `subnet.trust.audit.replay` takes
(x, g, result.output in the wire's dtype) as `UnitTensors` and `result.loss` in the leaf.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.stage import Stage
from subnet.trust.ledger import Direction
from tests.adversaries.kinds import PROFILES, AdversaryError, Kind

Weights = Mapping[str, Tensor]
"""By parameter name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What a replica is handed. x: tokens int64 (B, T) at the head, else fp32 (B, T, width)."""

    direction: Direction
    x: Tensor
    g: Tensor | None = None
    """Gradient of its output, fp32 (B, T, width); None for a forward and at the tail."""
    targets: Tensor | None = None
    """At the tail, int64 (B, T)."""
    restored: Tensor | None = None
    """Its tokens, int64 (B, T), where the stage restores them."""
    accumulation: int = 1
    """Units of a step: the tail's gradient is that of its loss over so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What comes of a unit."""

    output: Tensor | None
    """y or dx, fp32 (B, T, width); None for the head's backward."""
    loss: float = 0.0
    """At the tail, nats per token."""
    gradients: Weights = field(default_factory=dict)
    """What a backward adds to its step; none for a forward, and none where it was not computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What a cheater has besides its unit. Without what its kind needs it is honest until it has some."""

    weights: Weights | None = None
    """Of an earlier window (stale-weights)."""
    output: Tensor | None = None
    """What it sent for an earlier unit of the same direction (replay)."""
    loss: float = 0.0
    """Of that unit."""
    sibling: Tensor | None = None
    """What a sibling sent for a unit of the same direction (copycat)."""
    sibling_loss: float = 0.0
    tokens: Tensor | None = None
    """Of another sample, int64 (B, T) (wrong-data)."""


NOTHING = Past()


def honest(stage: Stage, unit: Unit) -> Result:
    """The unit as a `StageEngine` computes it, to the bit. Leaves no gradients in the stage."""
    return _compute(stage, dict(stage.named_parameters()), unit)


def falsify(
    kind: Kind, stage: Stage, unit: Unit, *, strength: float, generator: torch.Generator, past: Past = NOTHING
) -> Result:
    """What an adversary of `kind` makes of the unit. Leaves no gradients in the stage.

    `strength` is what `PROFILES[kind].unit` says. Raises `AdversaryError` for a kind that does not falsify units of
    this direction.
    """
    if unit.direction not in PROFILES[kind].falsifies:
        raise AdversaryError(f"'{kind}' does not falsify {unit.direction.name.lower()} units")
    if kind is Kind.POISONED_LOSS and unit.targets is None:
        raise AdversaryError(f"stage {stage.plan.index} reports no loss: only a tail can poison it")
    if kind in DISTORTIONS:
        return distort(kind, honest(stage, unit), strength=strength, generator=generator)
    return _SUBSTITUTES[kind](stage, unit, _Cheat(strength, generator, past))


def distort(kind: Kind, true: Result, *, strength: float, generator: torch.Generator) -> Result:
    """What a kind of `DISTORTIONS` says in place of what it has computed. What that adds to its step stays honest."""
    return DISTORTIONS[kind](true, strength, generator)


@dataclass(frozen=True, slots=True)
class _Cheat:
    strength: float
    generator: torch.Generator
    past: Past


def _compute(stage: nn.Module, weights: Weights, unit: Unit) -> Result:
    """The unit with these weights in the place of the stage's."""
    if unit.direction is Direction.FORWARD:
        with torch.no_grad():
            return Result(output=functional_call(stage, dict(weights), (unit.x, unit.restored)))
    x = unit.x.detach().requires_grad_(unit.x.is_floating_point())
    if unit.targets is None:
        y: Tensor = functional_call(stage, dict(weights), (x, unit.restored))
        loss, g = 0.0, unit.g
    else:
        mean: Tensor = functional_call(_Loss(stage), _under("stage", weights), (x, unit.targets, unit.restored))
        loss, y, g = float(mean.detach()), mean / unit.accumulation, None
    wanted = [*weights.values(), *([x] if x.requires_grad else [])]
    found = torch.autograd.grad(y, wanted, g, allow_unused=True)
    gradients = {name: grad for name, grad in zip(weights, found, strict=False) if grad is not None}
    return Result(output=found[-1] if x.requires_grad else None, loss=loss, gradients=gradients)


class _Loss(nn.Module):
    """A tail's loss as a module's forward, which is what `functional_call` calls."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor, targets: Tensor, tokens: Tensor | None) -> Tensor:
        loss: Tensor = self.stage.loss(x, targets, tokens)  # type: ignore[operator]
        return loss


def _under(name: str, weights: Weights) -> dict[str, Tensor]:
    return {f"{name}.{key}": weight for key, weight in weights.items()}


def _noise(true: Result, strength: float, generator: torch.Generator) -> Result:
    """Per token a random direction, as long as `strength` times the result."""
    if true.output is None:
        return true
    noise = torch.randn(true.output.shape, generator=generator).to(true.output)
    noise *= strength * true.output.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return replace(true, output=true.output + noise)


def _scaled(true: Result, factor: float) -> Result:
    return true if true.output is None else replace(true, output=true.output * factor)


DISTORTIONS: Mapping[Kind, Callable[[Result, float, torch.Generator], Result]] = MappingProxyType(
    {
        Kind.NOISE: _noise,
        Kind.SIGN_FLIP: lambda true, _, __: _scaled(true, -1.0),
        Kind.SCALED_GRADIENT: lambda true, factor, _: _scaled(true, factor),
        Kind.POISONED_LOSS: lambda true, factor, _: replace(true, loss=true.loss * factor),
    }
)
"""Kinds that compute what they should and say something else."""


def _zero_gradient(stage: Stage, unit: Unit, _: _Cheat) -> Result:
    """Zeros are sent, nothing is added to its step; a tail computes its loss."""
    output = torch.zeros_like(unit.x) if unit.x.is_floating_point() else None
    return Result(output=output, loss=_loss(stage, unit))


def _no_backward(stage: Stage, unit: Unit, cheat: _Cheat) -> Result:
    """The gradient that came in is sent on, nothing is added to its step.

    A tail has none that came in: it computes its loss and sends a random direction of about the usual length, that of
    the gradient of a mean over all tokens.
    """
    if not unit.x.is_floating_point():
        return Result(output=None, loss=_loss(stage, unit))
    if unit.g is not None:
        return Result(output=unit.g.clone())
    random = torch.randn(unit.x.shape, generator=cheat.generator).to(unit.x)
    random *= 1.0 / (unit.accumulation * unit.x.shape[0] * unit.x.shape[1]) / random.norm(dim=-1, keepdim=True)
    return Result(output=random, loss=_loss(stage, unit))


def _loss(stage: Stage, unit: Unit) -> float:
    if unit.targets is None:
        return 0.0
    with torch.no_grad():
        return float(stage.loss(unit.x, unit.targets, unit.restored))


def _skipped_layer(stage: Stage, unit: Unit, _: _Cheat) -> Result:
    """The unit without the stage's last layer. Raises `AdversaryError` where there is one only."""
    kept = list(stage.layers.items())[:-1]
    if not kept:
        raise AdversaryError(f"stage {stage.plan.index} has one layer and none to skip: give it more")
    thin = copy.copy(stage)
    thin._modules = {**stage._modules, "layers": nn.ModuleDict(dict(kept))}
    return _compute(thin, dict(thin.named_parameters()), unit)


def _low_precision(stage: Stage, unit: Unit, cheat: _Cheat) -> Result:
    """The unit with matrices of `strength` bits, each row with its own scale."""
    levels = 2 ** (round(cheat.strength) - 1) - 1

    def rounded(weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return weight
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / levels
        near: Tensor = (weight / scale).round() * scale
        return near

    weights = {name: rounded(p.detach()).requires_grad_() for name, p in stage.named_parameters()}
    return _compute(stage, weights, unit)


def _stale_weights(stage: Stage, unit: Unit, cheat: _Cheat) -> Result:
    """The unit with the weights of an earlier window."""
    if cheat.past.weights is None:
        return honest(stage, unit)
    return _compute(stage, {name: w.detach().requires_grad_() for name, w in cheat.past.weights.items()}, unit)


def _wrong_data(stage: Stage, unit: Unit, cheat: _Cheat) -> Result:
    """The head's unit with the tokens of another sample."""
    if unit.x.is_floating_point():
        raise AdversaryError(f"stage {stage.plan.index} is handed no tokens: only a head can train on wrong data")
    return honest(stage, unit if cheat.past.tokens is None else replace(unit, x=cheat.past.tokens))


def _replay(stage: Stage, unit: Unit, cheat: _Cheat) -> Result:
    """What an earlier unit gave; nothing is computed, nothing added to its step."""
    return _instead(stage, unit, cheat.past.output, cheat.past.loss)


def _copycat(stage: Stage, unit: Unit, cheat: _Cheat) -> Result:
    """What a unit of a sibling gave; nothing is computed, nothing added to its step."""
    return _instead(stage, unit, cheat.past.sibling, cheat.past.sibling_loss)


def _instead(stage: Stage, unit: Unit, output: Tensor | None, loss: float) -> Result:
    if unit.direction is Direction.BACKWARD and not unit.x.is_floating_point():
        return Result(output=None, loss=loss)
    return honest(stage, unit) if output is None else Result(output=output.clone(), loss=loss)


_SUBSTITUTES: Mapping[Kind, Callable[[Stage, Unit, _Cheat], Result]] = MappingProxyType(
    {
        Kind.ZERO_GRADIENT: _zero_gradient,
        Kind.SKIPPED_LAYER: _skipped_layer,
        Kind.LOW_PRECISION: _low_precision,
        Kind.STALE_WEIGHTS: _stale_weights,
        Kind.WRONG_DATA: _wrong_data,
        Kind.REPLAY: _replay,
        Kind.COPYCAT: _copycat,
        Kind.NO_BACKWARD: _no_backward,
    }
)
"""Kinds that compute something else, or nothing."""
