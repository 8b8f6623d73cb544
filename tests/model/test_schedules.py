"""The rate of every step against torch's schedulers and a table written by hand."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from model.config import ConfigError
from model.optimizer import OptimizerConfig, Schedule, learning_rate

LR, WARM, STEPS = 3e-3, 7, 50


def of(schedule: Schedule, **changes: float) -> OptimizerConfig:
    return replace(OptimizerConfig(lr=LR, warmup_steps=WARM, schedule=schedule, steps=STEPS), **changes)  # type: ignore[arg-type]


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)


def warmed(optimizer: torch.optim.Optimizer, *after: LRScheduler, at: tuple[int, ...] = ()) -> LRScheduler:
    """torch's linear warm-up, and what follows it from step WARM and the steps `at` on."""
    first = LinearLR(optimizer, start_factor=1 / WARM, total_iters=WARM - 1)
    return SequentialLR(optimizer, [first, *after], milestones=[WARM, *at])


def rates(scheduler: LRScheduler, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_the_constant_rate_is_warmed_up_as_torch_does_it() -> None:
    optimizer = sgd()
    expected = rates(warmed(optimizer, LambdaLR(optimizer, lambda _: 1.0)), 2 * STEPS)
    config = of("constant")
    assert [learning_rate(config, step) for step in range(2 * STEPS)] == pytest.approx(expected)


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_cosine_is_the_one_of_torch_and_stays_at_its_floor(floor: float) -> None:
    optimizer = sgd()
    down = CosineAnnealingLR(optimizer, T_max=STEPS - WARM, eta_min=floor * LR)
    expected = rates(warmed(optimizer, down), STEPS + 1)
    config = of("cosine", floor=floor)
    assert [learning_rate(config, step) for step in range(STEPS + 1)] == pytest.approx(expected, abs=1e-12)
    assert [learning_rate(config, step) for step in (STEPS, STEPS + 1, 10**9)] == pytest.approx([floor * LR] * 3)


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_wsd_is_warm_up_a_plateau_and_a_line_down(floor: float) -> None:
    optimizer = sgd()
    plateau = LambdaLR(optimizer, lambda _: 1.0)
    down = LinearLR(optimizer, start_factor=1.0, end_factor=floor, total_iters=10)
    expected = rates(warmed(optimizer, plateau, down, at=(40,)), STEPS + 20)
    config = of("wsd", cooldown=0.2, floor=floor)
    assert [learning_rate(config, step) for step in range(STEPS + 20)] == pytest.approx(expected, abs=1e-12)


def test_wsd_sqrt_falls_fast_first() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="wsd-sqrt", steps=8, cooldown=0.5, floor=0.2)
    table = {0: 0.5, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 0.6, 6: 1 - 0.8 * math.sqrt(0.5), 7: 1 - 0.8 * math.sqrt(0.75)}
    assert {step: learning_rate(config, step) for step in table} == pytest.approx(table)
    assert learning_rate(config, 8) == learning_rate(config, 80) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_the_rate_never_jumps_nor_rises_after_warm_up(schedule: Schedule) -> None:
    config = of(schedule, cooldown=0.86, floor=0.05, steps=1000)
    found = [learning_rate(config, step) for step in range(1100)]
    assert found[:WARM] == pytest.approx([LR * (step + 1) / WARM for step in range(WARM)])
    falls = [a - b for a, b in zip(found[WARM:], found[WARM + 1 :], strict=False)]
    assert min(falls) >= 0
    assert max(falls) < 0.05 * LR, "one over the root of 860 steps of the cooldown is the steepest"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schedule": "step"}, "optimizer.schedule is 'step'; it must be one of constant, wsd, wsd-sqrt, cosine"),
        ({"floor": -0.1}, r"optimizer.floor is -0\.1"),
        ({"floor": math.nan}, "optimizer.floor is nan"),
        ({"cooldown": 0.0}, r"optimizer.cooldown is 0\.0"),
        ({"cooldown": 1.5}, r"optimizer.cooldown is 1\.5"),
        ({"steps": 0}, "optimizer.steps is 0.*raise optimizer.steps"),
        ({"steps": 0, "warmup_steps": 0}, "optimizer.steps is 0"),
        ({"steps": 9, "cooldown": 0.5}, r"leaves 4\.5 before it comes down; warm-up takes 7"),
        ({"schedule": "cosine", "steps": 6}, "leaves 6 before it comes down; warm-up takes 7"),
    ],
)
def test_schedules_that_cannot_be_are_refused_in_one_line(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        OptimizerConfig(**{"lr": LR, "warmup_steps": WARM, "schedule": "wsd", "steps": STEPS, **change})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
