"""What an audit makes of steps: taken honestly, not at all, or on another gradient than their units gave."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import muon
from model.engine import StageEngine, StepReport
from neurons.dossier import RoundFacts
from subnet.swarm.merge import taken_over
from subnet.trust import audit
from subnet.trust.audit import pick_windows
from subnet.trust.finding import Check, Grade
from subnet.trust.heads import WindowHead
from subnet.trust.report import FindingModel
from tests.neurons.audited import NUMBER, ClosedRound, Court, Judging, Work

SECRET = b"a secret"
Bent = Callable[[StageEngine], None]


def before_each_step(engine: StageEngine, change: Callable[[list[torch.Tensor]], object]) -> None:
    """`change` gets the accumulated gradients."""
    step = engine.step

    def bent() -> StepReport:
        change([p.grad for p in engine.stage.parameters() if p.grad is not None])
        return step()

    engine.step = bent  # type: ignore[method-assign]


def each(change: Callable[[torch.Tensor], object]) -> Bent:
    return lambda engine: before_each_step(engine, lambda gradients: [change(g) for g in gradients])


def drop_every_other_unit(engine: StageEngine) -> None:
    backward = engine.backward

    def bent(key: object, g: torch.Tensor) -> torch.Tensor | None:
        kept = [None if p.grad is None else p.grad.clone() for p in engine.stage.parameters()]
        dx = backward(key, g)
        if engine.units_accumulated % 2 == 0:
            for p, grad in zip(engine.stage.parameters(), kept, strict=True):
                p.grad = grad
        return dx

    engine.backward = bent  # type: ignore[method-assign]


def another_rate(engine: StageEngine) -> None:
    engine._config = replace(engine._config, lr=1.5 * engine._config.lr)


def weights_that_drift(engine: StageEngine) -> None:
    step = engine.step

    def bent() -> StepReport:
        report = step()
        with torch.no_grad():
            for p in engine.stage.parameters():
                p.add_(1e-4 * torch.sign(p))
        return report

    engine.step = bent  # type: ignore[method-assign]


WRONG_GRADIENTS: dict[str, Bent] = {
    "none": each(torch.Tensor.zero_),
    "flipped": each(torch.Tensor.neg_),
    "shrunk": each(lambda g: g.mul_(0.5)),
    "noisy": each(lambda g: g.add_(0.1 * g.abs().mean() * g.roll(1).sign())),
    "of every other unit": drop_every_other_unit,
    "said not to be finite": each(lambda g: g.fill_(math.nan)),
}
WRONG_STEPS: dict[str, Bent] = {"another rate": another_rate, "weights that drift": weights_that_drift}


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> ClosedRound:
    return ClosedRound(tmp_path_factory.mktemp("round"), steps=1.0)


def failed_checks(judge: Judging, hotkey: str) -> set[tuple[Check, Grade]]:
    return {(entry.finding.check, entry.finding.grade) for entry in judge.failed(hotkey)}


async def test_every_step_of_an_honest_round_passes(closed: ClosedRound) -> None:
    async with Court(closed, patience=30.0) as court:
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET))
    assert not judge.failed()
    for hotkey, dossier in dossiers.items():
        stepped = {head.version for head in closed.works[hotkey].heads if head.backward} & dossier.picked.keys()
        assert dossier.stepped == stepped != set()
        assert {version for version, _ in dossier.pieces} == stepped
    steps = [entry.finding for entry in judge.entries if entry.finding.check is Check.STEP]
    assert 0 < max(finding.error for finding in steps) <= 1
    gradients = [entry.finding for entry in judge.entries if entry.finding.check is Check.GRADIENT]
    assert max(finding.error for finding in gradients) < 1e-4
    assert len(gradients) == sum(len(dossier.stepped) for dossier in dossiers.values())


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in {"none", "flipped"} else pytest.mark.long) for kind in WRONG_GRADIENTS],
)
async def test_a_head_that_steps_on_another_gradient_is_convicted_in_its_first_round(tmp_path: Path, kind: str) -> None:
    """Its backward sends nothing on, so nothing else would tell."""
    closed = ClosedRound(tmp_path, samples=32, bent={(0, 1): WRONG_GRADIENTS[kind]}, steps=1.0)
    cheat = closed.stage(0)[1]
    async with Court(closed, patience=30.0) as court:
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET))
    assert {entry.finding.hotkey for entry in judge.failed()} == {cheat.hotkey}
    assert failed_checks(judge, cheat.hotkey) == {(Check.GRADIENT, Grade.MEASUREMENT)}
    assert judge.of(cheat.hotkey).convicted_round == NUMBER
    assert len(dossiers[cheat.hotkey].stepped) >= 2


@pytest.mark.parametrize("kind", WRONG_STEPS)
async def test_a_step_that_does_not_follow_is_a_proof_that_others_repeat(tmp_path: Path, kind: str) -> None:
    closed = ClosedRound(tmp_path, bent={(1, 0): WRONG_STEPS[kind]}, steps=1e-9)
    cheat = closed.stage(1)[0]
    async with Court(closed, validators=("one", "two"), patience=30.0) as court:
        one, two = court.validators.values()
        facts = closed.facts(SECRET)
        await one.audit(facts)
        assert {entry.finding.hotkey for entry in one.failed()} == {cheat.hotkey}
        assert failed_checks(one, cheat.hotkey) == {(Check.STEP, Grade.PROOF)}
        assert one.of(cheat.hotkey).convicted_round == NUMBER
        assert not any(entry.finding.check is Check.GRADIENT for entry in one.entries)

        model = FindingModel.of(one.failed()[0].finding)
        dossier = two.auditor.open(facts)[cheat.hotkey]
        dossier.evidence = cheat.evidence
        dossier.picked = {head.version: seed for head, seed in picked(closed, facts, cheat)}
        models = [model, model, model.model_copy(update={"piece": 10**9}), model.model_copy(update={"version": 999})]
        assert await two.adopter.reproduce(facts, dossier, models, accuser="one") == 1
        (entry,) = two.failed()
        assert (entry.accuser, entry.finding.check, entry.finding.piece) == ("one", Check.STEP, model.piece)
        assert two.of(cheat.hotkey).convicted_round == NUMBER


async def test_only_pieces_that_a_windows_seed_names_are_looked_at_and_a_cheat_in_them_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One piece is named; a miner shows no other, so who asked for one would call it withheld."""
    monkeypatch.setattr(audit, "POOL", 1)
    closed = ClosedRound(tmp_path, bent={(1, 0): another_rate}, steps=1e-9)
    cheat = closed.stage(1)[0]
    async with Court(closed, validators=("one", "two"), patience=30.0) as court:
        one, two = court.validators.values()
        facts = closed.facts(SECRET)
        dossiers = await one.audit(facts)
        assert {entry.finding.hotkey for entry in one.failed()} == {cheat.hotkey}
        assert failed_checks(one, cheat.hotkey) == {(Check.STEP, Grade.PROOF)}
        for hotkey, dossier in dossiers.items():
            work = closed.works[hotkey]
            named = {(head.version, piece) for head in work.heads for piece in closed.pool(work, head).weights}
            assert dossier.pieces
            assert dossier.pieces <= named

        model = FindingModel.of(one.failed()[0].finding)
        assert model.piece is not None
        dossier = two.auditor.open(facts)[cheat.hotkey]
        dossier.evidence = cheat.evidence
        dossier.picked = {head.version: seed for head, seed in picked(closed, facts, cheat)}
        other = model.model_copy(update={"piece": int(model.piece == 0)})
        assert await two.adopter.reproduce(facts, dossier, [other], accuser="one") == 0
        assert not two.entries
        assert await two.adopter.reproduce(facts, dossier, [model], accuser="one") == 1


