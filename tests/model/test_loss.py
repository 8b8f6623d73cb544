"""The chunked cross-entropy: torch's numbers, whatever the chunks, and never all logits at once."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.loss
from model.loss import CHUNK, cross_entropy
from scripts.bench.storages import Storages


def _inputs(tokens: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype)
    weight = torch.randn(vocab, 16, generator=generator).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def _reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    d_hidden, d_weight = torch.autograd.grad(loss / 3, [hidden, weight])
    return d_hidden, d_weight


@pytest.mark.parametrize("tokens", [1, CHUNK, 2 * CHUNK + 5])
def test_it_is_torch_s_cross_entropy(tokens: int) -> None:
    hidden, weight, targets = _inputs(tokens, vocab=60)
    ours, theirs = cross_entropy(hidden, weight, targets), _reference(hidden, weight, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    for got, wanted in zip(_gradients(ours, hidden, weight), _gradients(theirs, hidden, weight), strict=True):
        torch.testing.assert_close(got, wanted)


def test_its_gradient_is_that_of_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.loss, "CHUNK", 2)
    hidden, weight, targets = (part.detach() for part in _inputs(5, vocab=7))
    for wrt in (hidden, weight):
        direction = torch.randn(wrt.shape, generator=torch.Generator().manual_seed(1))
        leaf = wrt.clone().requires_grad_()
        pair = (leaf, weight) if wrt is hidden else (hidden, leaf)
        (gradient,) = torch.autograd.grad(cross_entropy(*pair, targets), [leaf])
        values = []
        for step in (1e-2, -1e-2):
            moved = wrt + step * direction
            pair = (moved, weight) if wrt is hidden else (hidden, moved)
            values.append(float(cross_entropy(*pair, targets)))
        slope = (values[0] - values[1]) / 2e-2
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-3)


def test_in_half_precision_the_loss_stays_exact() -> None:
    hidden, weight, targets = _inputs(2 * CHUNK, vocab=60, dtype=torch.bfloat16)
    ours, theirs = cross_entropy(hidden, weight, targets), _reference(hidden, weight, targets)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for got, wanted in zip(_gradients(ours, hidden, weight), _gradients(theirs, hidden, weight), strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got - wanted).float().norm() / wanted.float().norm()) < 2**-7


def test_a_value_without_gradients_has_the_same_bits() -> None:
    hidden, weight, targets = _inputs(CHUNK + 9, vocab=60)
    with torch.no_grad():
        value = cross_entropy(hidden, weight, targets)
    assert torch.equal(value, cross_entropy(hidden, weight, targets).detach())


def test_what_is_not_finite_shows() -> None:
    hidden, weight, targets = _inputs(3, vocab=8)
    assert not math.isfinite(float(cross_entropy(hidden * math.inf, weight, targets).detach()))


def test_never_are_all_logits_there() -> None:
    tokens, vocab = 8 * CHUNK, 512
    hidden, weight, targets = _inputs(tokens, vocab)
    whole = 4 * tokens * vocab
    with Storages() as alive:
        torch.autograd.backward(cross_entropy(hidden, weight, targets))
    assert alive.peak < 0.6 * whole
    with Storages() as alive:
        torch.autograd.backward(_reference(hidden.detach().requires_grad_(), weight, targets))
    assert alive.peak > 2 * whole
