"""The memory plan: against hand counts, against a stage's real tensors, and what it chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from model.config import BoundaryConfig, BoundaryForm, ConfigError, preset
from model.devices import device
from model.engine import StageEngine
from model.memory import (
    RESERVE,
    DoesNotFitError,
    Units,
    graph_bytes,
    least_recompute,
    mean_open,
    recomputed_share,
    require_fit,
    stage_memory,
)
from model.optimizer import Kind, OptimizerConfig
from model.recompute import Recompute
from model.split import split
from model.stage import build_stage

_A100 = device("a100-80gb")
_MICROBATCH = Units(batch=8, sequence=1_024)


def test_the_states_of_a_100b_stage_are_those_of_the_published_run() -> None:
    # facts: 6.48 billion parameters, 51.9 GB of weights, gradients and two bf16 moments.
    published = replace(preset("100b"), boundary=BoundaryConfig(form=BoundaryForm.A, width=144))
    plan = split(published, 16)[5]
    memory = stage_memory(published, plan, _A100, _MICROBATCH, open_units=16, recompute=Recompute.FULL, graphs=0)
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(51.9e9, rel=0.002)
    assert memory.in_flight == 16 * 8_192 * 144 * 2
    assert memory.reserve == RESERVE
    assert memory.total < 80e9


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("stages", [1, 4])
def test_states_are_the_bytes_that_an_engine_holds(stages: int, kind: Kind) -> None:
    config = preset("pico")
    units = Units(batch=2, sequence=16, value_bytes=4, moment_bytes=4, optimizer=kind)
    for plan in split(config, stages):
        stage = build_stage(config, plan, seed=0)
        engine = StageEngine(
            stage,
            OptimizerConfig(kind=kind, lr=1e-3),
            plan,
            n_total_params=1_000_000,
            accumulation=1,
            recompute=Recompute.FULL,
            capacity=4,
        )
        tokens = torch.zeros(2, 16, dtype=torch.int64)
        x = tokens if plan.is_first else torch.randn(2, 16, config.boundary_width)
        if plan.is_last:
            engine.tail("a", x, tokens, tokens)
        else:
            engine.backward("a", torch.ones_like(engine.forward("a", x, tokens)))
        gradients = sum(p.grad.numel() * 4 for p in stage.parameters() if p.grad is not None)
        engine.step()
        memory = stage_memory(config, plan, _A100, units, open_units=1, recompute=Recompute.FULL, graphs=0)
        weights = sum(p.numel() * 4 for p in stage.parameters())
        assert memory.weights == weights
        assert memory.gradients == gradients
        assert memory.optimizer == 4 * engine.moments().numel()
        assert memory.in_flight == x.numel() * x.itemsize


def test_the_least_recompute_that_fits_is_chosen() -> None:
    config, plan = preset("100b"), split(preset("100b"), 16)[10]
    small = Units(batch=1, sequence=1_024)
    roomy = least_recompute(config, plan, device("b200"), small, open_units=8)
    assert (roomy.recompute, roomy.graphs) == (Recompute.KEEP, 8)
    tighter = least_recompute(config, plan, device("h200"), Units(batch=2, sequence=1_024), open_units=24)
    assert (tighter.recompute, tighter.graphs) == (Recompute.SELECTIVE, 24)
    partly = least_recompute(config, plan, _A100, small, open_units=24)
    assert partly.recompute is Recompute.SELECTIVE
    assert 0 < partly.graphs < 24
    assert partly.free < graph_bytes(config, plan, small, Recompute.SELECTIVE)
    full = least_recompute(config, plan, _A100, _MICROBATCH, open_units=16)
    assert (full.recompute, full.graphs) == (Recompute.FULL, 0)
    assert all(choice.free >= 0 for choice in (roomy, tighter, partly, full))


def test_what_fits_no_way_says_by_how_much_and_what_would() -> None:
    config = preset("100b")
    with pytest.raises(DoesNotFitError) as caught:
        require_fit(config, 8, [_A100] * 8, _MICROBATCH, open_units=[16] * 8)
    message = str(caught.value)
    assert "\n" not in message
    assert "of 8 needs" in message
    assert "GB more than the 80 GB of a a100-80gb" in message
    assert "--stages" in message
    assert "--gpu h200" in message
    wide = Units(batch=8, sequence=1_024, moment_bytes=4)
    with pytest.raises(DoesNotFitError, match="--moments bf16"):
        require_fit(config, 16, [_A100] * 16, wide, open_units=[16] * 16)
    require_fit(config, 16, [_A100] * 16, _MICROBATCH, open_units=[16] * 16)


def test_a_smaller_microbatch_is_offered_where_it_fits() -> None:
    large = Units(batch=32, sequence=1_024)
    with pytest.raises(DoesNotFitError, match=r"--batch (8|16)"):
        require_fit(preset("100b"), 16, [_A100] * 16, large, open_units=[16] * 16)


def test_early_stages_hold_more_open_units_than_late_ones() -> None:
    held = [mean_open(32, 16, index) for index in range(16)]
    assert held == sorted(held, reverse=True)
    assert held[0] == pytest.approx(31)
    assert held[-1] == 0


def test_steps_and_missing_room_make_a_share_recompute() -> None:
    assert recomputed_share(16, 16, 64) == pytest.approx(0.25)
    assert recomputed_share(16, 8, 64) == pytest.approx(1 - 0.5 * 0.75)
    assert recomputed_share(16, 0, 64) == 1
    assert recomputed_share(80, 80, 64) == 1
    assert recomputed_share(0, 0, 64) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [({"batch": 0}, "batch is 0"), ({"sequence": 0}, "sequence 0"), ({"moment_bytes": 3}, "moment_bytes is 3")],
)
def test_what_is_no_microbatch_is_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Units(**{"batch": 1, "sequence": 8, **change})
