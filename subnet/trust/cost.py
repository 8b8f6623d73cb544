"""What trust costs: what a miner keeps and sends, what validators fetch and compute, by arithmetic on the run's shape.

Nothing here is measured; every figure follows from the numbers handed in. Times are seconds, sizes bytes, `Load` fields
are per hour. All miners of a stage count alike, validators in sum.

    pending windows   in host memory; a slot's windows wait for its seed: (slot + delay) / window, and the one that is
                      open; once a round there are the weights from before a merge besides. One that is picked counts as
                      pending until it is written, for which there is a slot's time
    picked windows    on disk; by the slots' seeds, `windows` a slot, and in every round the one before which a merge is
                      taken over; kept for two rounds with the weights they began with, their units, and the pieces of
                      the other states that the seeds name. How many there are is drawn: room is for as many as
                      `QUANTILE` of all pairs of rounds have
    cuts              weights at the cut and what error feedback owes before and after; one in host memory until it is
                      written, on disk those of two rounds
    units             share of all units, replayed once in sum over validators
    steps             share of picked windows whose whole gradient is replayed: every backward unit of them
    matrices          where Muon moves any: momentum of one, before and after, and its polar factor once more, per
                      validator that looks into a picked window
    weights           of a picked window, once per validator that looks into it; of a round's first window none, because
                      they follow from public state
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.accounting import boundary_bytes, stage_flops
from model.config import ModelConfig
from model.layout import Layout
from model.muon import polar_flops
from model.optimizer import Kind
from model.split import StagePlan, split
from subnet.trust.audit import POOL
from subnet.trust.heads import HEAD_BYTES
from subnet.trust.ledger import LEAF_BYTES
from subnet.trust.quota import ROUNDS_KEPT
from subnet.trust.tree import PIECE_BYTES

HOUR = 3600.0
QUANTILE = 0.999
"""Of what is drawn, so much is planned for."""
PIECE_PARTS = 8
"""Of one piece of weights: they and both moments before and after; second moments lie across two pieces."""


class CostError(ValueError):
    """Numbers that describe no run: one line with the value, the limit and the option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The run that is audited."""

    model: ModelConfig
    stages: int
    replicas: int
    batch: int
    """Sequences in a microbatch."""
    sequence: int
    """Tokens in a sequence."""
    accumulation: int
    """Microbatches of one replica in a local step."""
    microbatch_seconds: float
    """Between two microbatches of one replica."""
    round_seconds: float
    optimizer: Kind
    weight_bytes: int
    """Of one weight, and of one moment."""
    wire_bytes: int
    """Of one value at a boundary."""

    def __post_init__(self) -> None:
        for name in ("stages", "replicas", "batch", "sequence", "accumulation", "weight_bytes", "wire_bytes"):
            if getattr(self, name) < 1:
                raise CostError(f"{name} is {getattr(self, name)}; it must be at least 1: raise it")
        for name in ("microbatch_seconds", "round_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise CostError(f"{name} is {getattr(self, name)}; it must be a finite number above 0: change it")
        if self.window_seconds > self.round_seconds:
            raise CostError(
                f"a local step takes {self.window_seconds:.0f} s, a round {self.round_seconds:.0f} s: "
                "lower the accumulation or lengthen the round"
            )

    @property
    def tokens(self) -> int:
        """In a microbatch."""
        return self.batch * self.sequence

    @property
    def window_seconds(self) -> float:
        return self.accumulation * self.microbatch_seconds

    @property
    def microbatches(self) -> float:
        """Of one replica in an hour."""
        return HOUR / self.microbatch_seconds

    @property
    def boundary(self) -> int:
        """Bytes of one boundary tensor."""
        return boundary_bytes(self.model, tokens=self.tokens, itemsize=self.wire_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How hard the run is audited: the manifest's `[audit]`, with times in seconds."""

    slot_seconds: float
    delay_seconds: float
    """From a slot's end to its seed."""
    windows: float
    """Picked per miner and slot, on average."""
    share: float
    """Of all units, replayed in sum over validators."""
    steps: float
    """Of picked windows, whose steps are replayed, in sum over validators."""
    pieces: int
    """Pieces of weights whose optimizer arithmetic is checked, per picked window and validator that looks into it."""
    validators: int
    """All of them read all tables."""
    readers: float
    """Validators that fetch the weights of one picked window, on average."""
    delta: float
    """Bytes of a weight delta, as a share of the weights; 1 where nothing can be packed."""

    def __post_init__(self) -> None:
        for name in ("slot_seconds", "delay_seconds", "windows", "readers", "delta"):
            if not 0 < getattr(self, name) < math.inf:
                raise CostError(f"{name} is {getattr(self, name)}; it must be a finite number above 0: change it")
        for name in ("share", "steps"):
            if not 0 <= getattr(self, name) <= 1:
                raise CostError(f"{name} is {getattr(self, name)}; it must be from 0 to 1: change it")
        for name in ("pieces", "validators"):
            if getattr(self, name) < 0:
                raise CostError(f"{name} is {getattr(self, name)}; it must be at least 0: raise it")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoad:
    """One stage; rates are per hour and miner, validators in sum."""

    stage: int
    parameters: int
    pending_bytes: int
    """Host memory for windows whose seed is not known: states and unit tensors."""
    cut_bytes: int
    """Host memory for what a payload was taken from."""
    picked_bytes: int
    """Disk for picked windows."""
    cuts_bytes: int
    """Disk for what payloads were taken from."""
    training_flops: float
    audit_flops: float
    training_bytes: float
    """Sent to neighbours; merges not counted."""
    table_bytes: float
    unit_bytes: float
    weight_bytes: float
    piece_bytes: float
    """Of what shows steps: pieces of states, and of Muon one matrix."""

    @property
    def audit_bytes(self) -> float:
        return self.table_bytes + self.unit_bytes + self.weight_bytes + self.piece_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory for evidence."""
        return self.pending_bytes + self.cut_bytes

    @property
    def disk_bytes(self) -> int:
        """Disk for evidence."""
        return self.picked_bytes + self.cuts_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The whole run."""

    stages: tuple[StageLoad, ...]
    replicas: int
    picked_per_hour: float
    """Windows of one miner."""
    picked_kept: int
    """Picked windows of one miner that it has room for."""

    @property
    def flops_share(self) -> float:
        """FLOPs of all audits ÷ FLOPs of all training, recompute not counted."""
        return sum(stage.audit_flops for stage in self.stages) / sum(stage.training_flops for stage in self.stages)

    @property
    def bytes_share(self) -> float:
        """Bytes of all audits ÷ bytes that miners send to train."""
        training = sum(stage.training_bytes for stage in self.stages)
        return sum(stage.audit_bytes for stage in self.stages) / training if training > 0 else math.inf

    @property
    def audit_flops(self) -> float:
        """Per hour, all miners."""
        return self.replicas * sum(stage.audit_flops for stage in self.stages)

    @property
    def audit_bytes(self) -> float:
        """Per hour, all miners."""
        return self.replicas * sum(stage.audit_bytes for stage in self.stages)

    @property
    def largest(self) -> StageLoad:
        """The stage that keeps most in host memory."""
        return max(self.stages, key=lambda stage: stage.host_bytes)

    @property
    def fullest(self) -> StageLoad:
        """The stage that keeps most on disk."""
        return max(self.stages, key=lambda stage: stage.disk_bytes)

    @property
    def busiest(self) -> StageLoad:
        """The stage that sends most evidence."""
        return max(self.stages, key=lambda stage: stage.audit_bytes)


