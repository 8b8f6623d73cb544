"""What a unit's graph holds between forward and backward, and what is computed a second time instead.

A graph as autograd builds it (keep) holds whatever an operator's backward reads. Most of these bytes are cheap to get
again: normed inputs, rotated queries and keys, silu and its product. A selective graph holds only what a matrix product
or attention has made, and the rest is computed again in the backward, block by block, in the same order on the same
numbers, so both give the same bits. The name is that of Korthikanti et al. (arXiv 2205.05198); the scores which they
recompute are never stored here, since `F.scaled_dot_product_attention` does so by itself. With full recompute nothing
but the input is held.
"""

import functools
from collections.abc import Callable
from enum import StrEnum

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from model.config import ModelConfig
from model.transformer import Block

_ATTENTION = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class Recompute(StrEnum):
    """What is held of a unit: its graph (keep), its graph without what is cheap (selective), only its input (full)."""

    KEEP = "keep"
    SELECTIVE = "selective"
    FULL = "full"


Run = Callable[[Block, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""How a stage calls a block on (branch input, carry, rotary tables), see `Block.forward`."""


def plain(block: Block, branch_input: Tensor, carry: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """`block` as autograd records it."""
    h, f = block(branch_input, carry, tables)
    return h, f


def selective(block: Block, branch_input: Tensor, carry: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """`block` with a selective graph; the same results and gradients, bit for bit."""
    if not torch.is_grad_enabled():
        return plain(block, branch_input, carry, tables)
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, block))
    h, f = checkpoint(
        block, branch_input, carry, tables, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return h, f


def block_bytes(config: ModelConfig, recompute: Recompute, dtype: torch.dtype) -> int:
    """Bytes that a unit's graph holds per token and block, with matrices of `dtype`.

    With d = hidden, f = ffn, k = kv_heads · head_dim, a = heads and e bytes per element:

        keep        e·(4d + 4f + 2k) + 16d + 4a + 8    normed inputs, q, attention's result; gate, its silu, up, their
                                                       product; k, v; fp32: each norm's input, quotient and root,
                                                       attention's sums
        selective   e·(4d + 2f + 2k) + 4a              input, q, attention's result, o's result; gate, up; k, v; fp32:
                                                       attention's sums
        full        0

    These are the bytes where `F.rms_norm` is composed of operators, as on a CPU; a fused one need not hold quotients.
    """
    hidden, ffn, size = config.hidden, config.ffn, dtype.itemsize
    keys_and_values = 2 * config.kv_heads * config.head_dim
    match recompute:
        case Recompute.KEEP:
            return size * (4 * hidden + 4 * ffn + keys_and_values) + 16 * hidden + 4 * config.heads + 8
        case Recompute.SELECTIVE:
            return size * (4 * hidden + 2 * ffn + keys_and_values) + 4 * config.heads
        case Recompute.FULL:
            return 0


def _policy(
    block: Block, _context: SelectiveCheckpointContext, operator: object, *args: object, **_options: object
) -> CheckpointPolicy:
    """Hold products and attention; but no product of `down`, which no backward reads."""
    if operator in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if operator is torch.ops.aten.mm.default:
        weight = args[1]
        if isinstance(weight, Tensor) and weight.shape != block.ffn.down.weight.shape[::-1]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
