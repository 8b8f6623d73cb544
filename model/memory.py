"""What a stage needs of its card's memory, part by part, and how little it may recompute: arithmetic alone.

N parameters, e bytes per value of weights, gradients and boundaries, m per value of each of the two moments; a unit is
one microbatch of n tokens. An open unit waits between its forward and its backward.

    weights     e·N
    gradients   e·N
    optimizer   2·m·N; with Muon m·N and m for each value that has a second moment
    in flight   open units · input (w·n·e; tokens at a head: 8·n) + held graphs · graph
    workspace   one graph, which the running backward reads or has rebuilt, twice a whole block's graph, in which a
                block's gradients lie, and at the tail what the cross-entropy holds (a chunk's logits in both widths and
                the head's gradient twice)
    reserve     CUDA's context, cuBLAS' workspaces, what the allocator cannot use

A graph is `model.recompute.block_bytes` per block and what a boundary's two ends add (form A: input and carry before
the first block, FFN output and its silu after the last). A flash kernel never stores attention's scores, so the term
5·a·s²·b of Korthikanti et al. (arXiv 2205.05198) is absent; of their 34·s·b·h remains what SwiGLU, grouped keys and
values and no dropout leave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from model.accounting import stage_moments, stage_parameters
from model.config import BoundaryForm, ConfigError, ModelConfig
from model.devices import DEVICES, Device
from model.loss import CHUNK
from model.optimizer import Kind
from model.recompute import Recompute, block_bytes
from model.split import StagePlan, split

RESERVE = 2e9
"""Bytes."""
TOKEN_BYTES = 8
_WIDTHS = {2: torch.bfloat16, 4: torch.float32}
_MOST_STAGES = 512


class DoesNotFitError(ConfigError):
    """A stage that fits no way: one line with what is short by how much, and what would fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What passes through a stage."""

    batch: int
    """Sequences of a microbatch."""
    sequence: int
    value_bytes: int = 2
    """e: 2 for bf16, 4 for fp32."""
    moment_bytes: int = 2
    """m: 2 as the published run had it (facts: orion §1.2), 4 for fp32 moments."""
    optimizer: Kind = "adamw"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.sequence < 1:
            raise ConfigError(
                f"batch is {self.batch} and sequence {self.sequence}; both must be at least 1: raise them"
            )
        for name in ("value_bytes", "moment_bytes"):
            if getattr(self, name) not in _WIDTHS:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 2 (bf16) or 4 (fp32): change it")

    @property
    def tokens(self) -> int:
        """n."""
        return self.batch * self.sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on one card, and the choice they follow from."""

    recompute: Recompute
    graphs: int
    """Units whose graph is held at a time."""
    weights: int
    gradients: int
    optimizer: int
    in_flight: int
    workspace: int
    reserve: int
    card: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.in_flight + self.workspace + self.reserve

    @property
    def free(self) -> int:
        """Negative where it does not fit."""
        return self.card - self.total


def graph_bytes(config: ModelConfig, plan: StagePlan, units: Units, recompute: Recompute) -> int:
    """Of one unit's graph; 0 with full recompute."""
    if recompute is Recompute.FULL:
        return 0
    per_token = plan.layers * block_bytes(config, recompute, _WIDTHS[units.value_bytes])
    if config.boundary.form is not BoundaryForm.NONE:
        width, hidden = config.boundary_width, config.hidden
        per_token += 0 if plan.is_first else units.value_bytes * (width + hidden)
        per_token += 0 if plan.is_last else units.value_bytes * 2 * hidden
    return units.tokens * per_token


def stage_memory(
    config: ModelConfig,
    plan: StagePlan,
    card: Device,
    units: Units,
    *,
    open_units: int,
    recompute: Recompute,
    graphs: int,
) -> StageMemory:
    """One choice, whether it fits or not.

    Args:
        open_units: units between their forward and their backward, at most.
        graphs: of these, how many hold their graph.
    """
    parameters = stage_parameters(config, plan)
    size = units.value_bytes
    entry = TOKEN_BYTES if plan.is_first else size * config.boundary_width
    held = Recompute.SELECTIVE if recompute is Recompute.FULL else recompute
    workspace = graph_bytes(config, plan, units, held)
    workspace += 2 * units.tokens * block_bytes(config, Recompute.KEEP, _WIDTHS[size])
    if plan.is_last:
        workspace += min(CHUNK, units.tokens) * config.vocab * (2 * size + 4) + 2 * size * config.vocab * config.hidden
    return StageMemory(
        recompute=recompute,
        graphs=graphs,
        weights=size * parameters,
        gradients=size * parameters,
        optimizer=units.moment_bytes * stage_moments(config, plan, units.optimizer),
        in_flight=open_units * units.tokens * entry + graphs * graph_bytes(config, plan, units, recompute),
        workspace=workspace,
        reserve=int(RESERVE),
        card=int(card.memory),
    )