def cost(shape: Shape, rules: Rules) -> Cost:
    """What auditing a run of this shape by these rules costs. Raises `CostError`, `ConfigError`."""
    picked = rules.windows * HOUR / rules.slot_seconds
    if picked * shape.window_seconds > HOUR:
        raise CostError(
            f"{picked:.0f} windows are picked in an hour that has {HOUR / shape.window_seconds:.0f}: "
            "lower the windows per slot or lengthen the slot"
        )
    plans = split(shape.model, shape.stages)
    slots = ROUNDS_KEPT * math.ceil(shape.round_seconds / rules.slot_seconds)
    whole = math.floor(rules.windows)
    kept = ROUNDS_KEPT + slots * whole + most_drawn(slots, rules.windows - whole)
    return Cost(
        stages=tuple(_stage(shape, rules, plan, picked, kept) for plan in plans),
        replicas=shape.replicas,
        picked_per_hour=picked,
        picked_kept=kept,
    )


def most_drawn(trials: int, chance: float) -> int:
    """The `QUANTILE` of the binomial distribution: hits of `trials`, each with `chance`, in [0, 1)."""
    if chance <= 0:
        return 0
    below = 0.0
    for hits in range(trials):
        ways = math.lgamma(trials + 1) - math.lgamma(hits + 1) - math.lgamma(trials - hits + 1)
        below += math.exp(ways + hits * math.log(chance) + (trials - hits) * math.log1p(-chance))
        if below >= QUANTILE:
            return hits
    return trials


