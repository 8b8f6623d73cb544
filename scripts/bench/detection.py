"""What a replay sees of falsified units: errors measured with real stages, real weights and the audit's own comparison.

A nano model is trained for a while in four stages. Then units are computed honestly, falsified by every kind of
adversary that changes numbers (`tests.adversaries.units`), and replayed by `subnet.trust.audit.replay`. Honest units of
another device class, whose matrix products are rounded to bf16, stand beside them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from model.stage import Stage
from scripts.calibrate import Pipeline, Profile
from subnet.trust.audit import UnitTensors, comparable, replay
from subnet.trust.finding import Check, Finding
from subnet.trust.ledger import Direction, Leaf
from subnet.trust.tolerance import Device
from tests.adversaries.kinds import PROFILES, Kind, Role
from tests.adversaries.units import Past, Result, Unit, Weights, falsify, honest

WIRE = torch.bfloat16
STAGES = 4
ACCUMULATION = 2
BF16 = Profile("bf16", Device.BF16, bf16=True)


@dataclass(frozen=True, slots=True)
class Cheat:
    """A kind at one strength, `PROFILES[kind].unit`."""

    kind: Kind
    strength: float

    @property
    def name(self) -> str:
        usual = self.strength == PROFILES[self.kind].strength
        return self.kind.value if usual else f"{self.kind.value} {self.strength:g}"


CHEATS = tuple(Cheat(kind, profile.strength) for kind, profile in PROFILES.items() if profile.falsifies)
WEAK = (
    Cheat(Kind.NOISE, 0.01),
    Cheat(Kind.NOISE, 0.002),
    Cheat(Kind.LOW_PRECISION, 8.0),
    Cheat(Kind.STALE_WEIGHTS, 1.0),
    Cheat(Kind.POISONED_LOSS, 0.99),
)
"""Near the tolerance: what slips through, and how little it is."""


@dataclass(frozen=True, slots=True)
class Errors:
    """One falsified unit's replay: relative errors by check. Empty where nothing is compared."""

    stage: int
    direction: Direction
    by_check: Mapping[Check, float]

    @property
    def worst(self) -> float:
        return max(self.by_check.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class _Place:
    """One unit with what a cheater at its place has seen before."""

    stage: Stage
    unit: Unit
    true: Result


def _wired(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(WIRE).float()


def _microbatch(pipeline: Pipeline) -> dict[tuple[int, Direction], _Place]:
    """All units of the next microbatch, honestly computed, by stage and direction."""
    tokens, targets = pipeline.next()
    stages = [engine.stage for engine in pipeline.engines]
    found: dict[tuple[int, Direction], _Place] = {}
    inputs = [tokens]
    for index, stage in enumerate(stages[:-1]):
        place = _place(stage, Unit(direction=Direction.FORWARD, x=inputs[index], restored=tokens))
        found[index, Direction.FORWARD] = place
        assert place.true.output is not None  # noqa: S101 - a forward sends on
        inputs.append(_wired(place.true.output))
    g: torch.Tensor | None = None
    for index in range(len(stages) - 1, -1, -1):
        unit = Unit(
            direction=Direction.BACKWARD,
            x=inputs[index],
            g=g,
            targets=targets if index == len(stages) - 1 else None,
            restored=tokens,
            accumulation=ACCUMULATION,
        )
        place = found[index, Direction.BACKWARD] = _place(stages[index], unit)
        g = None if place.true.output is None else _wired(place.true.output)
    return found


def _place(stage: Stage, unit: Unit) -> _Place:
    return _Place(stage, unit, honest(stage, unit))


def plays(kind: Kind, *, is_first: bool, is_last: bool) -> bool:
    """Whether a replica of such a stage can be one of this kind."""
    role = PROFILES[kind].role
    return not (
        (role is Role.HEAD and not is_first)
        or (role is Role.TAIL and not is_last)
        or (role is Role.NOT_HEAD and is_first)
    )


def measure(
    *, microbatches: int, steps: int, seed: int, cheats: Sequence[Cheat] = (*CHEATS, *WEAK)
) -> tuple[dict[Cheat, list[Errors]], list[Errors]]:
    """Errors of falsified units by cheat, and of honest units of the bf16 class; after `steps` optimizer steps of nano,
    over so many microbatches. Weights older than the first step are the first."""
    pipeline = Pipeline("nano", STAGES, seed=seed)
    older: dict[float, list[Weights]] = {}
    ages = {cheat.strength for cheat in cheats if cheat.kind is Kind.STALE_WEIGHTS}
    for age in sorted(ages, reverse=True):
        pipeline.train(max(0, steps - round(age)))
        older[age] = [{name: p.detach().clone() for name, p in e.stage.named_parameters()} for e in pipeline.engines]
    pipeline.train(steps)
    generator = torch.Generator().manual_seed(seed)
    falsified: dict[Cheat, list[Errors]] = defaultdict(list)
    noisy: list[Errors] = []
    earlier, sibling = _microbatch(pipeline), _microbatch(pipeline)
    for _ in range(microbatches):
        mine = _microbatch(pipeline)
        for (index, direction), place in mine.items():
            then, theirs = earlier[index, direction].true, sibling[index, direction].true
            plan = place.stage.plan
            for cheat in cheats:
                kind = cheat.kind
                if direction not in PROFILES[kind].falsifies:
                    continue
                if not plays(kind, is_first=plan.is_first, is_last=plan.is_last):
                    continue
                past = Past(
                    weights=older[cheat.strength][index] if kind is Kind.STALE_WEIGHTS else None,
                    output=then.output,
                    loss=then.loss,
                    sibling=theirs.output,
                    sibling_loss=theirs.loss,
                    tokens=earlier[0, Direction.FORWARD].unit.x,
                )
                sent = falsify(kind, place.stage, place.unit, strength=cheat.strength, generator=generator, past=past)
                falsified[cheat] += _errors(place, sent)
            with BF16.active():
                other = honest(place.stage, place.unit)
            noisy += _errors(place, other)
        earlier, sibling = mine, earlier
    return dict(falsified), noisy


def _errors(place: _Place, sent: Result) -> Iterator[Errors]:
    """What an auditor finds who is shown `sent`; nothing where an audit draws no such unit."""
    unit, plan = place.unit, place.stage.plan
    leaf = Leaf(direction=unit.direction, stage=plan.index, sample=0, version=0, loss=sent.loss)
    if not comparable(plan, leaf):
        return
    output = None if sent.output is None else sent.output.detach().to(WIRE)
    found: tuple[Finding, ...] = replay(
        place.stage,
        leaf,
        UnitTensors(unit.x, unit.g, output),
        tokens=unit.restored,
        targets=unit.targets,
        accumulation=unit.accumulation,
        tolerance=lambda _: 0.0,
        hotkey="cheater",
        number=0,
    )
    yield Errors(plan.index, unit.direction, {finding.check: finding.error for finding in found})


def power(errors: Sequence[Errors], threshold: float) -> float:
    """Share of units that some check finds beyond the threshold."""
    return sum(entry.worst > threshold for entry in errors) / len(errors) if errors else 0.0


def roc(bad: Sequence[Errors], good: Sequence[Errors]) -> list[tuple[float, float, float]]:
    """(threshold, share of honest units that fail, share of falsified units that fail), from none failing to all."""
    thresholds = sorted({entry.worst for entry in (*bad, *good)}, reverse=True)
    return [(float(t), power(good, t), power(bad, t)) for t in [*thresholds, -1.0]]
