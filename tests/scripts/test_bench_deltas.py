"""The bench of weight deltas: what it calls bf16 is bf16, and shares grow as weights move."""

import pytest
import torch

from scripts.bench.deltas import Share, shares, stochastic_bf16


def test_rounding_gives_neighbouring_bf16_values_and_keeps_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([1.001, -0.3337, 3e-5]).repeat_interleave(40_000)
    rounded = stochastic_bf16(weights, generator)
    assert torch.equal(rounded, rounded.bfloat16().float())
    for value, found in zip(weights.view(3, -1), rounded.view(3, -1), strict=True):
        assert len(found.unique()) == 2
        assert float(found.min()) < float(value[0]) < float(found.max())
        step = float(found.max() - found.min())
        assert float(found.double().mean()) == pytest.approx(float(value[0]), abs=0.02 * step)


def test_what_is_bf16_already_stays() -> None:
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    assert torch.equal(stochastic_bf16(weights, torch.Generator().manual_seed(2)), weights)


def test_deltas_grow_with_steps_and_are_smaller_where_few_weights_change() -> None:
    found: dict[str, list[Share]] = {
        weights: list(shares("nano", weights, 1e-4, 128, settled=1, steps=(1, 2), stages=2, seed=0))
        for weights in ("fp32", "bf16")
    }
    for rows in found.values():
        assert [row.steps for row in rows] == [1, 2]
        assert 0 < rows[0].share < rows[1].share < 1
        assert all(row.share <= row.largest for row in rows)
    assert found["bf16"][1].share < found["fp32"][1].share
    assert found["bf16"][1].unchanged > 0.2 > found["fp32"][1].unchanged
