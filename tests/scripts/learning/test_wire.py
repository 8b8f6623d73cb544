"""What is left of a tensor on the other side."""

import pytest
import torch

from scripts.bench.learning.wire import Crossing, arrived, channels


@pytest.mark.parametrize(
    ("ratio", "bits", "expected"), [(1, 16, 128), (16, 16, 8), (64, 16, 2), (1, 8, 254), (16, 8, 14), (64, 8, 2)]
)
def test_a_ratio_is_one_of_bytes_scales_included(ratio: int, bits: int, expected: int) -> None:
    assert channels(128, ratio, bits) == expected


def test_codes_are_off_by_half_a_step_at_most() -> None:
    x = torch.randn(3, 5, 14, generator=torch.Generator().manual_seed(1))
    step = x.abs().amax(-1, keepdim=True) / 127
    off = (arrived(x, 8) - x).abs()
    assert bool((off <= 0.51 * step + 0.005 * x.abs()).all())  # the scale itself is bf16: 2⁻⁸ of the value
    assert float(off.max()) > 0.25 * float(step.min())
    assert torch.equal(arrived(torch.zeros(1, 2, 3), 8), torch.zeros(1, 2, 3))


def test_rounding_by_chance_keeps_the_mean() -> None:
    x = torch.full((20_000, 1, 2), 0.3)
    x[..., 1] = 127.0
    rounded = arrived(x, 8, torch.Generator().manual_seed(2))
    assert set(rounded[..., 0].flatten().tolist()) == {0.0, 1.0}
    assert float(rounded[..., 0].mean()) == pytest.approx(0.3, abs=0.013)  # 4 standard deviations


def test_gradients_cross_as_values_do() -> None:
    y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)
    g = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(4))
    for bits, passed in ((16, 1.0), (8, 1.0), (16, 0.0)):
        out = Crossing.apply(y, bits, torch.Generator().manual_seed(5), passed)  # type: ignore[no-untyped-call]
        (back,) = torch.autograd.grad(out, y, g)
        assert torch.equal(out, arrived(y.detach(), bits) * passed)
        assert torch.equal(back, arrived(g, bits, torch.Generator().manual_seed(5)) * passed)
