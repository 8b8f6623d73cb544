"""Muon against torch's own, a singular value decomposition, and torch's AdamW."""

import math

import pytest
import torch

from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.muon import Muon, polar, step_scale
from model.optimizer import OptimizerConfig, build_optimizer, decay_of, takes_muon
from model.split import split
from model.stage import Stage, build_stage

SHAPES = [(32, 32), (24, 80), (80, 24), (1, 40), (128, 344)]
CONFIG = OptimizerConfig(kind="muon", lr=4e-3, betas=(0.95, 0.97), weight_decay=0.3, eps=1e-8)
MODEL = ModelConfig(
    vocab=48,
    hidden=16,
    layers=3,
    heads=2,
    kv_heads=1,
    ffn=24,
    context=16,
    boundary=BoundaryConfig(form=BoundaryForm.B, width=8),
)
PLANS = split(MODEL, 3)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(shape: tuple[int, int], singular: torch.Tensor, seed: int) -> torch.Tensor:
    """fp64 (m, n) with these singular values."""
    u, _ = torch.linalg.qr(normal(shape[0], len(singular), seed=seed).double())
    v, _ = torch.linalg.qr(normal(shape[1], len(singular), seed=seed + 1).double())
    return u * singular @ v.mT


@pytest.mark.parametrize("shape", SHAPES)
def test_the_polar_factor_is_that_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    """The same singular vectors, and singular values as near to 1 as the polynomial brings them."""
    sizes = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    x = matrix(shape, sizes, 3)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ polar(x) @ vt.mT
    reached = inside.diagonal()
    torch.testing.assert_close(inside, torch.diag(reached), rtol=0, atol=1e-9)
    assert float(reached.min()) > 0.68
    assert float(reached.max()) < 1.21
    assert float((polar(x) - u @ vt).norm() / (u @ vt).norm()) < 0.33
    for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        found = polar(x.to(dtype))
        assert found.dtype == dtype
        assert float((found.double() - polar(x)).norm() / polar(x).norm()) < near


def test_singular_values_follow_the_polynomial() -> None:
    """A matrix of one singular value, which its norm makes 1, and of two that differ by much."""
    for ratio in (1.0, 0.3, 0.01, 0.001):
        sizes = torch.tensor([1.0, ratio], dtype=torch.float64)
        s = sizes / sizes.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        found = torch.linalg.svdvals(polar(matrix((6, 9), sizes, 1)))[:2]
        torch.testing.assert_close(found, s.sort(descending=True).values)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_no_size_of_a_gradient_makes_a_step_that_is_not_finite(size: float) -> None:
    found = polar(size * matrix((8, 12), torch.ones(8), 1).float())
    assert bool(torch.isfinite(found).all())
    assert float(found.norm()) <= 1.2 * math.sqrt(8)


def test_rows_that_got_nothing_move_nothing() -> None:
    x = normal(12, 20)
    x[3], x[:, 5] = 0, 0
    found = polar(x)
    assert not found[3].any()
    assert not found[:, 5].any()
    assert found[4].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torch_muon(shape: tuple[int, int]) -> None:
    """Which iterates in bf16: first moments agree to the bit, weights to what bf16 makes of a polar factor."""
    own, other = (torch.nn.Parameter(normal(*shape)) for _ in range(2))
    ours = Muon([{"params": [own], "weight_decay": 0.1, "matrices": True}], 1e-2, (0.95, 0.9), 1e-8)
    theirs = torch.optim.Muon([other], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for turn in range(4):
        before = own.detach().clone()
        with torch.no_grad():
            other.copy_(own)
        own.grad = normal(*shape, seed=turn + 1)
        other.grad = own.grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(ours.state[own]["exp_avg"], theirs.state[other]["momentum_buffer"])
        change, expected = own.detach() - before, other.detach() - before
        assert float((change - expected).norm() / expected.norm()) < 0.03
        rms = float((change + 1e-2 * 0.1 * before).square().mean().sqrt())
        assert rms == pytest.approx(0.2 * 1e-2, rel=0.35), "as large as a step of AdamW"


@pytest.mark.parametrize("index", range(3))
def test_what_is_no_matrix_inside_a_stage_takes_the_steps_of_torch_adamw_to_the_bit(index: int) -> None:
    plan = PLANS[index]
    ours, theirs = (build_stage(MODEL, plan, 5) for _ in range(2))
    muon = build_optimizer(CONFIG, ours, plan)
    rest = {name: p for name, p in theirs.named_parameters() if not takes_muon("muon", name, p)}
    groups = [{"params": [p], "weight_decay": decay_of(CONFIG, p)} for p in rest.values()]
    adamw = torch.optim.AdamW(groups, CONFIG.lr, CONFIG.betas, CONFIG.eps, foreach=False)
    for turn in range(5):
        for optimizer, stage in ((muon, ours), (adamw, theirs)):
            for number, (_, p) in enumerate(sorted(stage.named_parameters())):
                p.grad = normal(*p.shape, seed=100 * turn + number)
            optimizer.step()
    own = dict(ours.named_parameters())
    assert rest
    for name, p in rest.items():
        assert torch.equal(own[name], p), name
        for field, value in adamw.state[p].items():
            assert torch.equal(muon.state[own[name]][field], value), (name, field)


def test_matrices_of_blocks_and_boundaries_take_muon_and_look_up_tables_do_not() -> None:
    found = {
        name
        for plan in PLANS
        for name, p in build_stage(MODEL, plan, 5).named_parameters()
        if takes_muon("muon", name, p)
    }
    parts = {name.split(".", 2)[2] for name in found}
    assert parts == {
        *(f"attention.{part}.weight" for part in "qkvo"),
        *(f"ffn.{part}.weight" for part in ("gate", "up", "down")),
        *(f"{end}.{layer}.weight" for end in ("sender.encoder", "receiver.decoder") for layer in (0, 2)),
    }
    table = torch.zeros(48, 8)
    assert not takes_muon("muon", "boundaries.2.receiver.tokens.weight", table)
    assert not takes_muon("muon", "embedding.weight", table)
    assert not takes_muon("muon", "head.weight", table)
    assert not takes_muon("adamw", "layers.0.attention.q.weight", table)


def test_a_parameter_without_a_gradient_stays() -> None:
    plan = PLANS[0]
    stage: Stage = build_stage(MODEL, plan, 5)
    optimizer = build_optimizer(CONFIG, stage, plan)
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    stage.layers["0"].ffn.up.weight.grad = normal(24, 16)  # type: ignore[union-attr]
    optimizer.step()
    moved = {name for name, p in stage.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"layers.0.ffn.up.weight"}
    assert len(optimizer.state) == 1
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(lambda: 0.0)


def test_a_long_matrix_moves_as_its_transpose_does() -> None:
    x = normal(20, 50).double()
    torch.testing.assert_close(polar(x.mT), polar(x).mT)
    assert step_scale((20, 50)) == step_scale((50, 20)) == 0.2 * math.sqrt(50)
