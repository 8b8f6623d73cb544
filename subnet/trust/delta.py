"""Weights as what they differ by from a public state that both sides hold: lossless, and smaller than the weights.

The bits of both are XORed and the four bytes of each value laid in planes of their own: sign, exponent and first
mantissa bits hardly change in a round, so their planes are almost zero and compress well; the last plane is noise. What
is packed opens to one size only, so a reader allocates what it expects and no more.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray

LEVEL = 1
"""Of zlib: higher ones gain a few percent and take several times as long."""
VALUE_BYTES = 4


class DeltaFormatError(ValueError):
    """Bytes that are no delta of so many weights: one line with the value and the limit."""


def limit_of(values: int) -> int:
    """Bytes of the largest delta of so many fp32 weights: incompressible ones, with zlib's framing."""
    raw = VALUE_BYTES * values
    return raw + raw // 1000 + 1024


def encode(weights: torch.Tensor, base: torch.Tensor) -> bytes:
    """What `weights` differ by from `base`, fp32 (n,) each on the CPU. Raises `DeltaFormatError` for other shapes."""
    changed = _bits(weights) ^ _bits(base, like=weights)
    planes = changed.view(np.uint8).reshape(-1, VALUE_BYTES).T
    return zlib.compress(np.ascontiguousarray(planes).data, LEVEL)


def decode(data: bytes | bytearray | memoryview, base: torch.Tensor, limit: int) -> torch.Tensor:
    """The weights, fp32 (n,), to the bit.

    Raises `DeltaFormatError` for more than `limit` bytes, for what does not open, and for what opens to another size.
    """
    if len(data) > limit:
        raise DeltaFormatError(f"a delta of {len(data)} bytes, limit {limit}: it is not opened")
    known = _bits(base)
    stream = zlib.decompressobj()
    try:
        planes = stream.decompress(data, known.nbytes + 1)
    except zlib.error as error:
        raise DeltaFormatError(f"a delta that does not open ({error})") from error
    if len(planes) != known.nbytes or not stream.eof or stream.unused_data:
        raise DeltaFormatError(f"a delta that opens to {len(planes)} bytes or more, {known.nbytes} are expected")
    values = np.frombuffer(planes, dtype=np.uint8).reshape(VALUE_BYTES, -1).T
    changed = np.ascontiguousarray(values).view(np.uint32).reshape(-1)
    return torch.from_numpy((changed ^ known).view(np.float32))


def _bits(values: torch.Tensor, *, like: torch.Tensor | None = None) -> NDArray[np.uint32]:
    if values.dtype != torch.float32 or values.dim() != 1 or (like is not None and values.shape != like.shape):
        raise DeltaFormatError(f"weights are {values.dtype} {tuple(values.shape)}: flat float32 of one size are needed")
    bits: NDArray[np.uint32] = values.detach().contiguous().numpy().view(np.uint32)
    return bits
