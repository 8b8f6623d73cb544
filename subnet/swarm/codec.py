"""What a merge sends: a pseudo-gradient as bytes, cut into content-addressed chunks.

The codec here is `bf16`: every value of the fp32 pseudo-gradient rounded to bfloat16. A payload's root is a hash over
its chunk hashes, so a receiver may take chunks from whoever has them and check each on arrival, and a source that
fixed its root on chain cannot send different things to different peers.
"""

from __future__ import annotations

import hashlib
import math

import torch

CHUNK_BYTES = 4 << 20


class PayloadError(Exception):
    """A payload is not what its root promised: one line that names the chunk or the size."""


def encode(delta: torch.Tensor) -> bytes:
    """fp32 (n,) to 2n bytes."""
    return delta.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def decode(payload: bytes | bytearray | memoryview, count: int, *, limit: float = math.inf) -> torch.Tensor:
    """2n bytes to fp32 (n,). Raises `PayloadError` for another size, a value that is not finite or one above `limit`.

    The largest magnitude does not depend on the order of anything, so all replicas refuse the same payloads.
    """
    if len(payload) != 2 * count:
        raise PayloadError(f"payload has {len(payload)} bytes where the stage's {count} parameters need {2 * count}")
    delta = torch.frombuffer(bytearray(payload), dtype=torch.bfloat16).to(torch.float32)
    if not bool(torch.isfinite(delta).all()):
        raise PayloadError("payload holds NaN or infinite values: its source is left out of the merge")
    if delta.numel() and float(delta.abs().max()) > limit:
        raise PayloadError(
            f"payload reaches {float(delta.abs().max()):.3g}, a round of its work moves at most {limit:.3g}"
        )
    return delta


def payload_bytes(count: int) -> int:
    """Size of the payload of a stage with `count` parameters."""
    return 2 * count


def root(payload: bytes | bytearray | memoryview) -> bytes:
    """H(H(chunk 0) ‖ H(chunk 1) ‖ …), 32 bytes."""
    view = memoryview(payload)
    tree = hashlib.sha256(b"orion/payload/1")
    for start in range(0, len(view), CHUNK_BYTES):
        tree.update(hashlib.sha256(view[start : start + CHUNK_BYTES]).digest())
    return tree.digest()
