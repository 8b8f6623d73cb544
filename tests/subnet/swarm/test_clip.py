"""The norm clip: exact norms, whatever the order, and factors that touch nobody but the loud."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subnet.swarm.clip import CHUNK, factors, norm

LONG = CHUNK + 12_345


def test_the_norm_is_the_euclidean_one() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert norm(values) == pytest.approx(float(values.double().norm()), rel=1e-6)
    assert norm(torch.zeros(5)) == 0.0
    assert norm(torch.zeros(0)) == 0.0
    assert norm(torch.tensor([3.0, -4.0]) * 1e30) == pytest.approx(5e30, rel=1e-6)
    assert norm(torch.tensor([3.0, -4.0]) * 1e-38) == pytest.approx(5e-38, rel=1e-6)


def test_the_order_of_values_does_not_change_a_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(LONG, generator=generator) * torch.logspace(-6, 3, LONG)
    mixed = values[torch.randperm(LONG, generator=generator)]
    assert norm(values) == norm(mixed) == norm(-values)
    assert norm(values[::2].contiguous()) == norm(values[::2]), "a view as its copy"


@given(st.lists(st.just(0.0) | st.floats(1e-30, 1e6), min_size=1, max_size=9), st.floats(1, 4))
def test_factors_bound_everybody_by_the_median(norms: list[float], clip: float) -> None:
    scaled = factors(norms, clip)
    assert len(scaled) == len(norms)
    moved = sorted(size for size in norms if size > 0)
    for size, factor in zip(norms, scaled, strict=True):
        assert 0 < factor <= 1
        if moved:
            most = clip * moved[(len(moved) - 1) // 2]
            assert size * factor <= most * (1 + 1e-12)
            assert factor == 1 or size > most


def test_who_does_nothing_has_no_say() -> None:
    assert factors([0.0, 0.0, 5.0], 2.0) == (1.0, 1.0, 1.0)
    assert factors([0.0, 0.0], 2.0) == (1.0, 1.0)
    assert factors([], 2.0) == ()


def test_one_of_two_is_bounded_by_the_other() -> None:
    assert factors([1.0, 10.0], 2.0) == (1.0, 0.2)
    assert factors([1.0, 1.9], 2.0) == (1.0, 1.0)
