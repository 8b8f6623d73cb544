"""Where values and moments of a stage lie, against the vectors themselves."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.accounting import stage_moments
from model.config import preset
from model.engine import StageEngine, StateError
from model.layout import Layout
from model.optimizer import Kind, OptimizerConfig, takes_muon
from model.recompute import Recompute
from model.split import split
from model.stage import build_stage, flatten
from tests.model.test_muon import CONFIG, MODEL, PLANS

KINDS = pytest.mark.parametrize("kind", get_args(Kind))


def stepped(kind: Kind, index: int) -> StageEngine:
    engine = StageEngine(
        build_stage(MODEL, PLANS[index], 5),
        replace(CONFIG, kind=kind),
        PLANS[index],
        n_total_params=10**4,
        accumulation=1,
        recompute=Recompute.KEEP,
        capacity=1,
    )
    for number, (_, p) in enumerate(sorted(engine.stage.named_parameters())):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    engine._accumulated = 1
    engine.step()
    return engine


@KINDS
@pytest.mark.parametrize("index", range(3))
def test_a_plan_lays_out_what_an_engine_has(kind: Kind, index: int) -> None:
    engine = stepped(kind, index)
    layout = Layout.planned(MODEL, PLANS[index], kind)
    assert layout == engine.layout
    assert layout.values == flatten(engine.stage).numel()
    assert layout.moments == engine.moments().numel()
    flat, moments, named = flatten(engine.stage), engine.moments(), dict(engine.stage.named_parameters())
    for place in layout.places:
        span, later = place.span, layout.second(place.span)
        p = named[place.name]
        state = engine._optimizer.state[p]
        assert place.shape == p.shape
        assert torch.equal(flat[span.start : span.stop], p.detach().flatten())
        assert torch.equal(moments[span.start : span.stop], state["exp_avg"].flatten())
        assert place.adaptive == ("exp_avg_sq" in state)
        if place.adaptive:
            assert torch.equal(moments[later.start : later.stop], state["exp_avg_sq"].flatten())
        else:
            assert not later


@KINDS
def test_only_muon_leaves_second_moments_out(kind: Kind) -> None:
    for plan in PLANS:
        layout = Layout.planned(MODEL, plan, kind)
        taken = sum(len(place.span) for place in layout.matrices)
        assert (taken > 0) == (kind == "muon")
        assert layout.moments == 2 * layout.values - taken


@given(st.integers(0, 2), st.data())
def test_second_moments_of_a_stretch_are_those_of_its_values(index: int, data: st.DataObject) -> None:
    layout = Layout.planned(MODEL, PLANS[index], "muon")
    start = data.draw(st.integers(0, layout.values - 1))
    span = range(start, data.draw(st.integers(start + 1, layout.values)))
    adaptive = [place.adaptive for place in layout.places for _ in place.span]
    later = layout.second(span)
    assert len(later) == sum(adaptive[span.start : span.stop])
    assert later.start == layout.values + sum(adaptive[: span.start])
    inside = list(layout.within(span))
    assert [value for _, part in inside for value in part] == list(span)
    assert all(part.start >= place.start and part.stop <= place.span.stop for place, part in inside)


@KINDS
@pytest.mark.parametrize(("model", "stages"), [("nano", 4), ("pico", 2), ("100b", 16), ("nano", 1)])
def test_moments_are_counted_without_a_stage(kind: Kind, model: str, stages: int) -> None:
    config = preset(model)
    for plan in split(config, stages):
        assert stage_moments(config, plan, kind) == Layout.planned(config, plan, kind).moments


def test_a_stage_of_100b_keeps_few_second_moments() -> None:
    config = preset("100b")
    middle = Layout.planned(config, split(config, 16)[8], "muon")
    assert middle.values > 6e9
    table = 128_256 * 1_152
    assert middle.moments - middle.values - table < 1e-4 * middle.values


def test_a_muon_checkpoint_is_taken_over_whole_and_another_kind_refused() -> None:
    engine, other = stepped("muon", 1), stepped("adamw", 1)
    fresh = stepped("muon", 1)
    state = {name: tensor.clone() for name, tensor in engine.state().items()}
    for name in state:
        matrix = name.startswith("optimizer.layers") and "norm" not in name
        assert not matrix or name.endswith(".exp_avg"), name
    engine.stage.layers["1"].ffn.up.weight.grad = torch.ones(24, 16)  # type: ignore[union-attr]
    engine._accumulated = 1
    engine.step()
    fresh.load_state(state)
    fresh.stage.layers["1"].ffn.up.weight.grad = torch.ones(24, 16)  # type: ignore[union-attr]
    fresh._accumulated = 1
    fresh.step()
    assert torch.equal(flatten(fresh.stage), flatten(engine.stage))
    assert torch.equal(fresh.moments(), engine.moments())
    with pytest.raises(StateError, match=r"lacks 'optimizer\.layers"):
        other.load_state(state)
    with pytest.raises(StateError, match="which stage 1 lacks"):
        fresh.load_state(other.state())


def test_moments_before_the_first_step_are_zeros() -> None:
    stage = build_stage(MODEL, PLANS[0], 5)
    config = OptimizerConfig(kind="muon", lr=1e-3)
    engine = StageEngine(
        stage, config, PLANS[0], n_total_params=1, accumulation=1, recompute=Recompute.KEEP, capacity=1
    )
    assert engine.moments().shape == (engine.layout.moments,)
    assert not engine.moments().any()
    assert any(takes_muon("muon", name, p) for name, p in stage.named_parameters())
