"""What a merge sends: a pseudo-gradient, or one shard of it, as bytes. Pure functions.

`topk2bit` sends the largest values and keeps the rest as error feedback; `int8` and `bf16` send every value.
"""

from __future__ import annotations

from subnet.swarm.codec.base import Codec, CodecName, DeltaError, PayloadError, Raw
from subnet.swarm.codec.bf16 import Bf16
from subnet.swarm.codec.feedback import Feedback, compress, no_residual, reach, rejected
from subnet.swarm.codec.int8 import Int8
from subnet.swarm.codec.topk2bit import TopK2Bit

__all__ = [
    "Bf16",
    "Codec",
    "CodecName",
    "DeltaError",
    "Feedback",
    "Int8",
    "PayloadError",
    "Raw",
    "TopK2Bit",
    "codec_of",
    "compress",
    "no_residual",
    "reach",
    "rejected",
]

CODECS: dict[str, Codec] = {codec.name: codec for codec in (TopK2Bit(), Int8(), Bf16())}


def codec_of(name: str) -> Codec:
    """The codec that the manifest names. Raises `ValueError`."""
    if name not in CODECS:
        raise ValueError(f"codec is '{name}'; it must be one of {', '.join(CODECS)}: change merge.codec")
    return CODECS[name]
