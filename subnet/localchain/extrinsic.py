"""Signed extrinsics: made, taken apart, and everything that the runtime checks before it runs one.

Version 4: compact length, 0x84, MultiAddress, MultiSignature, era, compact nonce, compact tip, metadata-hash
mode, call. What is signed is the call, these extensions, and what is implied and never travels: spec and
transaction version, genesis hash and the hash of the era's first block. So a signature made for another
chain, another runtime or another block is a bad signature, exactly as on a Substrate node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import bittensor_core

from subnet.localchain import errors
from subnet.localchain.codec import Codec, blake2_256
from subnet.localchain.dispatch import Call
from subnet.localchain.metadata import SS58_FORMAT, read_compact

_SIGNED_V4 = 0x84
_ACCOUNT_ID = 0
_CRYPTO = {0: bittensor_core.CRYPTO_ED25519, 1: bittensor_core.CRYPTO_SR25519}
_BAD_FORMAT = 1001


@dataclass(frozen=True, slots=True)
class Era:
    """The blocks in which an extrinsic is valid: [birth, death), or always when `period` is 0."""

    period: int
    phase: int

    def birth(self, current: int) -> int:
        """The era's first block, as seen from block `current`."""
        if self.period == 0:
            return 0
        return (max(current, self.phase) - self.phase) // self.period * self.period + self.phase

    def death(self, current: int) -> int | None:
        return None if self.period == 0 else self.birth(current) + self.period


@dataclass(frozen=True, slots=True)
class Extrinsic:
    """A signed extrinsic whose call has been decoded."""

    raw: bytes
    hash: bytes
    signer: str
    public_key: bytes
    scheme: int
    signature: bytes
    era: Era
    nonce: int
    tip: int
    call_data: bytes
    call: Call


def make(
    codec: Codec,
    call: bytes,
    key: bittensor_core.Keypair,
    *,
    period: int,
    nonce: int,
    current: tuple[int, bytes],
    genesis: bytes,
) -> bytes:
    """A call signed by `key`, valid in the `period` blocks (0: always) that begin with block `current`."""
    era: Mapping[str, int] | str = {"period": period, "current": current[0]} if period else "00"
    first = current[1] if period else genesis
    payload = codec.signature_payload(call, era=era, nonce=nonce, tip=0, genesis_hash=genesis, era_hash=first)
    return codec.signed_extrinsic(
        call,
        public_key=bytes(key.public_key),
        scheme=key.crypto_type,
        signature=bytes(key.sign(payload)),
        era=era,
        nonce=nonce,
        tip=0,
    )


def parse(codec: Codec, raw: bytes) -> Extrinsic:
    """Take a signed extrinsic apart; RpcError 1001 for bytes that are none."""
    try:
        return _parse(codec, raw)
    except (ValueError, IndexError) as error:
        raise errors.RpcError(_BAD_FORMAT, f"Extrinsic has invalid format: {error}") from error


def _parse(codec: Codec, raw: bytes) -> Extrinsic:
    length, at = read_compact(raw, 0)
    if length != len(raw) - at:
        raise ValueError(f"its length prefix says {length} bytes, {len(raw) - at} follow")
    if raw[at] != _SIGNED_V4:
        raise ValueError(f"first byte 0x{raw[at]:02x}, only signed version 4 (0x84) is accepted")
    if raw[at + 1] != _ACCOUNT_ID:
        raise ValueError(f"address kind {raw[at + 1]}, only account ids (0) are accepted")
    public_key = raw[at + 2 : at + 34]
    scheme = raw[at + 34]
    if scheme not in _CRYPTO:
        raise ValueError(f"signature scheme {scheme}, only ed25519 (0) and sr25519 (1) are accepted")
    signature = raw[at + 35 : at + 99]
    era, at = _parse_era(raw, at + 99)
    nonce, at = read_compact(raw, at)
    tip, at = read_compact(raw, at)
    if raw[at] != 0:
        raise ValueError(f"metadata hash mode {raw[at]}, only 0 (disabled) is accepted")
    call_data = raw[at + 1 :]
    signer = bittensor_core.ss58_encode(public_key, SS58_FORMAT)
    call = Call.of(codec.decode_call(call_data))
    return Extrinsic(raw, blake2_256(raw), signer, public_key, scheme, signature, era, nonce, tip, call_data, call)


def _parse_era(raw: bytes, at: int) -> tuple[Era, int]:
    if raw[at] == 0:
        return Era(0, 0), at + 1
    encoded = int.from_bytes(raw[at : at + 2], "little")
    period = 2 << (encoded & 15)
    phase = (encoded >> 4) * max(1, period >> 12)
    if period < 4 or phase >= period:
        raise ValueError(f"mortal era 0x{encoded:04x} has period {period} and phase {phase}")
    return Era(period, phase), at + 2


def check_signature(
    codec: Codec, extrinsic: Extrinsic, *, current: int, block_hash: Callable[[int], bytes | None]
) -> None:
    """InvalidTransaction unless it was signed for this chain, with an era that includes block `current`.

    `block_hash` gives the hash of a past block, None for one that is unknown or forgotten.
    """
    birth = extrinsic.era.birth(current)
    era_hash = block_hash(birth) if birth <= current else None
    genesis = block_hash(0)
    if era_hash is None or genesis is None:
        raise errors.InvalidTransaction(errors.ANCIENT_BIRTH_BLOCK)
    era = extrinsic.era
    payload = codec.signature_payload(
        extrinsic.call_data,
        era={"period": era.period, "phase": era.phase} if era.period else "00",
        nonce=extrinsic.nonce,
        tip=extrinsic.tip,
        genesis_hash=genesis,
        era_hash=era_hash,
    )
    signer = bittensor_core.Keypair(public_key=extrinsic.public_key, crypto_type=_CRYPTO[extrinsic.scheme])
    if not signer.verify(payload, extrinsic.signature):
        raise errors.InvalidTransaction(errors.BAD_SIGNATURE)