async def test_a_gradient_that_another_says_is_wrong_is_replayed_and_nothing_else_believed(tmp_path: Path) -> None:
    closed = ClosedRound(tmp_path, bent={(0, 0): WRONG_GRADIENTS["none"]}, steps=1.0)
    cheat, honest = closed.stage(0)
    async with Court(closed, validators=("one", "two"), patience=30.0) as court:
        one, two = court.validators.values()
        facts = closed.facts(SECRET)
        await one.audit(facts)
        models = [FindingModel.of(entry.finding) for entry in one.failed(cheat.hotkey)]
        dossiers = two.auditor.open(facts)
        for work in (cheat, honest):
            dossiers[work.hotkey].evidence = work.evidence
            dossiers[work.hotkey].picked = {head.version: seed for head, seed in picked(closed, facts, work)}
        assert await two.adopter.reproduce(facts, dossiers[cheat.hotkey], models, accuser="one") >= 2
        assert two.of(cheat.hotkey).convicted_round == NUMBER
        lies = [model.model_copy(update={"hotkey": honest.hotkey}) for model in models]
        assert await two.adopter.reproduce(facts, dossiers[honest.hotkey], lies, accuser="one") == 0
        assert len(dossiers[honest.hotkey].stepped) == 2, "no more than a verdict takes"
        assert not two.failed(honest.hotkey)


