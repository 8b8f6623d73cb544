"""SCALE for the local chain: the SDK's own compiled codec, driven by real subtensor metadata.

`bittensor_core.Runtime` turns metadata into an encoder and decoder of storage keys, values, calls, events and
runtime-API results, so nothing about the chain's types is written down a second time here. This file adds
what a node needs and a client does not: storage items by name, error indices by name, inputs of runtime APIs.

Decoded values are plain Python: ints, bools, ss58 strings for accounts, 0x-hex for byte arrays, lists, dicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import cast

import bittensor_core

from subnet.localchain import metadata
from subnet.localchain.metadata import compact


def blake2_256(data: bytes) -> bytes:
    """The hash of blocks, headers and extrinsics on every Substrate chain."""
    return blake2b(data, digest_size=32).digest()


@dataclass(frozen=True, slots=True)
class Item:
    """One storage item of the metadata."""

    pallet: str
    name: str
    value_type: str
    default: bytes
    optional: bool


class Codec:
    """Encoder and decoder of everything that crosses the chain's border."""

    def __init__(self, *, slot_ms: int) -> None:
        raw = metadata.load(slot_ms=slot_ms)
        self.metadata_option = metadata.as_option(raw)
        self._rt = bittensor_core.Runtime(
            raw, metadata.SPEC_VERSION, metadata.TRANSACTION_VERSION, metadata.SS58_FORMAT
        )
        self._items: dict[str, Item] = {}
        self._apis: dict[str, dict[str, Mapping[str, object]]] = self._rt.runtime_api_map()
        pallets = self._rt.metadata_ir()["pallets"]
        self._errors: dict[tuple[str, str], tuple[int, int]] = {
            (pallet["name"], error["name"]): (pallet["index"], error["index"])
            for pallet in pallets
            for error in pallet["errors"]
        }
        self._events = self.item("System.Events").value_type

    # storage --------------------------------------------------------------------------------------

    def item(self, name: str) -> Item:
        """The storage item `Pallet.Name`; KeyError for one that the metadata does not have."""
        found = self._items.get(name)
        if found is None:
            pallet, _, short = name.partition(".")
            entry = self._rt.storage_entry(pallet, short)
            found = Item(pallet, short, entry.value_type, bytes(entry.default_bytes), entry.modifier == "Optional")
            self._items[name] = found
        return found

    def key(self, name: str, keys: Sequence[object] = ()) -> bytes:
        """The storage key of one value, or the prefix of many where `keys` are fewer than the map has."""
        item = self.item(name)
        return bytes(self._rt.storage_key(item.pallet, item.name, list(keys)))

    def encode_value(self, name: str, value: object) -> bytes:
        return bytes(self._rt.encode(self.item(name).value_type, value))

    def decode_value(self, name: str, raw: bytes | None) -> object:
        """A stored value; where none is stored, the item's default, or None for an optional one."""
        item = self.item(name)
        if raw is None:
            return None if item.optional else self._rt.decode(item.value_type, item.default)
        return cast("object", self._rt.decode(item.value_type, raw))

    def map_key(self, name: str, key: bytes, *, fixed: int) -> list[object]:
        """The key components after the first `fixed` ones, recovered from a full storage key."""
        item = self.item(name)
        return list(self._rt.decode_storage_key_params(item.pallet, item.name, key, fixed))

    # calls, extrinsics, events --------------------------------------------------------------------

    def decode_call(self, data: bytes) -> Mapping[str, object]:
        """The call as a dict (`call_module`, `call_function`, `call_args`); ValueError for other bytes."""
        return cast("Mapping[str, object]", self._rt.decode_call(data))

    def encode_call(self, pallet: str, function: str, args: Mapping[str, object]) -> bytes:
        return bytes(self._rt.compose_call(pallet, function, dict(args)))

    def timestamp_inherent(self, now_ms: int) -> bytes:
        """The unsigned extrinsic that opens every block."""
        body = b"\x04" + bytes(self._rt.compose_call("Timestamp", "set", {"now": now_ms}))
        return compact(len(body)) + body

    def signature_payload(
        self,
        call: bytes,
        *,
        era: Mapping[str, int] | str,
        nonce: int,
        tip: int,
        genesis_hash: bytes,
        era_hash: bytes,
    ) -> bytes:
        """What the signer of an extrinsic must have signed, on this chain at this runtime version."""
        return bytes(
            self._rt.signature_payload(
                call,
                era=era if isinstance(era, str) else dict(era),
                nonce=nonce,
                tip=tip,
                tip_asset_id=None,
                genesis_hash=genesis_hash,
                era_block_hash=era_hash,
            )
        )

    def signed_extrinsic(
        self,
        call: bytes,
        *,
        public_key: bytes,
        scheme: int,
        signature: bytes,
        era: Mapping[str, int] | str,
        nonce: int,
        tip: int,
    ) -> bytes:
        """A call with its signature, as it travels."""
        data, _ = self._rt.encode_signed_extrinsic(
            call,
            public_key=public_key,
            signature=signature,
            signature_version=scheme,
            era=era if isinstance(era, str) else dict(era),
            nonce=nonce,
            tip=tip,
            tip_asset_id=None,
        )
        return bytes(data)

    def encode_events(self, records: Sequence[Mapping[str, object]]) -> bytes:
        return bytes(self._rt.encode(self._events, list(records)))

    def error_index(self, pallet: str, name: str) -> tuple[int, int]:
        """(pallet index, error index) of a dispatch error; KeyError for a name the metadata lacks."""
        return self._errors[pallet, name]

    # runtime APIs ---------------------------------------------------------------------------------

    def has_api(self, api: str, method: str) -> bool:
        return method in self._apis.get(api, {})

    def decode_inputs(self, api: str, method: str, data: bytes) -> list[object]:
        inputs = cast("list[tuple[str, str]]", self._apis[api][method]["inputs"])
        if not inputs:
            return []
        return list(self._rt.decode("(" + ",".join(kind for _, kind in inputs) + ",)", data))

    def encode_output(self, api: str, method: str, value: object) -> bytes:
        return bytes(self._rt.encode(cast("str", self._apis[api][method]["output"]), value))
