"""Inner and outer optimizers: what one local step and one merge do to the weights.

Inner: AdamW, NAdam whose first momentum grows towards the early stages, where gradients arrive latest
(the delay-tolerant choice of asynchronous pipelines), or Muon (`model.muon`). Their rate is a function of the
step alone. Outer: Nesterov SGD on the mean pseudo-gradient, as in DiLoCo (arXiv 2311.08105). Nothing here is
fused: the arithmetic of the outer step must be the same bits on every CPU and every GPU, because replicas and
auditors recompute it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from model.config import ConfigError
from model.muon import Muon
from model.split import StagePlan
from model.stage import Stage

Kind = Literal["adamw", "nadam", "muon"]
Schedule = Literal["constant", "wsd", "wsd-sqrt", "cosine"]

PROJECTIONS = 0.1
"""Measured for nano: boundaries of the whole width that begin as the identity end 200 steps 5 % above the loss of a
model without any if they move at the full rate; at this share of it form `t` ends 3 % lower than at the full rate."""
MOMENTUM_DECAY = 1.0
"""How fast NAdam's momentum comes to its full value: half of the way after 17 steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The inner optimizer of every stage.

    `clip` bounds the norm of the whole model's gradient (0 switches clipping off); a stage clips at its share of it,
    see `clip_bound`. Raises `ConfigError`.
    """

    kind: Kind = "adamw"
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    """The first is Muon's momentum too."""
    weight_decay: float = 0.1
    eps: float = 1e-8
    warmup_steps: int = 0
    """In which the rate rises from lr / warmup_steps to lr."""
    schedule: Schedule = "constant"
    """What the rate does after warm-up, see `learning_rate`."""
    steps: int = 0
    """After so many the rate has come down and stays there; `constant` has no use for it."""
    cooldown: float = 0.2
    """Share of `steps` in which `wsd` and `wsd-sqrt` come down."""
    floor: float = 0.0
    """Share of `lr` to which the rate comes down."""
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise ConfigError(f"optimizer.kind is '{self.kind}'; it must be one of {kinds}: change it")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"optimizer.lr is {self.lr}; it must be a finite number above 0: change optimizer.lr")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas are {self.betas}; both must be in [0, 1): change optimizer.betas")
        for name in ("weight_decay", "warmup_steps", "clip"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0: raise it")
        if not self.eps > 0:
            raise ConfigError(f"optimizer.eps is {self.eps}; it must be above 0: raise optimizer.eps")
        self._check_schedule()

    def _check_schedule(self) -> None:
        kinds = get_args(Schedule)
        if self.schedule not in kinds:
            raise ConfigError(
                f"optimizer.schedule is '{self.schedule}'; it must be one of {', '.join(kinds)}: change it"
            )
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"optimizer.floor is {self.floor}; it is a share of lr from 0 to 1: change it")
        if not 0 < self.cooldown <= 1:
            raise ConfigError(f"optimizer.cooldown is {self.cooldown}; it is a share of steps above 0 to 1: change it")
        if self.schedule == "constant":
            return
        stable = self.steps if self.schedule == "cosine" else self.steps * (1 - self.cooldown)
        if not self.warmup_steps <= stable or self.steps < 1:
            raise ConfigError(
                f"optimizer.steps is {self.steps}, of which schedule '{self.schedule}' leaves {stable:g} before it "
                f"comes down; warm-up takes {self.warmup_steps}: raise optimizer.steps or choose schedule 'constant'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterConfig:
    """The merge's Nesterov SGD. Raises `ConfigError`."""

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or not 0 <= self.momentum < 1:
            raise ConfigError(
                f"outer.lr is {self.lr} and outer.momentum {self.momentum}; "
                "lr must be above 0 and momentum in [0, 1): change them"
            )


def build_optimizer(config: OptimizerConfig, stage: Stage, plan: StagePlan) -> torch.optim.Optimizer:
    """The optimizer of a stage; each kind of parameter is a group. It goes through its parameters one by one, so a step
    takes room for one of them more and not, as torch's own choice on a card, for all."""
    kinds: dict[tuple[float, bool, float], list[Tensor]] = {}
    for name, p in stage.named_parameters():
        moved = takes_muon(config.kind, name, p)
        kinds.setdefault((decay_of(config, p), moved, muon_share(name) if moved else 1.0), []).append(p)
    betas = (first_momentum(config, plan), config.betas[1])
    if config.kind == "muon":
        marked = [
            {"params": ps, "weight_decay": decay, "matrices": moved, "share": share}
            for (decay, moved, share), ps in kinds.items()
        ]
        return Muon(marked, config.lr, betas, config.eps)
    groups = [{"params": ps, "weight_decay": decay} for (decay, *_), ps in kinds.items()]
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, config.lr, betas, config.eps, foreach=False, fused=False)
    return torch.optim.NAdam(
        groups,
        config.lr,
        betas,
        config.eps,
        momentum_decay=MOMENTUM_DECAY,
        decoupled_weight_decay=True,
        foreach=False,
    )


def takes_muon(kind: Kind, name: str, parameter: Tensor) -> bool:
    """Whether Muon moves this parameter of a stage: a matrix of a block or boundary that is no table of tokens."""
    inside = name.startswith(("layers.", "boundaries.")) and ".token" not in name
    return kind == "muon" and inside and parameter.dim() == 2


def muon_share(name: str) -> float:
    """By what share of the rate Muon moves a matrix: a boundary's projections turn the residual itself, and at the full
    rate they turn it faster than the stages behind them can follow."""
    return PROJECTIONS if name.startswith("boundaries.") else 1.0


def decay_of(config: OptimizerConfig, parameter: Tensor) -> float:
    """Weight decay acts on matrices only, never on norms."""
    return config.weight_decay if parameter.dim() > 1 else 0.0


