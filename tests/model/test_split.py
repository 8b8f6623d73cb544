"""The split is contiguous and complete; none has a lower maximum or, at that maximum, less variance."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ConfigError, ModelConfig, preset
from model.split import Role, StagePlan, split, stage_cost


def _config(layers: int, vocab: int) -> ModelConfig:
    return ModelConfig(vocab=vocab, hidden=8, layers=layers, heads=2, kv_heads=1, ffn=16, context=8)


@given(layers=st.integers(1, 200), stages=st.integers(1, 200), vocab=st.integers(1, 5_000))
def test_every_layer_is_held_once_and_roles_fit(layers: int, stages: int, vocab: int) -> None:
    stages = min(stages, layers)
    plans = split(_config(layers, vocab), stages)
    assert [plan.index for plan in plans] == list(range(stages))
    assert plans[0].first_layer == 0
    assert plans[-1].last_layer == layers
    assert all(left.last_layer == right.first_layer for left, right in pairwise(plans))
    assert all(plan.layers >= 1 and plan.count == stages for plan in plans)
    roles = [plan.role for plan in plans]
    assert roles == ([Role.SOLO] if stages == 1 else [Role.HEAD, *[Role.BODY] * (stages - 2), Role.TAIL])


@given(layers=st.integers(1, 9), stages=st.integers(1, 5), vocab=st.integers(1, 400))
def test_no_split_is_better(layers: int, stages: int, vocab: int) -> None:
    stages = min(stages, layers)
    config = _config(layers, vocab)

    def score(cuts: tuple[int, ...]) -> tuple[int, int]:
        edges = [0, *cuts, layers]
        plans = [StagePlan(i, stages, a, b, Role.BODY) for i, (a, b) in enumerate(pairwise(edges))]
        costs = [stage_cost(config, plan) for plan in plans]
        return max(costs), sum(cost * cost for cost in costs)

    chosen = tuple(plan.first_layer for plan in split(config, stages)[1:])
    assert score(chosen) == min(score(cuts) for cuts in combinations(range(1, layers), stages - 1))


def test_100b_in_16_stages_has_lighter_ends() -> None:
    plans = split(preset("100b"), 16)
    layers = [plan.layers for plan in plans]
    assert layers == [5, 5, 5, 5, *[6] * 11, 4]
    head = stage_cost(preset("100b"), plans[-1]) / stage_cost(preset("100b"), plans[0]) * 5 - 4
    assert head == pytest.approx(1.09, abs=0.01)


@pytest.mark.parametrize("stages", [0, 9])
def test_too_many_or_too_few_stages_are_refused(stages: int) -> None:
    with pytest.raises(ConfigError, match=f"stages is {stages}; it must be from 1 to the model's 8 layers"):
        split(preset("nano"), stages)
