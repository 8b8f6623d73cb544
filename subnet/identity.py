"""Who a node is to its peers: the hotkey that signs, and how anyone checks a signature.

sr25519 over raw bytes, with the SDK's compiled primitives. Importing this file does not import the SDK itself
(2 ms instead of half a second), so transport can be used and tested without a chain.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, Protocol

import bittensor_core

SIGNATURE_BYTES = 64
SCHEME: Final[ContextVar[int]] = ContextVar("signature scheme", default=bittensor_core.CRYPTO_SR25519)
"""Of hotkeys. Only a simulation has another one: sr25519 draws at random for each signature."""


class IdentityError(Exception):
    """A hotkey that cannot be used to sign."""


class HasHotkey(Protocol):
    """A wallet, as far as an identity needs one."""

    @property
    def hotkey(self) -> bittensor_core.Keypair:
        """The key pair that signs."""


@dataclass(frozen=True, slots=True)
class _Bare:
    hotkey: bittensor_core.Keypair


class Identity:
    """A wallet's hotkey, able to sign: a `transport.auth.Signer`. `hotkey` is its ss58 address."""

    def __init__(self, wallet: HasHotkey) -> None:
        keypair = wallet.hotkey
        if keypair.crypto_type != SCHEME.get():
            raise IdentityError(
                f"hotkey {keypair.ss58_address} is not an sr25519 key, peers could not verify it; "
                "create an sr25519 hotkey"
            )
        self._keypair = keypair
        self.hotkey: str = keypair.ss58_address
        self.ss58_address = self.hotkey
        self.crypto_type: int = keypair.crypto_type

    @classmethod
    def from_uri(cls, uri: str) -> Identity:
        """From a development URI such as `//Alice`; its secret is public."""
        return cls(_Bare(bittensor_core.Keypair.create_from_uri(uri, SCHEME.get())))

    def sign(self, message: bytes) -> bytes:
        """64 bytes that only this hotkey can make for `message`."""
        return bytes(self._keypair.sign(message))


def verify(hotkey: str, message: bytes, signature: bytes) -> bool:
    """Whether `hotkey` (ss58) signed `message`. Malformed input is False, never an exception."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    try:
        return bool(bittensor_core.verify(message, signature, hotkey, SCHEME.get()))
    except ValueError:
        return False
