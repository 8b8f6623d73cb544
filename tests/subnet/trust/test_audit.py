"""Replay convicts what was not computed with the committed weights, and agrees with what was."""

import pytest
import torch

from model.config import BoundaryConfig, BoundaryForm
from model.engine import replay_backward, replay_forward, replay_tail
from model.split import split
from model.stage import Stage, build_stage
from subnet.trust.audit import UnitTensors, increment_error, replay, select_units, select_windows
from subnet.trust.ledger import Direction, Evidence, Leaf, Window
from tests.neurons.swarm import tiny

CONFIG = tiny(boundary=BoundaryConfig(form=BoundaryForm.A, width=8))
TOLERANCE = 0.02


def stages() -> list[Stage]:
    return [build_stage(CONFIG, plan, 3) for plan in split(CONFIG, 3)]


def leaf(direction: Direction, *, stage: int, sample: int = 0, version: int = 0, loss: float = 0.0) -> Leaf:
    return Leaf(direction=direction, stage=stage, sample=sample, version=version, loss=loss)


def body_unit() -> tuple[Stage, torch.Tensor, torch.Tensor]:
    """A body stage and one unit's x and g, as they cross the wire."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 32, 8, generator=generator).to(torch.bfloat16)
    g = (torch.randn(4, 32, 8, generator=generator) * 1e-3).to(torch.bfloat16)
    return stages()[1], x, g


def audit(stage: Stage, direction: Direction, x: torch.Tensor, g: torch.Tensor | None, output: torch.Tensor) -> bool:
    return replay(
        stage,
        leaf(direction, stage=1),
        UnitTensors(x, g, output.to(torch.bfloat16)),
        targets=None,
        accumulation=1,
        tolerance=TOLERANCE,
    ).passed


def test_honest_units_pass() -> None:
    stage, x, g = body_unit()
    assert audit(stage, Direction.FORWARD, x, None, replay_forward(stage, x.float()))
    dx = replay_backward(stage, x.float(), g.float())
    assert dx is not None
    assert audit(stage, Direction.BACKWARD, x, g, dx)


@pytest.mark.parametrize("cheat", ["pass-through", "noise", "other weights", "stale input", "half layers"])
def test_cheating_forwards_fail(cheat: str) -> None:
    stage, x, _ = body_unit()
    y = replay_forward(stage, x.float())
    wrong = {
        "pass-through": x.float(),
        "noise": y + 0.05 * (y - x.float()).norm(dim=-1, keepdim=True) * torch.randn_like(y) / 8**0.5,
        "other weights": replay_forward(build_stage(CONFIG, stage.plan, 4), x.float()),
        "stale input": replay_forward(stage, x.float().flip(0)),
        "half layers": x.float() + 0.5 * (y - x.float()),
    }[cheat]
    assert not audit(stage, Direction.FORWARD, x, None, wrong)


def test_a_cosine_of_ninety_percent_does_not_pass() -> None:
    stage, x, _ = body_unit()
    y = replay_forward(stage, x.float())
    noise = torch.randn_like(y)
    noisy = y + 0.48 * noise * y.norm() / noise.norm()
    assert torch.cosine_similarity(noisy.flatten(), y.flatten(), dim=0) > 0.89
    assert not audit(stage, Direction.FORWARD, x, None, noisy)


def test_scaled_gradient_fails() -> None:
    stage, x, g = body_unit()
    dx = replay_backward(stage, x.float(), g.float())
    assert dx is not None
    assert not audit(stage, Direction.BACKWARD, x, g, g.float() + 1.5 * (dx - g.float()))


def test_a_tail_that_lies_about_its_loss_fails() -> None:
    tail = stages()[2]
    _, x, _ = body_unit()
    targets = torch.randint(0, CONFIG.vocab, (4, 32), generator=torch.Generator().manual_seed(2))
    loss, dx = replay_tail(tail, x.float(), targets, accumulation=2)
    assert dx is not None
    for claimed, passes in ((loss, True), (loss * 0.9, False), (float("nan"), False)):
        verdict = replay(
            tail,
            leaf(Direction.BACKWARD, stage=2, loss=claimed),
            UnitTensors(x, None, dx.to(torch.bfloat16)),
            targets=targets,
            accumulation=2,
            tolerance=TOLERANCE,
        )
        assert verdict.passed is passes, verdict.reason


def test_increments_are_judged_not_outputs() -> None:
    carried = torch.randn(1, 100, 8) * 100
    replayed = carried + torch.randn(1, 100, 8)
    assert torch.cosine_similarity(carried.flatten(), replayed.flatten(), dim=0) > 0.999
    assert increment_error(carried, replayed, carried) == pytest.approx(1.0, abs=1e-3)


def test_selection_is_public_for_windows_and_private_for_units() -> None:
    leaves = tuple(leaf(Direction.FORWARD, stage=1, sample=sample, version=sample // 8) for sample in range(64))
    table = Evidence(leaves, tuple(Window(version, 8, b"w" * 32) for version in range(8)))
    picks = {select_windows(table, seed=bytes([seed]), hotkey="m", count=1)[0].version for seed in range(60)}
    assert picks == set(range(8))
    window = table.windows[3]
    one, two = (
        select_units(table, window, seed=b"s", hotkey="m", validator=validator, count=3) for validator in ("v1", "v2")
    )
    assert {entry.version for entry in (*one, *two)} == {3}
    assert one != two
    assert one == select_units(table, window, seed=b"s", hotkey="m", validator="v1", count=3)