@dataclass(frozen=True, slots=True)
class _Role:
    """What a stage's place in the pipeline makes of its units, in boundary tensors and passes over the stage."""

    kept: int
    """Tensors of a microbatch: input, output, and the gradients of both; tokens are too few to count."""
    sent: int
    """Tensors that training sends per microbatch."""
    units: int
    """Units of a microbatch whose replay compares something."""
    shown: float
    """Tensors of such a unit, on average."""
    step: int
    """Tensors that the replay of a step takes per microbatch."""
    forwards: float
    """Forward passes in the replay of a unit, on average; a backward computes the forward again."""
    backwards: float

    @classmethod
    def of(cls, plan: StagePlan) -> _Role:
        if plan.is_first:
            return cls(kept=2, sent=1, units=1, shown=1, step=1, forwards=1, backwards=0)
        if plan.is_last:
            return cls(kept=2, sent=1, units=1, shown=2, step=1, forwards=1, backwards=1)
        return cls(kept=4, sent=2, units=2, shown=2.5, step=2, forwards=1, backwards=0.5)


def _stage(shape: Shape, rules: Rules, plan: StagePlan, picked: float, kept: int) -> StageLoad:
    role = _Role.of(plan)
    layout = Layout.planned(shape.model, plan, shape.optimizer)
    weights, boundary = shape.weight_bytes * layout.values, shape.boundary
    state = weights + shape.weight_bytes * layout.moments
    matrices = [2 * shape.weight_bytes * len(place.span) for place in layout.matrices]  # before and after
    mean = 1 / len(matrices) if matrices else 0.0
    looked, factor = mean * sum(matrices), mean * sum(polar_flops(place.shape) for place in layout.matrices)
    tensors = shape.accumulation * role.kept * boundary
    pending = math.ceil((rules.slot_seconds + rules.delay_seconds) / shape.window_seconds) + 1
    forward, backward = (shape.tokens * flops for flops in stage_flops(shape.model, plan, tokens=shape.sequence))
    replayed = rules.share * shape.microbatches * role.units
    stepped = picked * rules.steps * shape.accumulation
    read = picked * rules.readers
    later = 1 - shape.window_seconds / shape.round_seconds
    return StageLoad(
        stage=plan.index,
        parameters=layout.values,
        pending_bytes=pending * (state + tensors) + weights,
        cut_bytes=3 * weights,
        picked_bytes=kept * (weights + tensors + POOL * PIECE_PARTS * PIECE_BYTES + max(matrices, default=0)),
        cuts_bytes=ROUNDS_KEPT * 3 * weights,
        training_flops=shape.microbatches * (forward + backward),
        audit_flops=replayed * (role.forwards * forward + role.backwards * backward)
        + stepped * (forward + backward)
        + read * factor,
        training_bytes=shape.microbatches * role.sent * boundary if shape.stages > 1 else 0.0,
        table_bytes=rules.validators
        * HOUR
        * (2 * LEAF_BYTES / shape.microbatch_seconds + HEAD_BYTES / shape.window_seconds),
        unit_bytes=(replayed * role.shown + stepped * role.step) * boundary,
        weight_bytes=read * later * rules.delta * weights,
        piece_bytes=read * (rules.pieces * PIECE_PARTS * PIECE_BYTES + looked),
    )
