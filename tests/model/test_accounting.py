"""Parameter counts equal built stages, FLOPs equal torch's own counter, MFU a hand count."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.accounting import (
    boundary_bytes,
    mfu,
    stage_flops,
    stage_moments,
    stage_parameters,
    total_parameters,
    training_flops_per_token,
)
from model.config import BoundaryConfig, BoundaryForm, ConfigError, ModelConfig, preset
from model.devices import device
from model.optimizer import Kind, takes_muon
from model.split import split, stage_cost
from model.stage import Stage

_CONFIG = ModelConfig(vocab=96, hidden=32, layers=5, heads=4, kv_heads=2, ffn=48, context=16)
_BOUNDARIES = [
    BoundaryConfig(),
    BoundaryConfig(form=BoundaryForm.A, width=4),
    BoundaryConfig(form=BoundaryForm.B, width=4),
    BoundaryConfig(form=BoundaryForm.SUBSPACE, width=4),
    BoundaryConfig(form=BoundaryForm.T, width=4),
    BoundaryConfig(form=BoundaryForm.T, width=4, rank=3),
    BoundaryConfig(form=BoundaryForm.T, width=4, rank=3, pairs=20),
    BoundaryConfig(form=BoundaryForm.T, width=4, rank=32, pairs=20),
    BoundaryConfig(rank=3),
]


@pytest.mark.parametrize("boundary", _BOUNDARIES)
@pytest.mark.parametrize("stages", [1, 2, 5])
def test_counts_equal_built_stages(boundary: BoundaryConfig, stages: int) -> None:
    config = replace(_CONFIG, boundary=boundary)
    for plan in split(config, stages):
        built = dict(Stage(config, plan).named_parameters())
        assert stage_parameters(config, plan) == sum(p.numel() for p in built.values())
        core = sum(p.numel() for name, p in built.items() if not name.startswith("boundaries."))
        assert stage_parameters(config, plan, boundaries=False) == core
        for kind in get_args(Kind):
            moments = sum(p.numel() * (1 if takes_muon(kind, name, p) else 2) for name, p in built.items())
            assert stage_moments(config, plan, kind) == moments
    if boundary.form is not BoundaryForm.SUBSPACE:
        assert total_parameters(config, stages, boundaries=False) == total_parameters(config)


@pytest.mark.parametrize("boundary", _BOUNDARIES)
def test_matrix_flops_equal_torchs_counter(boundary: BoundaryConfig) -> None:
    config = replace(_CONFIG, boundary=boundary)
    batch, tokens = 2, 16
    for plan in split(config, 2):
        stage = Stage(config, plan)
        width = (config.boundary_width,)
        x = torch.zeros(batch, tokens, dtype=torch.int64) if plan.is_first else torch.zeros(batch, tokens, *width)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            stage(x, torch.zeros(batch, tokens, dtype=torch.int64))
        counts = counter.get_flop_counts()["Global"]
        matrices = sum(n for name, n in counts.items() if "attention" not in str(name)) / (batch * tokens)
        norms = sum(p.numel() for p in stage.parameters() if p.dim() == 1)
        forward, backward = stage_flops(config, plan, tokens=tokens)
        causal = plan.layers * 2 * tokens * config.hidden
        assert forward == matrices + 2 * norms + causal
        assert backward == 2 * forward


def test_500b_has_the_size_that_its_shape_says() -> None:
    config = preset("500b")
    block = 2 * 16_384**2 + 2 * 16_384 * 1_024 + 3 * 16_384 * 57_344 + 2 * 16_384
    assert total_parameters(config, boundaries=False) == 502_390_177_792
    assert total_parameters(config, boundaries=False) == 147 * block + 2 * 128_256 * 16_384 + 16_384
    assert config.head_dim == 128
    # 37 stages of four blocks, the last of three and the vocabulary head: next to nothing is lost to imbalance.
    costs = [stage_cost(config, plan) for plan in split(config, 37)]
    assert sum(costs) / (37 * max(costs)) > 0.99


def test_the_formula_is_6n_plus_causal_attention_once() -> None:
    config = preset("100b")
    n = 99_615_863_808 - 128_256 * 9_216 + 15 * 9_216 * (2 * 144 + 1_152)
    assert training_flops_per_token(config, stages=16) == 6 * n + 6 * 90 * 8_192 * 9_216
    assert training_flops_per_token(config, stages=16, tokens=1) == 6 * n + 6 * 90 * 9_216


def test_mfu_of_a_run_of_known_speed() -> None:
    # By hand: 9,000 * 6 * 99.6e9 FLOP/s over 48 * 312e12 is 35.9 %.
    assert mfu(9_000, 6 * 99.6e9, peak_flops=48 * device("a100-80gb").peak) == pytest.approx(0.359, abs=0.001)
    with pytest.raises(ConfigError, match="peak_flops of all devices is 0"):
        mfu(1, 1, peak_flops=0)


def test_boundary_bytes_of_the_100b_run() -> None:
    assert boundary_bytes(preset("100b"), tokens=8_192, itemsize=2) == int(2.25 * 2**20)
    whole = replace(preset("100b"), boundary=BoundaryConfig())
    assert boundary_bytes(whole, tokens=8_192, itemsize=2) == 144 * 2**20
