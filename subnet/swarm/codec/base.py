"""What every codec promises, the two errors, and the checks that codecs share.

A payload's size is a function of the number of values alone, so a receiver bounds a reply before it asks. Decoding has
the same bits on every machine: it moves bits and multiplies once, and never sums.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CodecName = Literal["topk2bit", "int8", "bf16"]
Raw = bytes | bytearray | memoryview
LARGEST = float(torch.finfo(torch.bfloat16).max)
"""3.39e38: what bfloat16 holds. Nothing above it is encoded, so no rounding reaches infinity."""


class PayloadError(Exception):
    """A payload is not what its codec makes: one line with the value, the limit and what follows."""


class DeltaError(Exception):
    """A pseudo-gradient that cannot be sent: empty, not flat fp32, not finite."""


class Codec(Protocol):
    """How a merge writes `count` values, a whole stage or one shard of it, as bytes."""

    @property
    def name(self) -> CodecName: ...

    @property
    def error_feedback(self) -> bool:
        """Whether what a payload leaves out is kept for the next round, in place of an outer momentum."""

    def encode(self, delta: Tensor) -> bytes:
        """fp32 (n,), n >= 1, any device. Raises `DeltaError`."""

    def decode(self, payload: Raw, count: int, *, limit: float = math.inf) -> Tensor:
        """fp32 (count,) on the CPU, finite and at most `limit` in magnitude. Raises `PayloadError`."""

    def payload_bytes(self, count: int) -> int:
        """Exact size of the payload of `count` values."""


def host_values(delta: Tensor) -> NDArray[np.float32]:
    """The delta as a flat host array, once it is fit to be sent. Raises `DeltaError`."""
    if delta.dtype != torch.float32 or delta.dim() != 1 or not delta.numel():
        raise DeltaError(f"delta is {delta.dtype} {tuple(delta.shape)}: a codec takes float32 (n,) with n >= 1")
    low, high = (float(end) for end in torch.aminmax(delta))
    if not (low >= -LARGEST and high <= LARGEST):  # NaN fails both
        raise DeltaError(
            f"delta reaches from {low} to {high}, beyond ±{LARGEST:.3g}: its replica sends nothing this round "
            "and must take the public weights again"
        )
    values: NDArray[np.float32] = delta.detach().cpu().contiguous().numpy()
    return values


def check_size(payload: Raw, count: int, expected: int) -> None:
    if len(payload) != expected:
        raise PayloadError(f"payload has {len(payload)} bytes where {count} values need {expected}: it is refused")


def check_reach(reach: float, limit: float) -> None:
    """`reach` is the payload's largest magnitude, NaN if a value is. A maximum does not depend on the order of
    anything, so all replicas refuse the same payloads."""
    if not reach < math.inf:
        raise PayloadError("payload holds NaN or infinite values: its source is left out of the merge")
    if reach > limit:
        raise PayloadError(f"payload reaches {reach:.3g} where the limit is {limit:.3g}: its source is left out")


def largest(values: Tensor) -> float:
    """Largest magnitude, NaN as soon as one value is."""
    low, high = (float(end) for end in torch.aminmax(values))
    return max(-low, high)
