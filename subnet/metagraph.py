"""What a node reads of its subnet at one finalized block: plain values, no chain client.

Everything that decides something (roster, routing, merge, scores) takes a `ChainState`; `subnet.chain` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Head:
    """A finalized block."""

    number: int
    hash: str
    """0x-prefixed hex."""
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a neuron's axon is reached, as published on chain."""

    ip: str
    port: int

    @property
    def url(self) -> str:
        return f"http://[{self.ip}]:{self.port}" if ":" in self.ip else f"http://{self.ip}:{self.port}"


@dataclass(frozen=True, slots=True)
class Neuron:
    """One uid of the subnet. `record` is the raw content of its hotkey's current commitment, None if it has none."""

    uid: int
    hotkey: str
    coldkey: str
    stake: float
    validator_permit: bool
    endpoint: Endpoint | None
    registered_at: int
    last_update: int
    incentive: float
    dividends: float
    record: bytes | None
    record_block: int | None


@dataclass(frozen=True, slots=True)
class ChainState:
    """The subnet at `head`, neurons by uid."""

    head: Head
    netuid: int
    owner_hotkey: str
    tempo: int
    neurons: tuple[Neuron, ...]

    def by_hotkey(self, hotkey: str) -> Neuron | None:
        return next((neuron for neuron in self.neurons if neuron.hotkey == hotkey), None)
