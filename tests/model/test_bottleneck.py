"""Boundaries: the maths of each form, and gradients through a two-stage chain against finite differences."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.bottleneck import Receiver, Sender, hashed_pairs, receiver_parameters, sender_parameters
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
    BoundaryConfig(form=BoundaryForm.TRUNCATION, width=3),
    BoundaryConfig(form=BoundaryForm.SUBSPACE, width=3),
    BoundaryConfig(form=BoundaryForm.T, width=3),
    BoundaryConfig(form=BoundaryForm.T, width=3, rank=2),
    BoundaryConfig(form=BoundaryForm.T, width=3, rank=2, pairs=13),
    BoundaryConfig(form=BoundaryForm.T, width=3, rank=8, pairs=13),
    BoundaryConfig(rank=2),
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
    generator = torch.Generator().manual_seed(0)
    h, f = torch.randn(2, 2, 5, 8, generator=generator)
    tokens = torch.randint(_BASE.vocab, (2, 5), generator=generator)
    y = sender(h, f, tokens)
    branch_input, carry = receiver(y, tokens)
    b, x = boundary.width, h + f
    weights = [*sender.parameters(), *receiver.parameters()]
    restored = _restored(dict(receiver.named_parameters()), tokens, boundary.pairs)
    if boundary.form is BoundaryForm.NONE:
        assert torch.equal(y, x)
        torch.testing.assert_close(carry, x + restored)
        assert branch_input is carry
        return
    assert y.shape == (2, 5, b)
    pad = torch.cat((y, torch.zeros(2, 5, 8 - b)), dim=-1)
    if boundary.form is BoundaryForm.TRUNCATION:
        assert torch.equal(y, x[..., :b])
        assert torch.equal(carry, pad)
    elif boundary.form is BoundaryForm.SUBSPACE:
        basis, table = sender.basis, sender.fixed.table
        torch.testing.assert_close(basis.T @ basis, torch.eye(b))
        assert torch.equal(basis, receiver.basis)
        torch.testing.assert_close(y, (x - table[tokens]) @ basis)
        torch.testing.assert_close(carry, y @ basis.T + table[tokens])
    elif boundary.form is BoundaryForm.T:
        sent = (x / x.square().mean(-1, keepdim=True).sqrt()) @ weights[0].T
        torch.testing.assert_close(y, sent / sent.square().mean(-1, keepdim=True).sqrt())
        torch.testing.assert_close(carry, y @ weights[1].T + restored)
    elif boundary.form is BoundaryForm.A:
        torch.testing.assert_close(y, h[..., :b] + F.silu(f) @ weights[0].T)
        torch.testing.assert_close(branch_input, (y @ weights[1].T).relu())
        assert torch.equal(carry, pad)
    else:
        torch.testing.assert_close(y, F.silu(x @ weights[0].T) @ weights[1].T + x[..., :b])
        torch.testing.assert_close(carry, F.silu(y @ weights[2].T) @ weights[3].T + pad)
        assert branch_input is carry


def _restored(weights: dict[str, Tensor], tokens: Tensor, rows: int) -> Tensor:
    """R(tokens) of a receiver with these weights."""
    if "restore.tokens.weight" not in weights:
        return torch.zeros(())
    whole = torch.eye(8)  # what a table as wide as the residual gives needs no way to it
    out = weights["restore.tokens.weight"][tokens] @ weights.get("restore.out.weight", whole).T
    if rows:
        pairs = torch.tensor(
            [
                [
                    ((now * 1_000_003 + before) % (2**31 - 1) * 2_654_435_761 >> 7) % rows
                    for before, now in zip([0, *row[:-1]], row, strict=True)
                ]
                for row in tokens.tolist()
            ]
        )
        out = out + weights["restore.token_pairs.weight"][pairs] @ weights.get("restore.pairs_out.weight", whole).T
    return out


def test_what_blocks_write_stays_inside_the_subspace() -> None:
    # Then nothing is lost: two stages compute what one computes whose blocks are confined alike.
    config = replace(_BASE, boundary=BoundaryConfig(form=BoundaryForm.SUBSPACE, width=3))
    first, second = (build_stage(config, plan, seed=5) for plan in split(config, 2))
    tokens = torch.randint(config.vocab, (2, 4), generator=torch.Generator().manual_seed(1))
    residual, branch = first._blocks(tokens, None)
    received, _ = second._receiver(first(tokens), tokens)
    torch.testing.assert_close(received, residual + branch)


def test_hashed_pairs_tell_order_and_neighbour() -> None:
    tokens = torch.tensor([[3, 1, 4, 1, 5], [1, 3, 4, 5, 1]])
    rows = hashed_pairs(tokens, 10_007)
    assert rows.min() >= 0
    assert rows.max() < 10_007
    assert rows.unique().numel() == 10, "ten different pairs, in a table of ten thousand rows"
    assert torch.equal(hashed_pairs(tokens[:, :3], 10_007), rows[:, :3]), "a token's row knows no later token"


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
    torch.autograd.backward(second.loss(received, targets, tokens))
    assert received.grad is not None
    torch.autograd.backward(y, received.grad)

    def loss() -> float:
        with torch.no_grad():
            return float(second.loss(first(tokens), targets, tokens))

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
