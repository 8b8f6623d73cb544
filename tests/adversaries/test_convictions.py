"""A cheater that always cheats is convicted in its first audited round, by its own checks, and nobody else is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from subnet.trust.finding import Check, Finding
from subnet.trust.ledger import Direction
from tests.adversaries.engine import CheatingEngine, Memory
from tests.adversaries.kinds import PROFILES, Kind, Plan, Role
from tests.adversaries.places import fits
from tests.neurons.audited import NUMBER, ClosedRound, Court

SECRET = b"a secret"
STAGES = 3
HEAD, BODY, TAIL = range(STAGES)
IDLE = {Kind.ZERO_GRADIENT, Kind.NO_BACKWARD}
"""At a head nothing that they send on is wrong, only their step is."""
CAUGHT = [
    *((kind, BODY) for kind, profile in PROFILES.items() if profile.falsifies and fits(profile.role, BODY, STAGES)),
    *((kind, HEAD) for kind in (Kind.NOISE, Kind.WRONG_DATA, *sorted(IDLE))),
    *((kind, TAIL) for kind in (Kind.NOISE, Kind.POISONED_LOSS, Kind.REPLAY, *sorted(IDLE))),
]
ALWAYS = {
    (Kind.SIGN_FLIP, BODY),
    (Kind.SKIPPED_LAYER, BODY),
    (Kind.LOW_PRECISION, BODY),
    (Kind.WRONG_DATA, HEAD),
    (Kind.NO_BACKWARD, HEAD),
    (Kind.POISONED_LOSS, TAIL),
    (Kind.REPLAY, TAIL),
}
"""One of each way to be found; the others take their time in the long suite."""
STRENGTH = {Kind.STALE_WEIGHTS: 1.0}
"""Where the kind's own needs more windows than the round has."""


def cheated(folder: Path, kind: Kind, stage: int) -> ClosedRound:
    """A round in which the first replica of `stage` cheats with every unit."""
    generator = torch.Generator().manual_seed(9)
    plan = Plan.of(kind, strength=STRENGTH.get(kind))
    memory = Memory(plan, lambda: torch.randint(0, 512, (4, 32), generator=generator))
    for direction in Direction:
        memory.siblings[direction] = (torch.randn(4, 32, 16, generator=generator), 5.0)
    engine = partial(CheatingEngine, cheat=plan, memory=memory)
    return ClosedRound(folder, stages=STAGES, engines={(stage, 0): engine})


async def audited(closed: ClosedRound, hotkey: str) -> tuple[int | None, list[Finding], set[str]]:
    """(the round `hotkey` is convicted in, its failed findings, who else has any)."""
    async with Court(closed) as court:
        judge = court.validators["one"]
        await judge.audit(closed.facts(SECRET))
        others = {entry.finding.hotkey for entry in judge.failed()} - {hotkey}
        return judge.of(hotkey).convicted_round, [entry.finding for entry in judge.failed(hotkey)], others


@pytest.mark.parametrize(
    ("kind", "stage"), [pytest.param(*one, marks=() if one in ALWAYS else pytest.mark.long) for one in CAUGHT]
)
async def test_who_cheats_always_is_convicted_in_its_first_round(tmp_path: Path, kind: Kind, stage: int) -> None:
    closed = cheated(tmp_path, kind, stage)
    convicted, failed, others = await audited(closed, closed.stage(stage)[0].hotkey)
    assert not others
    assert convicted == NUMBER
    assert {finding.check for finding in failed} <= PROFILES[kind].convicts
    if kind in IDLE and stage == HEAD:
        assert {finding.check for finding in failed} == {Check.GRADIENT}


async def test_a_share_of_units_fails_a_share_of_replays(tmp_path: Path) -> None:
    plan = Plan.of(Kind.SIGN_FLIP, share=0.5, seed=1)
    engine = partial(CheatingEngine, cheat=plan, memory=Memory(plan))
    closed = ClosedRound(tmp_path, stages=2, samples=64, engines={(1, 0): engine})
    work = closed.stage(1)[0]
    assert work.evidence is not None
    wrong = {
        leaf.sample
        for leaf in work.evidence.leaves
        if plan.cheats(version=leaf.version, sample=leaf.sample, direction=leaf.direction)
    }
    assert 0.3 < len(wrong) / len(work.evidence.leaves) < 0.7
    async with Court(closed) as court:
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET))
        replayed = {key.sample for key in dossiers[work.hotkey].replayed}
        failed = {entry.finding.sample for entry in judge.failed(work.hotkey)}
    assert failed == replayed & wrong
    assert failed


def test_every_role_is_tried() -> None:
    assert {PROFILES[kind].role for kind, _ in CAUGHT} == {Role.ANY, Role.HEAD, Role.NOT_HEAD, Role.TAIL}
    assert {Check.FORWARD, Check.BACKWARD, Check.LOSS} <= {
        check for kind, _ in CAUGHT for check in PROFILES[kind].convicts
    }
