"""Error feedback loses nothing, stays bounded, and is what makes a sparse merge learn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.optimizer import OuterConfig
from subnet.swarm.codec import Bf16, Codec, DeltaError, Int8, TopK2Bit, compress, no_residual, reach, rejected
from subnet.swarm.merge import Merged, mean, step

CODEC = TopK2Bit()
COUNT = 5000


def deltas(rounds: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(COUNT, generator=generator) ** 3 * 1e-3 for _ in range(rounds)]


@settings(max_examples=25, deadline=None)
@given(rounds=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_nothing_is_lost_without_decay(rounds: int, seed: int) -> None:
    feedback, total = no_residual(CODEC, COUNT, 1.0), torch.zeros(COUNT, dtype=torch.float64)
    given_up = deltas(rounds, seed)
    for delta in given_up:
        payload, sent, feedback = compress(CODEC, delta, feedback)
        assert torch.equal(CODEC.decode(payload, COUNT), sent)
        total += sent.double()
    torch.testing.assert_close(
        total + feedback.residual.double(), sum(given_up, torch.zeros(1)).double(), rtol=0, atol=1e-6
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), decay=st.sampled_from([0.5, 0.9, 0.95]))
def test_residual_and_payload_are_bounded(seed: int, decay: float) -> None:
    feedback, largest = no_residual(CODEC, COUNT, decay), 0.0
    for delta in deltas(20, seed):
        largest = max(largest, float(delta.abs().max()))
        _, sent, feedback = compress(CODEC, delta, feedback)
        assert float(sent.abs().max()) <= largest * reach(CODEC, decay)
        assert float(feedback.residual.abs().max()) <= largest / (1 - decay)


def test_a_constant_delta_gets_through() -> None:
    """64 values of a chunk per round: after 64 rounds each of equal values had its turn, decay or not."""
    delta = torch.randn(4096, generator=torch.Generator().manual_seed(0)).sign() * 1e-3
    feedback, total = no_residual(CODEC, 4096, 0.95), torch.zeros(4096)
    for _ in range(64):
        _, sent, feedback = compress(CODEC, delta, feedback)
        total += sent
    assert bool((total.sign() == delta.sign()).all())


def test_values_of_any_size_get_through_without_decay() -> None:
    delta = torch.linspace(0.1, 1, 4096)
    feedback, total = no_residual(CODEC, 4096, 1.0), torch.zeros(4096)
    for _ in range(400):
        _, sent, feedback = compress(CODEC, delta, feedback)
        total += sent
    torch.testing.assert_close(total / 400, delta, rtol=0, atol=0.1)


def test_what_was_left_out_of_a_merge_is_owed_again() -> None:
    first, second = deltas(2, 3)
    _, sent, after = compress(CODEC, first, no_residual(CODEC, COUNT, 1.0))
    again = rejected(after, sent)
    torch.testing.assert_close(again.residual, first)
    _, sent, after = compress(CODEC, second, again)
    torch.testing.assert_close(sent + after.residual, first + second)


@pytest.mark.parametrize("codec", [Int8(), Bf16()], ids=lambda codec: codec.name)
def test_codecs_without_feedback_owe_nothing(codec: Codec) -> None:
    (delta,) = deltas(1, 4)
    feedback = no_residual(codec, COUNT, 0.95)
    payload, sent, after = compress(codec, delta, feedback)
    assert payload == codec.encode(delta)
    assert torch.equal(sent, codec.decode(payload, COUNT))
    assert after is feedback
    assert rejected(after, sent) is feedback
    assert feedback.residual.numel() == 0


def test_a_delta_that_is_not_finite_leaves_the_feedback_as_it_is() -> None:
    feedback = no_residual(CODEC, COUNT, 0.95)
    (delta,) = deltas(1, 5)
    delta[7] = math.nan
    with pytest.raises(DeltaError, match="nan"):
        compress(CODEC, delta, feedback)
    assert not bool(feedback.residual.any())


def test_sizes_and_decay_are_checked() -> None:
    with pytest.raises(ValueError, match="residual has 5000 values, topk2bit needs 4999"):
        compress(CODEC, torch.zeros(4999), no_residual(CODEC, COUNT, 0.95))
    with pytest.raises(ValueError, match="residual has 5000 values, bf16 needs 0"):
        compress(Bf16(), torch.zeros(COUNT), no_residual(CODEC, COUNT, 0.95))
    for decay in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="decay is"):
            no_residual(CODEC, COUNT, decay)
    assert reach(CODEC, 1.0) == math.inf
    assert reach(Int8(), 0.95) < 1.01


class Regression:
    """A student of 3,944 weights learns a teacher's outputs; K replicas take local SGD steps on data of their own."""

    REPLICAS, STEPS, BATCH = 4, 15, 32
    SHAPES = ((32, 96), (96,), (96, 8), (8,))

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.first = self._randn(32, 48) * 2 / 32**0.5
        self.second = self._randn(48, 8) / 48**0.5
        self.scales = torch.logspace(0, -1, 32) * 2
        self.start = torch.cat([(self._randn(*s) / s[0] ** 0.5 * (len(s) > 1)).flatten() for s in self.SHAPES])
        self.held_out = self._data(1, 2000)

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _data(self, replicas: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self._randn(replicas, rows, 32) * self.scales
        return x, torch.tanh(x @ self.first) @ self.second + 0.1 * self._randn(replicas, rows, 8)

    def _loss(self, weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Summed over replicas; weights (replicas, n)."""
        sizes = [math.prod(shape) for shape in self.SHAPES]
        a, b, c, d = (
            part.view(len(weights), *(shape if len(shape) > 1 else (1, *shape)))
            for part, shape in zip(weights.split(sizes, dim=1), self.SHAPES, strict=True)
        )
        return ((torch.tanh(x @ a + b) @ c + d - y) ** 2).mean(dim=(1, 2)).sum()

    def round(self, theta: torch.Tensor) -> torch.Tensor:
        """Pseudo-gradients (replicas, n) of one round from θ."""
        weights = theta.repeat(self.REPLICAS, 1).requires_grad_()
        for _ in range(self.STEPS):
            (gradient,) = torch.autograd.grad(self._loss(weights, *self._data(self.REPLICAS, self.BATCH)), weights)
            weights = (weights.detach() - 0.05 * gradient).requires_grad_()
        return theta - weights.detach()

    def loss(self, theta: torch.Tensor) -> float:
        return float(self._loss(theta[None], *self.held_out))


@pytest.fixture(scope="module")
def reached() -> dict[str, float]:
    """Held-out loss after 60 rounds: dense averaging, topk2bit with feedback, topk2bit without."""
    losses = {}
    for way in ("dense", "feedback", "none"):
        task = Regression()
        state = Merged(task.start, torch.zeros(0))
        owed = [no_residual(CODEC, task.start.numel(), 0.95)] * task.REPLICAS
        for _ in range(60):
            sent = list(task.round(state.theta))
            for replica, delta in enumerate(sent):
                if way == "feedback":
                    _, sent[replica], owed[replica] = compress(CODEC, delta, owed[replica])
                elif way == "none":
                    sent[replica] = CODEC.decode(CODEC.encode(delta), delta.numel())
            state = step(state, mean(sent), OuterConfig(lr=1.0, momentum=0.0))
        losses[way] = task.loss(state.theta)
    return losses


def test_with_feedback_a_sparse_merge_learns_like_a_dense_one(reached: dict[str, float]) -> None:
    assert reached["dense"] < 0.12  # of 1.1 at the start
    assert reached["feedback"] < 1.1 * reached["dense"]


def test_without_feedback_it_does_not(reached: dict[str, float]) -> None:
    assert reached["none"] > 1.25 * reached["dense"]
