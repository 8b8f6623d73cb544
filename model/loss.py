"""Cross-entropy of a vocabulary head without all its logits at once.

For 8,192 tokens and 128,256 words the logits are 4.2 GB in fp32, their gradient as much again. Here a chunk of tokens
goes from hidden state to loss and back to gradients before the next one begins, so at most `CHUNK` rows exist; the
gradients are ready when the loss is, and the backward only scales them. The idea is Liger's and that of
`F.linear_cross_entropy` (torch 2.13): the first needs Triton, the second rounds the loss of bf16 weights to bf16.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

CHUNK = 1_024
"""Tokens at a time. Part of the arithmetic, not an option: sums over other chunks round differently, and a replica's
numbers are compared with those of its siblings and auditors."""


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens of -log softmax(hidden Wᵀ)[target], in nats, a scalar in fp32 (fp64 for fp64 inputs).

    `hidden` is (n, d), `weight` (V, d) of the same dtype, `targets` int64 (n,). Logits are rounded to that dtype as any
    product is; softmax, loss and their sums are not. The gradient of `weight` is summed over chunks in its dtype.
    """
    return cast("Tensor", _CrossEntropy.apply(hidden, weight, targets))  # type: ignore[no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        count = len(targets)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=wide)
        wanted = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        d_hidden = torch.empty_like(hidden, dtype=weight.dtype) if wanted else None
        d_weight = torch.zeros_like(weight) if wanted else None
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            logits = F.linear(hidden[part], weight).to(wide)
            chosen = targets[part, None]
            sums = logits.logsumexp(-1, keepdim=True)
            loss += (sums - logits.gather(1, chosen)).sum()
            if d_hidden is not None and d_weight is not None:
                d_logits = logits.sub_(sums).exp_()
                d_logits.scatter_add_(1, chosen, d_logits.new_full(chosen.shape, -1.0))
                scaled = d_logits.div_(count).to(weight.dtype)
                torch.mm(scaled, weight, out=d_hidden[part])
                d_weight.addmm_(scaled.t(), hidden[part].to(weight.dtype))  # autocast may have them differ
        ctx.dtype = hidden.dtype  # type: ignore[attr-defined]
        ctx.gradients = (d_hidden, d_weight)  # type: ignore[attr-defined]
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_weight = ctx.gradients  # type: ignore[attr-defined]
        d_hidden = (d_hidden * scale.to(d_hidden.dtype)).to(ctx.dtype)  # type: ignore[attr-defined]
        return d_hidden, d_weight * scale.to(d_weight.dtype), None
