"""`int8`: groups of 256 values, each value a signed byte times the group's scale.

Layout: the groups' scales (fp32, little-endian), then one byte a value. A scale is its group's largest magnitude / 127,
so a group has a value at ±127 or a scale of zero; other forms are refused.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subnet.swarm.codec.base import CodecName, PayloadError, Raw, check_reach, check_size, host_values

T = TypeVar("T", np.float32, np.int8)
GROUP = 256
STEPS = 127
BLOCK = 1024
"""Groups per pass: temporaries of 1 MiB stay in the cache, whatever the size of the stage."""
SMALLEST = float(np.finfo(np.float32).tiny)
"""A scale below the normal range has too few bits to divide by: such a group is sent as zeros."""


class Int8:
    """3.94 times below fp32; the error is at most half a step, the group's largest magnitude / 254."""

    name: CodecName = "int8"
    error_feedback = False

    def encode(self, delta: Tensor) -> bytes:
        values = host_values(delta)
        count = len(values)
        scales, steps = np.empty(_groups(count), dtype="<f4"), np.empty(count, dtype=np.int8)
        for start in range(0, count, BLOCK * GROUP):
            block = values[start : start + BLOCK * GROUP]
            rows = _rows(block)
            scale = np.maximum(rows.max(axis=1), -rows.min(axis=1)) / np.float32(STEPS)
            scale[scale < SMALLEST] = 0
            divisor = np.where(scale > 0, scale, np.float32(np.inf))
            steps[start : start + len(block)] = np.rint(rows / divisor[:, None]).astype(np.int8).ravel()[: len(block)]
            scales[start // GROUP : start // GROUP + len(scale)] = scale
        return scales.tobytes() + steps.tobytes()

    def decode(self, payload: Raw, count: int, *, limit: float = math.inf) -> Tensor:
        check_size(payload, count, self.payload_bytes(count))
        groups = _groups(count)
        scales = np.frombuffer(payload, dtype="<f4", count=groups).astype(np.float32)
        steps = np.frombuffer(payload, dtype=np.int8, offset=4 * groups)
        with np.errstate(over="ignore"):  # an overflow is refused as infinite
            check_reach(float(np.abs(scales).max() * np.float32(STEPS)), limit)
        values = np.empty(count, dtype=np.float32)
        for start in range(0, count, BLOCK * GROUP):
            block = steps[start : start + BLOCK * GROUP]
            rows, scale = _rows(block), scales[start // GROUP : start // GROUP + BLOCK]
            reach = np.maximum(rows.max(axis=1).astype(np.int16), -rows.min(axis=1).astype(np.int16))
            sound = np.where(scale.view(np.uint32) == 0, reach == 0, (scale >= SMALLEST) & (reach == STEPS))
            if not sound.all():
                raise PayloadError(
                    f"payload has a group whose largest step is not {STEPS} times its scale, or whose scale is neither "
                    f"zero nor at least {SMALLEST:.3g}: its source is left out"
                )
            values[start : start + len(block)] = (rows * scale[:, None]).ravel()[: len(block)]
        return torch.from_numpy(values)

    def payload_bytes(self, count: int) -> int:
        return 4 * _groups(count) + count


def _groups(count: int) -> int:
    return -(-count // GROUP)


def _rows(block: NDArray[T]) -> NDArray[T]:
    """(groups, 256), the last group filled up with zeros."""
    missing = -len(block) % GROUP
    return (np.pad(block, (0, missing)) if missing else block).reshape(-1, GROUP)
