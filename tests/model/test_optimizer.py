"""Inner settings, schedule and per-stage clipping, and the outer step against torch's Nesterov SGD."""

import math

import pytest
import torch

from model.config import ConfigError, preset
from model.optimizer import (
    OptimizerConfig,
    OuterConfig,
    build_optimizer,
    clip_bound,
    first_momentum,
    gradient_norm,
    learning_rate,
    outer_step,
    plain_step,
)
from model.split import split
from model.stage import build_stage


def test_the_outer_step_is_nesterov_sgd() -> None:
    config = OuterConfig(lr=0.7, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    theta, buffer = torch.randn(1_000, generator=generator), torch.zeros(1_000)
    reference = torch.nn.Parameter(theta.clone())
    sgd = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(5):
        gradient = torch.randn(1_000, generator=generator)
        before = theta.clone()
        updated, buffer = outer_step(theta, gradient, buffer, config)
        assert torch.equal(theta, before)
        theta = updated
        reference.grad = gradient
        sgd.step()
        torch.testing.assert_close(theta, reference.detach(), rtol=1e-5, atol=1e-5)


def test_the_outer_step_rounds_every_product() -> None:
    generator = torch.Generator().manual_seed(1)
    theta, gradient, buffer = torch.randn(3, 4_097, generator=generator)
    new, momentum = outer_step(theta, gradient, buffer, OuterConfig(lr=0.7, momentum=0.9))
    t, g, m = (x.numpy() for x in (theta, gradient, buffer))
    lr, mu = torch.tensor([0.7, 0.9]).numpy()
    expected_momentum = m * mu + g
    assert (momentum.numpy() == expected_momentum).all()
    assert (new.numpy() == t - (expected_momentum * mu + g) * lr).all()


def test_the_plain_step_is_sgd_and_rounds_the_product() -> None:
    theta, gradient = torch.randn(2, 4_097, generator=torch.Generator().manual_seed(1))
    config = OuterConfig(lr=0.7, momentum=0.0)
    new = plain_step(theta, gradient, config)
    assert (new.numpy() == theta.numpy() - gradient.numpy() * torch.tensor(0.7).numpy()).all()
    assert torch.equal(new, outer_step(theta, gradient, torch.zeros_like(theta), config)[0])


def test_the_plain_step_has_no_momentum() -> None:
    with pytest.raises(ValueError, match=r"outer\.momentum is 0\.9"):
        plain_step(torch.zeros(4), torch.zeros(4), OuterConfig(momentum=0.9))
    with pytest.raises(ValueError, match="pseudo-gradient is"):
        plain_step(torch.zeros(4), torch.zeros(5), OuterConfig(momentum=0.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_outer_step_has_the_same_bits_on_a_gpu() -> None:
    inputs = torch.randn(3, 1_000_003, generator=torch.Generator().manual_seed(2))
    here = outer_step(inputs[0], inputs[1], inputs[2], OuterConfig())
    inputs = inputs.cuda()
    there = outer_step(inputs[0], inputs[1], inputs[2], OuterConfig())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


def test_the_outer_step_refuses_other_dtypes_and_shapes() -> None:
    theta = torch.zeros(4)
    with pytest.raises(ValueError, match=r"pseudo-gradient is torch\.bfloat16"):
        outer_step(theta, theta.bfloat16(), theta, OuterConfig())
    with pytest.raises(ValueError, match=r"momentum is torch.float32 \(5,\)"):
        outer_step(theta, theta, torch.zeros(5), OuterConfig())


def test_the_rate_warms_up_and_stays() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(OptimizerConfig(lr=0.5), 0) == 0.5


def test_early_stages_have_more_nadam_momentum() -> None:
    plans = split(preset("nano"), 4)
    nadam = OptimizerConfig(kind="nadam", lr=1e-3, betas=(0.9, 0.95))
    assert [first_momentum(nadam, plan) for plan in plans] == pytest.approx([0.9675, 0.945, 0.9225, 0.9])
    adamw = OptimizerConfig(kind="adamw", lr=1e-3, betas=(0.8, 0.95))
    assert {first_momentum(adamw, plan) for plan in plans} == {0.8}


@pytest.mark.parametrize("kind", ["adamw", "nadam"])
def test_decay_acts_on_matrices_only_and_nothing_is_fused(kind: str) -> None:
    config, plan = preset("nano"), split(preset("nano"), 4)[1]
    stage = build_stage(config, plan, 1)
    settings = OptimizerConfig(kind=kind, lr=1e-3, weight_decay=0.3)  # type: ignore[arg-type]
    optimizer = build_optimizer(settings, stage, plan)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(stage.parameters()))
    assert all(decay[id(p)] == (0.3 if p.dim() == 2 else 0.0) for p in stage.parameters())
    assert not any(group.get("fused") or group.get("foreach") for group in optimizer.param_groups)


def test_stage_clips_add_up_to_the_model_clip() -> None:
    config = OptimizerConfig(lr=1e-3, clip=2.0)
    bounds = [clip_bound(config, share, 100) for share in (10, 20, 70)]
    assert math.sqrt(sum(bound**2 for bound in bounds)) == pytest.approx(2.0)
    assert gradient_norm([torch.full((3,), 2.0), torch.tensor([2.0])]) == pytest.approx(4.0)
    assert not math.isfinite(gradient_norm([torch.ones(2), torch.tensor([float("nan")])]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sgd"}, "optimizer.kind is 'sgd'"),
        ({"lr": 0.0}, "optimizer.lr is 0.0"),
        ({"betas": (0.9, 1.0)}, "optimizer.betas"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay is -0.1"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps is -1"),
        ({"clip": float("nan")}, "optimizer.clip is nan"),
        ({"eps": 0.0}, "optimizer.eps is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**{"lr": 1e-3, **change})  # type: ignore[arg-type]


def test_outer_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"outer\.momentum 1\.0"):
        OuterConfig(momentum=1.0)
