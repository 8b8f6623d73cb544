"""What a falsified unit is, and that the replay which convicts by it tells it from an honest one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from model.config import BoundaryConfig, BoundaryForm
from model.engine import replay_backward, replay_forward, replay_tail
from model.split import split
from model.stage import Stage, build_stage, flatten
from subnet.trust.audit import UnitTensors, replay
from subnet.trust.finding import Check, Finding
from subnet.trust.ledger import Direction, Leaf
from tests.adversaries.kinds import PROFILES, AdversaryError, Kind, Plan, Role
from tests.adversaries.units import NOTHING, Past, Result, Unit, falsify, honest
from tests.neurons.swarm import tiny

HEAD, BODY, TAIL = range(3)
ACCUMULATION = 2
TOLERANCE = 0.02
CONFIG = replace(tiny(boundary=BoundaryConfig(form=BoundaryForm.A, width=16)), layers=8)
F, B = Direction.FORWARD, Direction.BACKWARD
PLACES = [(HEAD, F), (HEAD, B), (BODY, F), (BODY, B), (TAIL, B)]
ROLES = {Role.ANY: {HEAD, BODY, TAIL}, Role.HEAD: {HEAD}, Role.TAIL: {TAIL}, Role.NOT_HEAD: {BODY, TAIL}}
FALSIFIED = [
    (kind, place, direction)
    for kind, profile in PROFILES.items()
    for place, direction in PLACES
    if direction in profile.falsifies and place in ROLES[profile.role]
]


@dataclass(frozen=True)
class Case:
    stage: Stage
    unit: Unit
    past: Past

    def falsified(self, kind: Kind, *, strength: float | None = None, seed: int = 0) -> Result:
        used = PROFILES[kind].strength if strength is None else strength
        generator = torch.Generator().manual_seed(seed)
        return falsify(kind, self.stage, self.unit, strength=used, generator=generator, past=self.past)

    def findings(self, sent: Result) -> dict[Check, Finding]:
        """What an auditor finds who is shown `sent` for the unit."""
        unit, plan = self.unit, self.stage.plan
        wired = None if sent.output is None else sent.output.to(torch.bfloat16)
        leaf = Leaf(direction=unit.direction, stage=plan.index, sample=0, version=0, loss=sent.loss)
        found = replay(
            self.stage,
            leaf,
            UnitTensors(unit.x, unit.g, wired),
            targets=unit.targets,
            accumulation=unit.accumulation,
            tolerance=lambda _: TOLERANCE,
            hotkey="a",
            number=0,
        )
        return {finding.check: finding for finding in found}


def wired(tensor: torch.Tensor) -> torch.Tensor:
    """What arrives over a bfloat16 wire."""
    return tensor.to(torch.bfloat16).float()


@pytest.fixture(scope="module")
def cases() -> dict[tuple[int, Direction], Case]:
    """A microbatch through three stages, each of which has seen another one before."""
    plans = split(CONFIG, 3)
    stages = [build_stage(CONFIG, plan, 1) for plan in plans]
    older = [dict(build_stage(CONFIG, plan, 2).named_parameters()) for plan in plans]
    generator = torch.Generator().manual_seed(7)
    runs: list[dict[tuple[int, Direction], tuple[Unit, Result]]] = []
    for _ in range(3):
        tokens = torch.randint(0, CONFIG.vocab, (2, CONFIG.context + 1), generator=generator)
        x, units = tokens[:, :-1].contiguous(), {}
        inputs = []
        for place in (HEAD, BODY):
            inputs.append(x)
            unit = Unit(direction=F, x=x)
            result = honest(stages[place], unit)
            units[place, F] = unit, result
            assert result.output is not None
            x = wired(result.output)
        g = None
        for place, given in ((TAIL, x), (BODY, inputs[1]), (HEAD, inputs[0])):
            targets = tokens[:, 1:] if place == TAIL else None
            unit = Unit(direction=B, x=given, g=g, targets=targets, accumulation=ACCUMULATION)
            result = honest(stages[place], unit)
            units[place, B] = unit, result
            g = None if result.output is None else wired(result.output)
        runs.append(units)
    mine, earlier, sibling = runs
    found = {}
    for place, direction in PLACES:
        then, theirs = earlier[place, direction][1], sibling[place, direction][1]
        past = Past(
            weights=older[place],
            output=then.output,
            loss=then.loss,
            sibling=theirs.output,
            sibling_loss=theirs.loss,
            tokens=earlier[HEAD, F][0].x,
        )
        found[place, direction] = Case(stages[place], mine[place, direction][0], past)
    return found


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


@pytest.mark.parametrize(("place", "direction"), PLACES)
def test_an_honest_unit_is_the_engines_to_the_bit(
    cases: dict[tuple[int, Direction], Case], place: int, direction: Direction
) -> None:
    case = cases[place, direction]
    unit, result = case.unit, honest(case.stage, case.unit)
    expected: torch.Tensor | None
    if direction is F:
        expected = replay_forward(case.stage, unit.x)
        assert not result.gradients
    elif unit.targets is not None:
        loss, expected = replay_tail(case.stage, unit.x, unit.targets, accumulation=ACCUMULATION)
        assert result.loss == loss
    else:
        assert unit.g is not None
        expected = replay_backward(case.stage, unit.x, unit.g)
    assert same(result.output, expected)
    if direction is B:
        assert set(result.gradients) == {name for name, _ in case.stage.named_parameters()}
    assert all(finding.passed for finding in case.findings(result).values())
    assert all(parameter.grad is None for parameter in case.stage.parameters())


@pytest.mark.parametrize(("kind", "place", "direction"), FALSIFIED)
def test_a_falsified_unit_is_another_and_fails_where_its_kind_says(
    cases: dict[tuple[int, Direction], Case], kind: Kind, place: int, direction: Direction
) -> None:
    case = cases[place, direction]
    before, true = flatten(case.stage), honest(case.stage, case.unit)
    sent = case.falsified(kind)
    if true.output is None:
        assert sent.output is None
    else:
        assert sent.output is not None
        assert (sent.output.shape, sent.output.dtype) == (true.output.shape, true.output.dtype)
        assert bool(torch.isfinite(sent.output).all())
        assert same(sent.output, true.output) == (kind is Kind.POISONED_LOSS)
    failed = {check for check, finding in case.findings(sent).items() if not finding.passed}
    assert failed <= PROFILES[kind].convicts
    assert bool(failed) == (true.output is not None), "only the head's backward has nothing to compare"
    assert torch.equal(flatten(case.stage), before)
    assert all(parameter.grad is None for parameter in case.stage.parameters())


@pytest.mark.parametrize("kind", [kind for kind, profile in PROFILES.items() if profile.falsifies])
def test_one_seed_falsifies_alike(cases: dict[tuple[int, Direction], Case], kind: Kind) -> None:
    place, direction = next((place, direction) for of, place, direction in FALSIFIED if of is kind)
    first, again = (cases[place, direction].falsified(kind, seed=3) for _ in range(2))
    assert same(first.output, again.output)
    assert first.loss == again.loss


def test_noise_is_as_long_as_asked_in_every_token(cases: dict[tuple[int, Direction], Case]) -> None:
    case = cases[BODY, F]
    true, sent = honest(case.stage, case.unit).output, case.falsified(Kind.NOISE, strength=0.25).output
    assert true is not None
    assert sent is not None
    ratio = (sent - true).norm(dim=-1) / true.norm(dim=-1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.25))


def test_signs_factors_zeros_and_losses(cases: dict[tuple[int, Direction], Case]) -> None:
    case, tail = cases[BODY, B], cases[TAIL, B]
    true, mean = honest(case.stage, case.unit), honest(tail.stage, tail.unit)
    assert true.output is not None
    assert same(case.falsified(Kind.SIGN_FLIP).output, -true.output)
    assert same(case.falsified(Kind.SCALED_GRADIENT, strength=4.0).output, 4.0 * true.output)
    assert same(case.falsified(Kind.ZERO_GRADIENT).output, torch.zeros_like(true.output))
    assert case.falsified(Kind.NO_BACKWARD).output is not case.unit.g
    assert same(case.falsified(Kind.NO_BACKWARD).output, case.unit.g)
    assert tail.falsified(Kind.POISONED_LOSS, strength=0.5).loss == 0.5 * mean.loss
    assert tail.falsified(Kind.ZERO_GRADIENT).loss == tail.falsified(Kind.NO_BACKWARD).loss == mean.loss


def test_who_computes_no_backward_adds_nothing_to_its_step(cases: dict[tuple[int, Direction], Case]) -> None:
    case = cases[BODY, B]
    lazy = {Kind.ZERO_GRADIENT, Kind.NO_BACKWARD, Kind.REPLAY, Kind.COPYCAT}
    backward = {kind for kind, place, direction in FALSIFIED if (place, direction) == (BODY, B)}
    assert {kind for kind in backward if not case.falsified(kind).gradients} == lazy
    true = honest(case.stage, case.unit).gradients
    for kind in (Kind.NOISE, Kind.SIGN_FLIP, Kind.SCALED_GRADIENT):
        assert all(torch.equal(gradient, true[name]) for name, gradient in case.falsified(kind).gradients.items())
    last = f"layers.{case.stage.plan.last_layer - 1}."
    skipped = {name for name in true if name not in case.falsified(Kind.SKIPPED_LAYER).gradients}
    assert skipped == {name for name in true if name.startswith(last)}


def test_low_precision_is_the_closer_the_more_bits(cases: dict[tuple[int, Direction], Case]) -> None:
    case = cases[BODY, F]
    errors = [
        case.findings(case.falsified(Kind.LOW_PRECISION, strength=bits))[Check.FORWARD].error for bits in (3, 4, 8, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] > TOLERANCE > errors[-1]


def test_old_outputs_old_weights_and_other_tokens_are_those_of_the_past(
    cases: dict[tuple[int, Direction], Case],
) -> None:
    case, head = cases[BODY, F], cases[HEAD, F]
    assert same(case.falsified(Kind.REPLAY).output, case.past.output)
    assert same(case.falsified(Kind.COPYCAT).output, case.past.sibling)
    old = build_stage(CONFIG, case.stage.plan, 2)
    assert same(case.falsified(Kind.STALE_WEIGHTS).output, replay_forward(old, case.unit.x))
    assert head.past.tokens is not None
    assert same(head.falsified(Kind.WRONG_DATA).output, replay_forward(head.stage, head.past.tokens))


@pytest.mark.parametrize("kind", [Kind.STALE_WEIGHTS, Kind.REPLAY, Kind.COPYCAT, Kind.WRONG_DATA])
def test_without_a_past_a_cheater_is_honest(cases: dict[tuple[int, Direction], Case], kind: Kind) -> None:
    case = replace(cases[HEAD, F], past=NOTHING)
    assert same(case.falsified(kind).output, honest(case.stage, case.unit).output)


def test_who_cannot_cheat_so_is_told(cases: dict[tuple[int, Direction], Case]) -> None:
    with pytest.raises(AdversaryError, match="only a head"):
        cases[BODY, F].falsified(Kind.WRONG_DATA)
    with pytest.raises(AdversaryError, match="only a tail"):
        cases[BODY, B].falsified(Kind.POISONED_LOSS)
    with pytest.raises(AdversaryError, match="'sybil' does not falsify forward units"):
        cases[BODY, F].falsified(Kind.SYBIL)
    plan = split(CONFIG, 8)[1]
    thin = replace(cases[BODY, F], stage=build_stage(CONFIG, plan, 1))
    with pytest.raises(AdversaryError, match="stage 1 has one layer"):
        thin.falsified(Kind.SKIPPED_LAYER)


# -- kinds ---------------------------------------------------------------------------------------------------------


def test_every_kind_says_what_it_gains_and_what_stops_it() -> None:
    assert set(PROFILES) == set(Kind)
    assert all(profile.gains.endswith(".") and profile.stopped_by.endswith(".") for profile in PROFILES.values())
    assert all(bool(profile.strength) == bool(profile.unit) for profile in PROFILES.values())


def test_an_unknown_kind_names_the_nearest() -> None:
    assert Kind.parse("sign-flip") is Kind.SIGN_FLIP
    with pytest.raises(AdversaryError, match="'signflip' does not exist: did you mean 'sign-flip'"):
        Kind.parse("signflip")
    with pytest.raises(AdversaryError, match="known are noise, sign-flip"):
        Kind.parse("x")


def test_a_share_of_units_is_spread_or_packed_into_windows() -> None:
    units = [(version, sample) for version in range(200) for sample in range(10)]

    def cheated(plan: Plan) -> set[tuple[int, int]]:
        return {
            (version, sample)
            for version, sample in units
            if plan.cheats(version=version, sample=10 * version + sample, direction=F)
        }

    spread, packed = (cheated(Plan.of(Kind.NOISE, share=0.1, packed=packed, seed=5)) for packed in (False, True))
    assert 140 < len(spread) < 260
    assert len({version for version, _ in spread}) > 100
    windows = {version for version, _ in packed}
    assert 8 < len(windows) < 35
    assert len(packed) == 10 * len(windows)
    assert cheated(Plan.of(Kind.NOISE)) == set(units)
    assert not cheated(Plan.of(Kind.SCALED_GRADIENT)), "of gradients"
    with pytest.raises(AdversaryError, match="share of 0"):
        Plan.of(Kind.NOISE, share=0.0)
