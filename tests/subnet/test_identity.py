"""Signatures that peers can check."""

from __future__ import annotations

import subprocess
import sys

import bittensor_core
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subnet.identity import Identity, IdentityError, verify

ALICE = Identity.from_uri("//Alice")
BOB = Identity.from_uri("//Bob")


@given(st.binary(max_size=300))
def test_a_signature_verifies_for_its_signer_and_message_only(message: bytes) -> None:
    signature = ALICE.sign(message)
    assert len(signature) == 64
    assert verify(ALICE.hotkey, message, signature)
    assert not verify(BOB.hotkey, message, signature)
    assert not verify(ALICE.hotkey, message + b"x", signature)


@given(st.text(max_size=60), st.binary(max_size=80))
def test_garbage_is_false_and_never_raises(hotkey: str, signature: bytes) -> None:
    assert not verify(hotkey, b"message", signature)
    assert not verify(ALICE.hotkey, b"message", signature)


def test_an_ed25519_hotkey_is_refused() -> None:
    class Wallet:
        hotkey = bittensor_core.Keypair.create_from_uri("//Alice", bittensor_core.CRYPTO_ED25519)

    with pytest.raises(IdentityError, match="not an sr25519 key"):
        Identity(Wallet())


def test_importing_it_does_not_import_the_sdk() -> None:
    code = "import sys, subnet.identity; sys.exit('bittensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
