"""What a node reads of its subnet at one finalized block: plain values, no chain client.

Everything that decides something (roster, routing, merge, scores) takes a `ChainState`; `subnet.chain` makes them,
by `decode_neuron`, from the runtime's metagraph.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

BLOCK_SECONDS = 12.0
"""Of the Bittensor chain, for what is stated in years or hours: a local chain may be faster."""
_RAO = 1_000_000_000
_U16_MAX = 65_535
_MOST_FIELDS = 2


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
    """One uid of the subnet.

    `record` and `shards` are the two Raw fields of its hotkey's current commitment: None without a commitment or with
    one of another form, and empty without a second field.
    """

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
    shards: bytes = b""
    protocol: int = 0
    """The version that its axon was announced with (`subnet.transport.protocol`): any number, if it is not Orion's."""


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


def decode_neuron(uid: int, graph: Mapping[str, Sequence[object]], commitment: object) -> Neuron:
    """Row `uid` of the runtime's metagraph, which has a column per property."""

    def number(column: str) -> int:
        return int(cast("int", graph[column][uid]))

    fields, axon = _raw_fields(commitment), cast("Mapping[str, int]", graph["axons"][uid])
    return Neuron(
        uid=uid,
        hotkey=str(graph["hotkeys"][uid]),
        coldkey=str(graph["coldkeys"][uid]),
        stake=number("total_stake") / _RAO,
        validator_permit=bool(graph["validator_permit"][uid]),
        endpoint=_endpoint(axon),
        registered_at=number("block_at_registration"),
        last_update=number("last_update"),
        incentive=number("incentives") / _U16_MAX,
        dividends=number("dividends") / _U16_MAX,
        record=fields[0] if fields else None,
        record_block=int(cast("Mapping[str, int]", commitment)["block"]) if fields else None,
        shards=fields[1] if len(fields) == _MOST_FIELDS else b"",
        protocol=int(axon["version"]),
    )


def _endpoint(axon: Mapping[str, int]) -> Endpoint | None:
    ip, port = int(axon["ip"]), int(axon["port"])
    if not ip or not port:
        return None
    address = ipaddress.IPv6Address(ip) if int(axon["ip_type"]) == 6 else ipaddress.IPv4Address(ip & 0xFFFFFFFF)
    return Endpoint(str(address), port)


def _raw_fields(commitment: object) -> list[bytes]:
    """The fields of a commitment of one or two Raw fields; none of any other."""
    if not isinstance(commitment, dict):
        return []
    fields = [_raw(field) for field in commitment["info"]["fields"]]
    whole = [field for field in fields if field is not None]
    return whole if len(whole) == len(fields) <= _MOST_FIELDS else []


def _raw(field: object) -> bytes | None:
    """The bytes of a Raw field, decoded as 0x-hex or, if it is empty, []."""
    if not isinstance(field, dict):
        return None
    ((kind, value),) = field.items()
    if not str(kind).startswith("Raw"):
        return None
    return bytes.fromhex(value.removeprefix("0x")) if isinstance(value, str) else bytes(value)
