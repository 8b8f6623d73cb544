"""Selective graphs: the bytes that the formulas say, no matrix product more, the same bits."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.recompute import Recompute, Run, block_bytes, plain, selective
from model.split import split
from model.stage import Stage, build_stage
from model.transformer import Block
from scripts.bench.storages import Storages

_CONFIG = ModelConfig(vocab=64, hidden=64, layers=2, heads=4, kv_heads=2, ffn=176, context=96)
_RUNS: dict[Recompute, Run] = {Recompute.KEEP: plain, Recompute.SELECTIVE: selective}


def _stage(dtype: torch.dtype) -> Stage:
    return build_stage(_CONFIG, split(_CONFIG, 2)[0], 1, dtype=dtype)


def _block(stage: Stage) -> Block:
    block = stage.layers["0"]
    assert isinstance(block, Block)
    return block


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", list(_RUNS))
def test_a_graph_holds_what_its_formula_says(recompute: Recompute, dtype: torch.dtype) -> None:
    tokens = 96
    stage = _stage(dtype)
    residual = _random((1, tokens, 64), dtype, 0).requires_grad_()
    run, block = _RUNS[recompute], _block(stage)
    with Storages() as alive:
        # As inside a stage: the input is a sum that only the graph holds, and the next input is one as well.
        h, f = run(block, residual + 0, residual + 0, stage.rotary)
        x = h + f
        del h, f
        first = alive.bytes()
        h, f = run(block, x, x, stage.rotary)
        y = h + f
        del h, f, x
        second = alive.bytes()
    assert y.requires_grad
    assert second - first == tokens * block_bytes(_CONFIG, recompute, dtype)
    assert first > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_selective_graph_costs_no_product_and_changes_no_bit(dtype: torch.dtype) -> None:
    x, g = _random((2, 32, 64), dtype, 0), _random((2, 32, 64), dtype, 1)
    gradients: list[list[Tensor]] = []
    flops: list[int] = []
    for run in (plain, selective):
        stage = _stage(dtype)
        leaf = x.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            h, f = run(_block(stage), leaf, leaf, stage.rotary[:, :32])
            torch.autograd.backward([h, f], [g, g])
        flops.append(counter.get_total_flops())
        assert leaf.grad is not None
        gradients.append([h, f, leaf.grad, *(p.grad for p in stage.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert flops[0] == flops[1] > 0


def test_without_gradients_nothing_is_held() -> None:
    stage = _stage(torch.float32)
    x = _random((1, 16, 64), torch.float32, 0)
    with torch.no_grad(), Storages() as alive:
        h, f = selective(_block(stage), x, x, stage.rotary[:, :16])
        assert alive.bytes() == h.nbytes + f.nbytes


def test_an_input_alone_is_held_with_full_recompute() -> None:
    assert block_bytes(_CONFIG, Recompute.FULL, torch.bfloat16) == 0
