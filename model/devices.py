"""Graphics cards that a plan may name: what they can do at most, and what of it training reaches.

Peak, memory and bandwidth are the vendor's data sheets: dense bf16 with fp32 accumulation, memory in 10^9 bytes.
`efficiency` is the share of the peak that a stage is planned to reach over all FLOPs it executes, recomputed ones
included, while it computes: hardware FLOPs utilisation without waiting. Measured elsewhere, in this order of trust:

    training    HFU of training with full recomputation on 8 to 32 of the cards (mosaicml/llm-foundry,
                scripts/train/benchmarking/README.md: 13B, 1,024 or 2,048 tokens), corrected for its counting attention
                without the causal half. An A100 reaches 79.3 % there, an H100 59.0 %
    products    0.72 of the fastest bf16 matrix product measured on the card, at most of its peak
                (stas00/ml-engineering, mag-/gpu_benchmark); 0.72 is what the H100's training reaches of its fastest one

`host` is host memory that is usually rented with one card (Azure ND per GPU, AWS g6e; a desktop for RTX).
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ConfigError
from model.nearest import nearest

HOST_LINK = 25e9
"""Bytes per second between card and host, one way: what pinned copies reach over PCIe 4.0 x16 (peak 32e9)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One card."""

    name: str
    peak: float
    """FLOP/s, dense bf16."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of that memory, bytes per second."""
    efficiency: float
    """0 to 1, of the peak."""
    host: float
    """Bytes of host memory beside it."""

    @property
    def flops(self) -> float:
        """FLOP/s to plan with."""
        return self.peak * self.efficiency


def _device(name: str, tflops: float, gigabytes: float, bandwidth: float, efficiency: float, host: float) -> Device:
    """Peak in TFLOP/s, memory in GB, its bandwidth in GB/s, host memory in GB."""
    return Device(
        name=name,
        peak=tflops * 1e12,
        memory=gigabytes * 1e9,
        bandwidth=bandwidth * 1e9,
        efficiency=efficiency,
        host=host * 1e9,
    )


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _device("a100-80gb", 312, 80, 2_039, 0.78, 255),  # training 79.3 % at 1,024 tokens
        _device("a100-40gb", 312, 40, 1_555, 0.68, 128),  # training 70.2 % at 2,048 tokens
        _device("h100", 989, 80, 3_350, 0.58, 255),  # training 59.0 % at 1,024 tokens
        _device("h200", 989, 141, 4_800, 0.58, 248),  # the chip of the H100
        _device("b200", 2_250, 180, 8_000, 0.56, 255),  # product 77.6 %
        _device("l40s", 362, 48, 864, 0.50, 128),  # product 69.6 %
        _device("rtx4090", 165.2, 24, 1_008, 0.72, 64),  # product above its peak
        _device("rtx5090", 209.5, 32, 1_792, 0.72, 64),  # product above its peak
    )
}


def device(name: str) -> Device:
    """The card called `name`; raises `ConfigError` naming the nearest one and all of them."""
    found = DEVICES.get(name.lower())
    if found is None:
        near = nearest(name.lower(), DEVICES)
        raise ConfigError(f"GPU '{name}' is unknown: did you mean '{near}'? GPUs: {', '.join(DEVICES)}")
    return found
