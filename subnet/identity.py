"""Who a node is to its peers: the hotkey that signs, and how anyone checks a signature.

sr25519 over raw bytes, with the SDK's compiled primitives. Importing this file does not import the SDK itself (2 ms
instead of half a second), so transport can be used and tested without a chain.
"""

from __future__ import annotations

from pathlib import Path

import bittensor_core

SIGNATURE_BYTES = 64


class IdentityError(Exception):
    """A hotkey that cannot be used to sign."""


class Identity:
    """A hotkey that can sign. `hotkey` is its ss58 address; it has the shape of `transport.auth.Signer`."""

    def __init__(self, keypair: bittensor_core.Keypair) -> None:
        if keypair.crypto_type != bittensor_core.CRYPTO_SR25519:
            raise IdentityError(
                f"hotkey {keypair.ss58_address} is not an sr25519 key: peers could not verify it; create an sr25519 hotkey"
            )
        self._keypair = keypair
        self.hotkey: str = keypair.ss58_address
        self.ss58_address = self.hotkey
        self.crypto_type: int = keypair.crypto_type

    @classmethod
    def from_uri(cls, uri: str) -> Identity:
        """From a development URI such as `//Alice`; its secret is public."""
        return cls(bittensor_core.Keypair.create_from_uri(uri))

    @classmethod
    def from_keyfile(cls, path: Path) -> Identity:
        """From an unencrypted hotkey file of a Bittensor wallet."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise IdentityError(
                f"hotkey file {path} cannot be read ({error.strerror}); check --wallet and --hotkey"
            ) from error
        try:
            return cls(bittensor_core.deserialize_keypair_from_keyfile_data(data))
        except (ValueError, bittensor_core.KeyfileError) as error:
            raise IdentityError(
                f"hotkey file {path} holds no usable key ({error}); is it encrypted?"
            ) from error

    def sign(self, message: bytes) -> bytes:
        """64 bytes that only this hotkey can make for `message`."""
        return bytes(self._keypair.sign(message))


def verify(hotkey: str, message: bytes, signature: bytes) -> bool:
    """Whether `hotkey` (ss58) signed `message`. A malformed address or signature is False, never an exception."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    try:
        return bool(bittensor_core.verify(message, signature, hotkey, bittensor_core.CRYPTO_SR25519))
    except ValueError:
        return False