def picked(closed: ClosedRound, facts: RoundFacts, work: Work) -> list[tuple[WindowHead, bytes]]:
    return pick_windows(work.heads, seeds=facts.seeds, hotkey=work.hotkey, count=closed.loaded.manifest.audit.windows)


# -- Muon ------------------------------------------------------------------------------------------------------------


def adamw_in_its_place(engine: StageEngine) -> None:
    """It keeps the first moments that it must show, and takes other steps with them."""
    move = engine._optimizer._muon  # type: ignore[attr-defined]

    def bent(p: torch.Tensor, gradient: torch.Tensor, lr: float, decay: float) -> None:
        before = p.clone()
        move(p, gradient, lr, decay)
        p.copy_(before * (1 - lr * decay) - lr * engine._optimizer.state[p]["exp_avg"].sign())

    engine._optimizer._muon = bent  # type: ignore[attr-defined]


def fewer_iterations(engine: StageEngine) -> None:
    move = engine._optimizer._muon  # type: ignore[attr-defined]

    def bent(*arguments: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(muon, "ITERATIONS", 4)
            move(*arguments)

    engine._optimizer._muon = bent  # type: ignore[attr-defined]


WRONG_MATRICES: dict[str, Bent] = {
    "AdamW in its place": adamw_in_its_place,
    "fewer iterations": fewer_iterations,
    "another rate": another_rate,
}


async def test_every_muon_step_of_an_honest_round_passes_and_one_matrix_of_each_window_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "POOL", 1)
    closed = ClosedRound(tmp_path, steps=1.0, kind="muon")
    async with Court(closed, patience=30.0) as court:
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET))
    assert not judge.failed()
    for hotkey, dossier in dossiers.items():
        stepped = {head.version for head in closed.works[hotkey].heads if head.backward} & dossier.picked.keys()
        assert dossier.polar == dossier.stepped == stepped != set()
    found = [entry.finding for entry in judge.entries if entry.finding.check is Check.POLAR]
    assert len(found) == sum(len(dossier.polar) for dossier in dossiers.values())
    assert 0 < max(finding.error for finding in found) < 1e-3
    assert {finding.grade for finding in found} == {Grade.MEASUREMENT}
    steps = [entry.finding for entry in judge.entries if entry.finding.check is Check.STEP]
    assert max(finding.error for finding in steps) <= 1
    gradients = [entry.finding for entry in judge.entries if entry.finding.check is Check.GRADIENT]
    assert max(finding.error for finding in gradients) < 1e-4


@pytest.mark.parametrize("kind", WRONG_MATRICES)
async def test_who_moves_matrices_otherwise_than_muon_is_convicted_and_others_look_for_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With units and gradients that are in order; the piece that is looked at need not be one of the pool."""
    monkeypatch.setattr(audit, "POOL", 1)
    closed = ClosedRound(tmp_path, bent={(0, 0): WRONG_MATRICES[kind]}, steps=1e-9, kind="muon")
    cheat, honest = closed.stage(0)
    async with Court(closed, validators=("one", "two"), patience=30.0) as court:
        one, two = court.validators.values()
        facts = closed.facts(SECRET)
        await one.audit(facts)
        assert {entry.finding.hotkey for entry in one.failed()} == {cheat.hotkey}
        polar = [entry.finding for entry in one.failed() if entry.finding.check is Check.POLAR]
        assert len(polar) >= 2
        assert one.of(cheat.hotkey).convicted_round == NUMBER

        models = [FindingModel.of(finding) for finding in polar]
        dossiers = two.auditor.open(facts)
        for work in (cheat, honest):
            dossiers[work.hotkey].evidence = work.evidence
            dossiers[work.hotkey].picked = {head.version: seed for head, seed in picked(closed, facts, work)}
        assert await two.adopter.reproduce(facts, dossiers[cheat.hotkey], models, accuser="one") >= 2
        assert {entry.accuser for entry in two.failed()} == {"one"}
        assert two.of(cheat.hotkey).convicted_round == NUMBER
        lies = [model.model_copy(update={"hotkey": honest.hotkey}) for model in models]
        assert await two.adopter.reproduce(facts, dossiers[honest.hotkey], lies, accuser="one") == 0
        assert dossiers[honest.hotkey].polar
        assert not two.failed(honest.hotkey)


async def test_a_matrix_that_failed_is_followed_by_those_of_the_other_picked_windows(tmp_path: Path) -> None:
    """A validator that reads a round's first window only sees enough for a verdict all the same."""
    few = {"steps": 1e-9, "readers": 1e-9, "windows": 8.0}
    closed = ClosedRound(tmp_path, bent={(1, 0): adamw_in_its_place}, **few, kind="muon")  # type: ignore[arg-type]
    cheat, honest = closed.stage(1)
    async with Court(closed, patience=30.0) as court:
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET))
    assert dossiers[honest.hotkey].polar == {honest.heads[0].version}
    assert len(dossiers[cheat.hotkey].polar) == 2, "no more than a verdict takes"
    assert judge.of(cheat.hotkey).convicted_round == NUMBER


