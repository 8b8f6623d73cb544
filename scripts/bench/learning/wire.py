"""What of a tensor is left on the other side of a boundary: bf16 as swarms send it, or 8-bit codes with a scale each
token, which swarms do not send yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BITS = (8, 16)
WIRE = torch.bfloat16
SCALE_BYTES = 2
"""Of a token's scale, where values are codes."""
_CODES = 127
_SMALLEST = 1e-30


def channels(hidden: int, ratio: int, bits: int) -> int:
    """How many channels take a `ratio`-th of the bytes of a bf16 residual; less than 1 where scales alone take more."""
    room = 2 * hidden // ratio
    return room // 2 if bits == 16 else room - SCALE_BYTES


def arrived(x: Tensor, bits: int, noise: torch.Generator | None = None) -> Tensor:
    """`x` (B, T, b) as it comes off the wire, in its own type. Codes are rounded to the nearest, or with `noise` up or
    down by chance such that their mean is `x`, as gradients want it (QSGD, arXiv 1610.02132 §3.1)."""
    if bits == 16:
        return x.to(WIRE).to(x.dtype)
    scale = (x.abs().amax(-1, keepdim=True) / _CODES).clamp_min(_SMALLEST).to(WIRE).to(x.dtype)
    exact = x / scale
    codes = exact.round() if noise is None else (exact + torch.rand(x.shape, generator=noise, device=x.device)).floor()
    return codes.clamp(-_CODES, _CODES) * scale


class Crossing(torch.autograd.Function):
    """A boundary's tensor and its gradient as they come off the wire, times `passed`: 0 where nothing crosses."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bits: int, noise: torch.Generator, passed: float) -> Tensor:  # noqa: ANN401 - autograd's own signature
        ctx.bits, ctx.noise, ctx.passed = bits, noise, passed
        return arrived(y, bits) * passed

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401 - as above
        return arrived(g, ctx.bits, ctx.noise) * ctx.passed, None, None, None