def first_momentum(config: OptimizerConfig, plan: StagePlan) -> float:
    """β1 of a stage: betas[0] for AdamW and Muon; for NAdam rising to 1 - 0.1·(1 - betas[0]) towards the first
    stage.

    With betas[0] = 0.9 that is 0.9 + 0.09·(L - 1 - l)/L for stage l of L, the schedule that IOTA's miners
    use.
    """
    if config.kind != "nadam":
        return config.betas[0]
    return config.betas[0] + 0.9 * (1 - config.betas[0]) * (plan.count - 1 - plan.index) / plan.count


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of optimizer step `step` (from 0), the same on every machine.

    Linear over `warmup_steps`, then lr until it comes down to `floor`·lr, where it stays from step `steps` on:

        constant   never
        wsd        over the last `cooldown` of `steps`, linearly (Hägele et al. 2024, arXiv 2405.18392)
        wsd-sqrt   over the same steps by 1 - sqrt(their share that has passed), the form which that paper prefers
        cosine     over all steps after warm-up, by half a cosine (Loshchilov and Hutter, arXiv 1608.03983)
    """
    rate = config.lr * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else config.lr
    return rate * (1 - (1 - config.floor) * _fallen(config, step))


def _fallen(config: OptimizerConfig, step: int) -> float:
    """How much of its way down the rate has behind it, 0 to 1."""
    if config.schedule == "constant":
        return 0.0
    cosine = config.schedule == "cosine"
    fall = config.steps - config.warmup_steps if cosine else config.steps * config.cooldown
    if step >= config.steps:
        return 1.0
    passed = max(0.0, 1 - (config.steps - step) / fall)
    if cosine:
        return (1 - math.cos(math.pi * passed)) / 2
    return math.sqrt(passed) if config.schedule == "wsd-sqrt" else passed


def clip_bound(config: OptimizerConfig, n_stage: int, n_total: int) -> float:
    """A stage's share of the model's clip, clip·sqrt(n_stage / n_total): gradients' squares add up over
    parameters."""
    return config.clip * math.sqrt(n_stage / n_total)


def clip_gradients(gradients: Sequence[Tensor], bound: float) -> tuple[float, bool]:
    """Scales gradients in place to the norm `bound` if theirs is larger and `bound` not 0; the norm before, and
    whether they were. What is not finite stays as it is."""
    norm = gradient_norm(gradients)
    clipped = 0 < bound < norm < math.inf
    if clipped:
        for gradient in gradients:
            gradient.mul_(bound / norm)
    return norm, clipped


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """Euclidean norm over all gradients, in fp32 per tensor; not finite as soon as one entry is not."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(g, dtype=torch.float32)) ** 2 for g in gradients))


def outer_step(
    theta: Tensor, mean_pseudo_gradient: Tensor, momentum_buffer: Tensor, config: OuterConfig
) -> tuple[Tensor, Tensor]:
    """New (θ, momentum buffer) after one merge; pure, fp32, all three inputs of the same shape.

    buffer' = μ·buffer + g;  θ' = θ - lr·(g + μ·buffer'), with g = weights at the start of the round minus
    its end. Every product is rounded before it is added, so no device may contract the pair and all
    replicas get equal bits.
    """
    _check_flat(theta, mean_pseudo_gradient, momentum_buffer)
    decayed = torch.mul(momentum_buffer, config.momentum)
    buffer = torch.add(decayed, mean_pseudo_gradient)
    ahead = torch.mul(buffer, config.momentum)
    direction = torch.add(ahead, mean_pseudo_gradient)
    change = torch.mul(direction, config.lr)
    return torch.sub(theta, change), buffer


def plain_step(theta: Tensor, mean_pseudo_gradient: Tensor, config: OuterConfig) -> Tensor:
    """New θ after a merge without outer momentum, θ' = θ - lr·g; pure, fp32, both inputs of the same shape.

    For codecs with error feedback, which takes the momentum's place (SparseLoCo, arXiv 2508.15706). The product
    is rounded before it is subtracted, as in `outer_step`. Raises `ValueError` for a momentum above 0.
    """
    if config.momentum != 0:
        raise ValueError(f"outer.momentum is {config.momentum}, a plain outer step has none: set it to 0")
    _check_flat(theta, mean_pseudo_gradient)
    return torch.sub(theta, torch.mul(mean_pseudo_gradient, config.lr))


def _check_flat(theta: Tensor, pseudo_gradient: Tensor, momentum: Tensor | None = None) -> None:
    for name, tensor in (("theta", theta), ("pseudo-gradient", pseudo_gradient), ("momentum", momentum)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != theta.shape):
            raise ValueError(
                f"outer step: {name} is {tensor.dtype} {tuple(tensor.shape)}; float32 {tuple(theta.shape)} is needed"
            )


BETAS: dict[Kind, tuple[float, float]] = {"adamw": (0.9, 0.95), "nadam": (0.9, 0.95), "muon": (0.95, 0.95)}
"""Muon's are of the paper whose step sizes it has (arXiv 2502.16982)."""
NANO_RATES: dict[Kind, float] = {"adamw": 4e-3, "nadam": 4e-3, "muon": 7e-3}
"""The best of the sweeps in docs/learning.md for models of nano's size."""


def nano_optimizer(kind: Kind = "muon", *, lr: float | None = None) -> OptimizerConfig:
    """What trains models of nano's size, at the best measured rate of its kind or at `lr`. Muon has the lowest loss of
    the three, with microbatches in flight too (docs/learning.md)."""
    return OptimizerConfig(
        kind=kind,
        lr=NANO_RATES[kind] if lr is None else lr,
        betas=BETAS[kind],
        weight_decay=0.1,
        warmup_steps=20,
        clip=1.0,
    )
