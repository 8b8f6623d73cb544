"""A receiver's bounds: wild values are out, honest ones in, and nobody widens a bound for itself or against another."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet.trust.boundary import (
    BLOCK,
    IDLE,
    LEAST,
    SILENCE,
    WIDEST,
    WIDTHS,
    Bounds,
    Numbers,
    magnitudes,
)

SENDERS = ("a", "b", "c")


def honest(seed: int, pushes: int, *, spread: float = 0.05, laplace: bool = False) -> Iterator[tuple[str, Numbers]]:
    """What replicas of one stage send: sizes that grow twentyfold as training goes on, differing from push to push."""
    rng = np.random.default_rng(seed)
    draw = rng.laplace if laplace else rng.normal
    for n in range(pushes):
        drift = 3.0 * (1.0 - math.exp(-n / 300))
        off = draw(0.0, spread, 3)
        yield SENDERS[n % 3], (drift + off[0], 0.25 + 0.3 * off[1], 1.5 + off[2])


def trained(seed: int = 0, *, senders: int = 3, pushes: int = 600) -> Bounds:
    bounds = Bounds()
    for sender, values in honest(seed, pushes):
        if sender in SENDERS[:senders]:
            assert bounds.judge("g", sender, values) is None
    return bounds


def now(seed: int = 0, *, pushes: int = 600) -> Numbers:
    """The last honest push of `trained`."""
    return list(honest(seed, pushes))[-1][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 300], ids=["one block", "several and a part"])
def test_numbers_are_those_of_their_definition(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(8, 128, width, generator=torch.Generator().manual_seed(3)).to(dtype)
    wide = x.double()
    root = wide.square().mean().sqrt()
    expected = (root.log(), (root / wide.abs().mean()).log(), (wide.abs().max() / root).log())
    assert magnitudes(x).numbers == pytest.approx([float(value) for value in expected], abs=1e-5)


def test_numbers_of_silence_and_of_tiny_values_are_finite() -> None:
    for fill in (0.0, 1e-38, 1e-30):
        assert magnitudes(torch.full((4, 8), fill)).numbers == (math.log(SILENCE), 0.0, 0.0)
    assert magnitudes(torch.empty(0, 8)).numbers[0] == math.log(SILENCE)
    assert magnitudes(torch.full((4, 8), 1e-12)).numbers == pytest.approx((math.log(1e-12), 0.0, 0.0), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [-3.0e4, math.inf, -math.inf, math.nan, -math.nan])
def test_the_largest_is_found_whatever_its_sign_and_place(dtype: torch.dtype, value: float) -> None:
    x = torch.randn(3, BLOCK, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[1, 77] = value
    assert magnitudes(x).largest == pytest.approx(abs(float(x[1, 77])), nan_ok=True)


@given(scale=st.floats(1e-6, 1e3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_scaling_moves_the_size_alone(scale: float, seed: int) -> None:
    x = torch.randn(512, generator=torch.Generator().manual_seed(seed))
    (size, peak, crest), scaled = magnitudes(x).numbers, magnitudes(x * scale).numbers
    assert scaled == pytest.approx((size + math.log(scale), peak, crest), abs=1e-4)


@pytest.mark.parametrize("laplace", [False, True])
def test_honest_drift_over_a_whole_training_is_never_refused(laplace: bool) -> None:
    for seed in range(5):
        bounds = Bounds()
        refused = [bounds.judge("y", *push) for push in honest(seed, 2000, laplace=laplace)]
        assert not any(refused)


def test_refusals_stay_within_the_stated_share_where_honest_values_have_wide_laplace_tails() -> None:
    """Wide enough that the factor of two does not protect: the bounds are `WIDTHS` mean deviations, missed by e^-10."""
    refused = pushes = 0
    for seed in range(10):
        bounds = Bounds()
        rng = np.random.default_rng(seed)
        for n in range(2000):
            off = rng.laplace(0.0, 0.2, 3)
            refused += bounds.judge("y", SENDERS[n % 3], (off[0], off[1], off[2])) is not None
            pushes += 1
    assert refused <= 3 * sum(math.exp(-width) for width in WIDTHS) * pushes


def test_a_crest_has_room_for_its_tail_and_a_size_has_not() -> None:
    for number, taken in ((0, False), (1, False), (2, True)):
        bounds, rng = Bounds(), np.random.default_rng(3)
        for _ in range(600):
            off = rng.normal(0.0, 0.15, 3)
            assert bounds.judge("g", "a", (off[0], off[1], off[2])) is None
        far = [0.0, 0.0, 0.0]
        far[number] = 13 * 0.15 * math.sqrt(2 / math.pi)
        assert (bounds.judge("g", "a", (far[0], far[1], far[2])) is None) is taken


@pytest.mark.parametrize("senders", [1, 2, 3])
@pytest.mark.parametrize(
    ("number", "off"),
    [(0, math.log(10)), (0, -math.log(10)), (1, 1.0), (2, 3.0)],
    ids=["tenfold", "a tenth", "few values", "one wild value"],
)
def test_what_is_off_is_refused_at_once_and_says_by_what(senders: int, number: int, off: float) -> None:
    bounds, values = trained(senders=senders), list(now())
    values[number] += off
    outside = bounds.judge("g", "a", (values[0], values[1], values[2]))
    assert outside is not None
    assert outside.name == ("size", "peak", "crest")[number]
    assert abs(outside.value - outside.level) > outside.bound >= LEAST
    assert "limit a factor of" in str(outside)


def test_noise_of_twice_the_signal_is_caught_and_what_is_not_is_known() -> None:
    """`size` grows by log(1 + r^2) / 2; the bound is a factor of two, so r = 1.7 is where noise begins to be seen."""
    for r, seen in ((2.0, True), (0.5, False)):
        size, peak, crest = now()
        noisy = (size + 0.5 * math.log1p(r * r), peak, crest)
        assert (trained().judge("g", "a", noisy) is not None) is seen


def test_slow_boiling_ends_at_the_median_of_the_stage() -> None:
    """One of three grows by half a percent a push. It is stopped near a factor of two; the others are never refused."""
    bounds, base = trained(), now()
    rng = np.random.default_rng(7)
    reached = 0.0
    for n in range(3000):
        off = rng.normal(0.0, 0.03)
        if n % 3:
            assert bounds.judge("g", SENDERS[n % 3], (base[0] + off, base[1], base[2])) is None
        elif bounds.judge("g", "a", (base[0] + 0.005 * n / 3 + off, base[1], base[2])) is None:
            reached = 0.005 * n / 3 + off
    assert reached < LEAST + 0.15
    assert 6 * LEAST < 0.005 * 1000  # it tried to go far beyond


def test_nobody_widens_its_own_bound() -> None:
    """One of three swings ever wider, each swing within its own bound; it counts no more than the others' widths do."""
    bounds, base = trained(), now()
    rng = np.random.default_rng(8)
    widest = 0.0
    for n in range(1500):
        if n % 3:
            off = rng.normal(0.0, 0.03)
            assert bounds.judge("g", SENDERS[n % 3], (base[0] + off, base[1], base[2])) is None
            continue
        swing = (-1) ** (n // 3) * 0.004 * n / 3
        if bounds.judge("g", "a", (base[0] + swing, base[1], base[2])) is None:
            widest = max(widest, abs(swing))
    assert widest < LEAST + 0.2


@pytest.mark.parametrize("off", [2.3, -30.0])
@pytest.mark.parametrize("senders", [2, 3])
def test_a_sender_cannot_get_another_refused(senders: int, off: float) -> None:
    """Whatever one of them sends, for as long as it likes, honest pushes of the others are taken."""
    bounds, base = trained(senders=senders), now()
    rng = np.random.default_rng(9)
    for _ in range(300):
        bounds.judge("g", "a", (base[0] + off, base[1] + off, base[2] - off))
        for other in SENDERS[1:senders]:
            noise = rng.normal(0.0, 0.03)
            assert bounds.judge("g", other, (base[0] + noise, base[1], base[2])) is None


@pytest.mark.parametrize("senders", [2, 3, 5])
def test_a_change_that_all_go_through_is_taken_once_most_show_it(senders: int) -> None:
    bounds, names = Bounds(), [f"s{n}" for n in range(senders)]
    rng = np.random.default_rng(1)
    for n in range(200 * senders):
        bounds.judge("y", names[n % senders], (float(rng.normal(0, 0.02)), 0.2, 1.5))
    refused = [bounds.judge("y", names[n % senders], (2.5, 0.2, 1.5)) for n in range(10 * senders)]
    assert sum(outside is not None for outside in refused) <= senders // 2
    assert not any(refused[senders:])


def test_a_lone_sender_that_changed_for_good_is_taken_in_the_end() -> None:
    """Or its stage would stand still for ever; a tenfold change takes a hundred refusals."""
    bounds, base = trained(senders=1), now()
    refused = 0
    while bounds.judge("g", "a", (base[0] + math.log(10), base[1], base[2])) is not None:
        refused += 1
        assert refused < 300
    assert refused > 50


@pytest.mark.parametrize("senders", [1, 2, 3])
def test_who_comes_back_or_is_new_is_measured_by_the_others(senders: int) -> None:
    bounds, base = trained(senders=senders), now()
    assert bounds.judge("g", "new", base) is None
    assert bounds.judge("g", "newer", (base[0] + math.log(10), base[1], base[2])) is not None


def test_directions_do_not_mix_and_idle_edges_are_forgotten() -> None:
    bounds, base = trained(), now()
    far = (base[0] - 12.0, base[1], base[2])
    assert bounds.judge("y", "a", far) is None
    for _ in range(IDLE + 1):
        bounds.judge("g", "a", base)
    assert set(bounds._directions["g"].edges) == {"a"}


@given(st.lists(st.tuples(st.sampled_from(SENDERS), st.tuples(*[st.floats(-50, 12)] * 3)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_whatever_comes_levels_and_widths_stay_finite_and_bounded(pushes: list[tuple[str, Numbers]]) -> None:
    bounds = Bounds()
    for sender, values in pushes:
        bounds.judge("y", sender, values)
    for edge in bounds._directions["y"].edges.values() if pushes else ():
        assert all(-51 <= level <= 13 for level in edge.levels)
        assert all(0 <= width <= WIDEST for width in edge.widths)
