"""`bf16`: every value rounded to bfloat16, little-endian, 2 bytes a value."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from subnet.swarm.codec.base import CodecName, Raw, check_reach, check_size, host_values, largest


class Bf16:
    """Half of fp32; the error is at most 2⁻⁸ of each value (2⁻¹³⁴ where bfloat16 is subnormal)."""

    name: CodecName = "bf16"
    error_feedback = False

    def encode(self, delta: Tensor) -> bytes:
        rounded = torch.from_numpy(host_values(delta)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()

    def decode(self, payload: Raw, count: int, *, limit: float = math.inf) -> Tensor:
        check_size(payload, count, self.payload_bytes(count))
        bits = np.frombuffer(payload, dtype="<u2").astype(np.uint32)
        bits <<= 16
        values = torch.from_numpy(bits.view(np.float32))
        check_reach(largest(values), limit)
        return values

    def payload_bytes(self, count: int) -> int:
        return 2 * count
