"""The runtime metadata that the chain serves and encodes by: the recorded one, with two edits.

* `Aura.SlotDuration`, the constant from which the SDK derives wall-clock times, is set to the block time of
  this run.
* `SubtensorModule.SubnetEpochConsensus` is added. The SDK (11.3) reads it before it sets weights, and the
  recorded
  runtime (spec 461) is from just before that item existed; as a number, 0 means Yuma, which is its default.

Metadata is SCALE, so an edit is a splice: find the bytes that name the place, replace what follows.
"""

from __future__ import annotations

import lzma
from importlib.resources import files

SPEC_NAME = "node-subtensor"
SPEC_VERSION = 461
TRANSACTION_VERSION = 1
SS58_FORMAT = 42

_FILE = "data/subtensor-metadata-v15-spec461.scale.xz"
_MAP = 1


def load(*, slot_ms: int) -> bytes:
    """The edited metadata, without the Option<Vec<u8>> around it. `slot_ms`: milliseconds between blocks."""
    packed = lzma.decompress((files("subnet.localchain") / _FILE).read_bytes())
    _, start = read_compact(packed, 1)
    metadata = _with_u64_constant(packed[start:], "SlotDuration", slot_ms)
    # A map from netuid to a number that defaults to 0, like the item whose shape it takes.
    return _with_copied_item(metadata, pallet="SubtensorModule", model="SubnetMechanism", name="SubnetEpochConsensus")


def as_option(metadata: bytes) -> bytes:
    """The metadata as `Metadata_metadata_at_version` returns it: Some, length, bytes."""
    return b"\x01" + compact(len(metadata)) + metadata


def compact(value: int) -> bytes:
    """SCALE compact encoding of an unsigned integer below 2**64."""
    if value < 1 << 6:
        return bytes([value << 2])
    if value < 1 << 14:
        return (value << 2 | 1).to_bytes(2, "little")
    if value < 1 << 30:
        return (value << 2 | 2).to_bytes(4, "little")
    body = value.to_bytes(8, "little").rstrip(b"\0").ljust(4, b"\0")
    return bytes([(len(body) - 4) << 2 | 3]) + body


def read_compact(data: bytes, offset: int) -> tuple[int, int]:
    """(value, offset after it) of the compact integer at `offset`; ValueError where the data ends."""
    if offset >= len(data):
        raise ValueError(f"compact integer at byte {offset} of {len(data)}: the data ends there")
    mode = data[offset] & 3
    size = (1, 2, 4)[mode] if mode < 3 else (data[offset] >> 2) + 5
    if offset + size > len(data):
        raise ValueError(f"compact integer at byte {offset} needs {size} bytes, {len(data) - offset} are left")
    if mode < 3:
        return int.from_bytes(data[offset : offset + size], "little") >> 2, offset + size
    return int.from_bytes(data[offset + 1 : offset + size], "little"), offset + size


def _text(value: str) -> bytes:
    return compact(len(value)) + value.encode()


def _with_u64_constant(metadata: bytes, name: str, value: int) -> bytes:
    """A constant is name, compact type id, SCALE bytes; of the name's places, it is the one before a u64."""
    at = metadata.find(_text(name))
    while at >= 0:
        _, value_at = read_compact(metadata, at + len(_text(name)))
        if metadata[value_at : value_at + 1] == compact(8):
            return metadata[: value_at + 1] + value.to_bytes(8, "little") + metadata[value_at + 9 :]
        at = metadata.find(_text(name), at + 1)
    raise ValueError(f"the metadata has no u64 constant {name}")


def _with_copied_item(metadata: bytes, *, pallet: str, model: str, name: str) -> bytes:
    """Add the map `name` to a pallet's storage:

    the type, hasher and default of `model`, without its documentation.
    """
    head = _text(pallet) + b"\x01" + _text(pallet)  # the pallet's name, Some(storage), the storage prefix
    count_at = metadata.index(head) + len(head)
    count, first = read_compact(metadata, count_at)
    model_at = metadata.index(_text(model), first)
    shape = model_at + len(_text(model))
    if metadata[shape + 1] != _MAP:
        raise ValueError(f"{pallet}.{model} is not a map in the metadata")
    hashers, at = read_compact(metadata, shape + 2)
    _, at = read_compact(metadata, at + hashers)  # the key's type
    _, at = read_compact(metadata, at)  # the value's type
    default, at = read_compact(metadata, at)
    item = _text(name) + metadata[shape : at + default] + compact(0)
    return metadata[:count_at] + compact(count + 1) + metadata[first:model_at] + item + metadata[model_at:]
