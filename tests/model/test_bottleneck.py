"""Boundaries: the maths of each form, and gradients through a two-stage chain against finite differences."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.bottleneck import Receiver, Sender, receiver_parameters, sender_parameters
from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.split import split
from model.stage import Stage, build_stage

_BASE = ModelConfig(vocab=11, hidden=8, layers=2, heads=2, kv_heads=1, ffn=12, context=5)
_FORMS = [
    BoundaryConfig(),
    BoundaryConfig(form=BoundaryForm.A, width=3),
    BoundaryConfig(form=BoundaryForm.B, width=3),
    BoundaryConfig(form=BoundaryForm.A, width=8),
    BoundaryConfig(form=BoundaryForm.B, width=8),
]


def _ends(boundary: BoundaryConfig) -> tuple[Sender, Receiver]:
    config = replace(_BASE, boundary=boundary)
    generator = torch.Generator().manual_seed(3)
    sender, receiver = Sender(config), Receiver(config)
    for parameter in [*sender.parameters(), *receiver.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return sender, receiver


@pytest.mark.parametrize("boundary", _FORMS)
def test_each_form_computes_its_formula(boundary: BoundaryConfig) -> None:
    sender, receiver = _ends(boundary)
    h, f = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    y = sender(h, f)
    branch_input, carry = receiver(y)
    b = boundary.width
    if boundary.form is BoundaryForm.NONE:
        assert torch.equal(y, h + f)
        assert branch_input is carry is y
        return
    assert y.shape == (2, 5, b)
    pad = torch.cat((y, torch.zeros(2, 5, 8 - b)), dim=-1)
    weights = [*sender.parameters(), *receiver.parameters()]
    if boundary.form is BoundaryForm.A:
        torch.testing.assert_close(y, h[..., :b] + F.silu(f) @ weights[0].T)
        torch.testing.assert_close(branch_input, (y @ weights[1].T).relu())
        assert torch.equal(carry, pad)
    else:
        x = h + f
        torch.testing.assert_close(y, F.silu(x @ weights[0].T) @ weights[1].T + x[..., :b])
        torch.testing.assert_close(carry, F.silu(y @ weights[2].T) @ weights[3].T + pad)
        assert branch_input is carry


@pytest.mark.parametrize("boundary", _FORMS)
def test_parameter_counts(boundary: BoundaryConfig) -> None:
    config = replace(_BASE, boundary=boundary)
    sender, receiver = _ends(boundary)
    assert sender_parameters(config) == sum(p.numel() for p in sender.parameters())
    assert receiver_parameters(config) == sum(p.numel() for p in receiver.parameters())


def _double(stage: Stage) -> Stage:
    """The stage with larger weights, in float64 throughout, so that differences are well above rounding."""
    generator = torch.Generator().manual_seed(stage.plan.index)
    stage.double()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).double() * 0.3)
    return stage


@pytest.mark.parametrize("boundary", _FORMS)
def test_gradients_through_two_stages_equal_finite_differences(
    boundary: BoundaryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Norms and rotary compute in fp32 by design; for this check alone they are lifted to float64.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    config = replace(_BASE, boundary=boundary)
    first, second = (_double(build_stage(config, plan, seed=5)) for plan in split(config, 2))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab, (2, 4), generator=generator)
    targets = torch.randint(config.vocab, (2, 4), generator=generator)

    y = first(tokens)
    received = y.detach().requires_grad_()
    torch.autograd.backward(second.loss(received, targets))
    assert received.grad is not None
    torch.autograd.backward(y, received.grad)

    def loss() -> float:
        with torch.no_grad():
            return float(second.loss(first(tokens), targets))

    checked = 0
    for stage in (first, second):
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None, name
            direction = torch.randn(parameter.shape, generator=generator).double()
            step = 1e-6 * direction
            with torch.no_grad():
                parameter.add_(step)
                above = loss()
                parameter.sub_(2 * step)
                below = loss()
                parameter.add_(step)
            slope = float((parameter.grad * direction).sum())
            assert (above - below) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-8), name
            checked += 1
    assert checked >= 21