def least_recompute(
    config: ModelConfig, plan: StagePlan, card: Device, units: Units, *, open_units: int, most_graphs: int | None = None
) -> StageMemory:
    """The choice that fits and recomputes least: whole graphs of all open units, selective ones, as many selective ones
    as there is room for, none. What fits no way comes back with full recompute and `free` below 0.

    Args:
        most_graphs: where fewer than `open_units` graphs are of use, how many.
    """
    useful = 0 if plan.is_last else min(open_units, open_units if most_graphs is None else most_graphs)

    def choice(recompute: Recompute, graphs: int) -> StageMemory:
        return stage_memory(config, plan, card, units, open_units=open_units, recompute=recompute, graphs=graphs)

    none = choice(Recompute.FULL, 0)
    if not useful and not plan.is_last:
        return none
    for recompute in (Recompute.KEEP, Recompute.SELECTIVE):
        whole = choice(recompute, useful)
        if whole.free >= 0:
            return whole
    room = none.free // graph_bytes(config, plan, units, Recompute.SELECTIVE)
    return choice(Recompute.SELECTIVE, min(useful, room)) if room > 0 and useful else none


def require_fit(
    config: ModelConfig, stages: int, cards: Sequence[Device], units: Units, *, open_units: Sequence[int]
) -> None:
    """Raises `DoesNotFitError` unless each stage fits its card with full recompute; `cards`, `open_units` per stage."""
    plans = split(config, stages)
    worst = min(
        (
            (_bare(config, plan, card, units, waiting), plan)
            for plan, card, waiting in zip(plans, cards, open_units, strict=True)
        ),
        key=lambda pair: pair[0].free,
    )
    memory, plan = worst
    if memory.free >= 0:
        return
    card = cards[plan.index]
    remedies = list(_remedies(config, stages, card, units, max(open_units)))
    fits = "; what would fit: " + ", or ".join(remedies) if remedies else "; nothing that is known here would fit"
    raise DoesNotFitError(
        f"stage {plan.index} of {stages} needs {memory.total / 1e9:.1f} GB with full recompute (weights "
        f"{memory.weights / 1e9:.1f}, gradients {memory.gradients / 1e9:.1f}, optimizer {memory.optimizer / 1e9:.1f}, "
        f"workspace {memory.workspace / 1e9:.1f}), which is {-memory.free / 1e9:.1f} GB more than the "
        f"{card.memory / 1e9:.0f} GB of a {card.name}{fits}"
    )


def _bare(config: ModelConfig, plan: StagePlan, card: Device, units: Units, open_units: int) -> StageMemory:
    return stage_memory(config, plan, card, units, open_units=open_units, recompute=Recompute.FULL, graphs=0)


def _remedies(config: ModelConfig, stages: int, card: Device, units: Units, open_units: int) -> Iterator[str]:
    def fits(stages: int, card: Device, units: Units) -> bool:
        return all(_bare(config, plan, card, units, open_units).free >= 0 for plan in split(config, stages))

    if units.moment_bytes > 2 and fits(stages, card, replace(units, moment_bytes=2)):
        yield "--moments bf16"
    smaller = (units.batch >> halvings for halvings in range(1, units.batch.bit_length()))
    batch = next((batch for batch in smaller if fits(stages, card, replace(units, batch=batch))), None)
    if batch is not None:
        yield f"--batch {batch}"
    deeper = range(stages + 1, min(config.layers, _MOST_STAGES) + 1)
    more = next((count for count in deeper if fits(count, card, units)), None)
    if more is not None:
        yield f"--stages {more}"
    larger = sorted(DEVICES.values(), key=lambda device: device.memory)
    other = next((device.name for device in larger if fits(stages, device, units)), None)
    if other is not None:
        yield f"--gpu {other}"


def mean_open(depth: float, stages: int, index: int) -> float:
    """Units open at a stage on average, in a pipeline that holds `depth` per replica: those that are beyond it, forth
    and back. The tail holds none: it runs forward and backward at once."""
    return depth * (1 - (index + 0.5) / stages) if index < stages - 1 else 0.0


def recomputed_share(open_units: float, graphs: int, accumulation: int) -> float:
    """Of a stage's units, how many run their forward a second time.

    A graph belongs to the weights it was made with, so a step drops all of them (`model.engine`): of units that stay
    open for as long as `open_units` others take, one in `accumulation / open_units` meets a step. What finds no room is
    recomputed as well.
    """
    if open_units <= 0:
        return 0.0
    held = min(1.0, graphs / math.ceil(open_units))
    return 1 - held * max(0.0, 1 - open_units / accumulation)