# -- merges that are taken over -------------------------------------------------------------------------------------


def with_merge(folder: Path, cheat: Callable[[torch.Tensor], torch.Tensor] | None = None) -> ClosedRound:
    """A round in which a merge comes; the second tail makes something else of it."""
    held: list[ClosedRound] = []

    def merge(work: Work, weights: torch.Tensor) -> torch.Tensor:
        closed, stage = held[0], work.engine.plan.index
        after = taken_over(weights, closed.base[stage], closed.public[stage])
        return cheat(after) if cheat is not None and work is closed.stage(1)[1] else after

    class Held(ClosedRound):
        def __init__(self) -> None:
            held.append(self)
            super().__init__(folder, merge=merge)

    return Held()


async def test_a_merge_that_is_taken_over_honestly_follows_from_public_state(tmp_path: Path) -> None:
    closed = with_merge(tmp_path)
    async with Court(closed, patience=30.0) as court:
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET))
    assert not judge.failed()
    for hotkey, work in closed.works.items():
        assert work.merged in dossiers[hotkey].picked, "whatever the seed says"
        found = [one for one in dossiers[hotkey].findings if one.check is Check.WEIGHTS and one.piece is not None]
        assert {one.version for one in found} == {work.merged}
        assert len(found) == len(dossiers[hotkey].merges) == 1


async def test_a_merge_is_looked_at_in_pieces_that_the_windows_seed_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "POOL", 1)
    closed = with_merge(tmp_path, lambda w: w + 1e-3)
    liar = closed.stage(1)[1]
    async with Court(closed, patience=30.0) as court:
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET))
    assert {entry.finding.hotkey for entry in judge.failed()} == {liar.hotkey}
    assert failed_checks(judge, liar.hotkey) == {(Check.WEIGHTS, Grade.PROOF)}
    for hotkey, work in closed.works.items():
        (after,) = (head for head in work.heads if head.merged)
        assert dossiers[hotkey].merges == {(after.version, *closed.pool(work, after).weights)}


@pytest.mark.parametrize(
    "cheat", [lambda w: w + 1e-3, lambda w: w.nextafter(w + 1), lambda w: w.flip(0)], ids=["moved", "rounded", "others"]
)
async def test_who_makes_something_else_of_a_merge_is_proven(
    tmp_path: Path, cheat: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    closed = with_merge(tmp_path, cheat)
    liar = closed.stage(1)[1]
    async with Court(closed, validators=("one", "two"), patience=30.0) as court:
        one, two = court.validators.values()
        facts = closed.facts(SECRET)
        await one.audit(facts)
        assert {entry.finding.hotkey for entry in one.failed()} == {liar.hotkey}
        assert failed_checks(one, liar.hotkey) == {(Check.WEIGHTS, Grade.PROOF)}
        dossier = two.auditor.open(facts)[liar.hotkey]
        dossier.evidence = liar.evidence
        dossier.picked = {head.version: seed for head, seed in picked(closed, facts, liar)}
        model = FindingModel.of(one.failed()[0].finding)
        assert await two.adopter.reproduce(facts, dossier, [model, model], accuser="one") == 1
        assert two.of(liar.hotkey).convicted_round == NUMBER


async def test_nothing_is_said_of_a_merge_where_public_state_is_not_known(tmp_path: Path) -> None:
    closed = with_merge(tmp_path, lambda w: w + 1)
    async with Court(closed, patience=30.0) as court:
        judge, facts = court.validators["one"], closed.facts(SECRET)
        await judge.audit(replace(facts, start=replace(facts.start, known=frozenset())))
    assert not judge.failed()
