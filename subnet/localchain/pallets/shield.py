"""The MEV shield: extrinsics that travel encrypted until the block's author opens them.

The SDK refuses to send `burned_register` in the clear. It signs it at nonce + 1, encrypts it to `MevShield.NextKey`
(ML-KEM-768, the shared secret is the XChaCha20-Poly1305 key, no associated data) and sends it inside a carrier,
`submit_encrypted`, at nonce. The author of the block that holds the carrier decrypts it and puts the inner extrinsic
right behind it, where it passes the same checks as any other.

The real chain announces a fresh key with every block. Here the key is one for ever and comes from a public seed, like
every other key of this chain: what is rehearsed is the path, not the secrecy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

from Crypto.Cipher import ChaCha20_Poly1305
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

from subnet.localchain.codec import blake2_256
from subnet.localchain.dispatch import Args, Call, Context, Function

_SEED = b"orion localchain: MEV shield"
_KEY_HASH = 16
_KEM_CIPHERTEXT = 1_088
_NONCE = 24
_TAG = 16


@dataclass(frozen=True, slots=True)
class Envelope:
    """A ciphertext taken apart.

    On the wire: twox-128 of the key, u16 length of the KEM ciphertext, that, nonce, AEAD ciphertext.
    """

    kem: bytes
    nonce: bytes
    sealed: bytes

    @classmethod
    def parse(cls, data: bytes) -> Envelope | None:
        """None for bytes that are no envelope."""
        start = _KEY_HASH + 2
        length = int.from_bytes(data[_KEY_HASH:start], "little")
        sealed_at = start + length + _NONCE
        if length != _KEM_CIPHERTEXT or len(data) < sealed_at + _TAG:
            return None
        return cls(data[start : start + length], data[sealed_at - _NONCE : sealed_at], data[sealed_at:])


@cache
def _key() -> MLKEM768PrivateKey:
    return MLKEM768PrivateKey.from_seed_bytes(blake2b(_SEED, digest_size=64).digest())


def public_key() -> bytes:
    """The ML-KEM-768 encapsulation key that the chain announces, 1184 bytes."""
    return _key().public_key().public_bytes_raw()


def unseal(call: Call) -> bytes | None:
    """The inner extrinsic of a carrier; None for any other call, and for a ciphertext that does not open."""
    if (call.pallet, call.function) != ("MevShield", "submit_encrypted"):
        return None
    envelope = Envelope.parse(call.args.blob("ciphertext"))
    if envelope is None:
        return None
    secret = _key().decapsulate(envelope.kem)
    cipher = ChaCha20_Poly1305.new(key=secret, nonce=envelope.nonce)
    try:
        return cipher.decrypt_and_verify(envelope.sealed[:-_TAG], envelope.sealed[-_TAG:])
    except ValueError:
        return None


def _submit_encrypted(ctx: Context, origin: str, args: Args) -> None:
    identity = blake2_256(args.blob("ciphertext"))
    ctx.emit("MevShield", "EncryptedSubmitted", {"id": "0x" + identity.hex(), "who": origin})


CALLS: Mapping[str, Function] = {"submit_encrypted": _submit_encrypted}
