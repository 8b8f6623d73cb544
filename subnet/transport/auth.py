"""Who is speaking: `btauth/1` request signatures, checked before the body.

The signature of `bittensor.http_auth` covers protocol, scheme, method, path, the SHA-256 of what it takes
for the body, a nanosecond nonce, sender and receiver. Its own `verify` wants the whole body first, so a
stranger could make a node buffer megabytes, an impostor could hold a neighbour's slots, and a slow upload
outlives the freshness window. Here what is signed as the body is the text of ``Content-Digest`` (RFC 9530),
which names the digests of the real one: identity, freshness and replay are judged from the headers alone,
and the body is hashed as it arrives and compared at its end. `http_auth.verify`, given that text, accepts
our requests, and we accept what `http_auth.sign` makes of it (tests hold both).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from bittensor import http_auth, sp_core
from bittensor.wallets import CRYPTO_TYPE_NAMES, parse_crypto_type

from subnet.transport.digests import Digests
from subnet.transport.errors import BadSignature, MalformedRequest, StaleRequest, WrongReceiver

DIGEST_HEADER: Final = "Content-Digest"
METHOD: Final = "POST"
_DIGEST: Final = re.compile(r"blake3-head=:([A-Za-z0-9+/]{43}=):, blake3-payload=:([A-Za-z0-9+/]{43}=):")
_SR25519: Final = "sr25519"


class Signer(Protocol):
    """What can sign as a hotkey: a bittensor keypair, or anything of its shape."""

    @property
    def ss58_address(self) -> str: ...

    @property
    def crypto_type(self) -> int: ...

    def sign(self, payload: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Claim:
    """What verified headers prove: `caller` signed, at `nonce_ns`, a body with these digests."""

    caller: str
    nonce_ns: int
    digests: Digests


def content_digest(digests: Digests) -> str:
    """The value of ``Content-Digest`` for a body with these digests."""
    head, payload = (base64.b64encode(each).decode() for each in (digests.head, digests.payload))
    return f"blake3-head=:{head}:, blake3-payload=:{payload}:"


def sign(signer: Signer, *, path: str, digests: Digests, receiver: str, nonce_ns: int) -> dict[str, str]:
    """Headers that authenticate one POST of a body with these digests to this receiver's path."""
    scheme = CRYPTO_TYPE_NAMES[signer.crypto_type]
    stated = content_digest(digests)
    payload = _payload(
        scheme=scheme,
        path=path,
        stated=stated,
        nonce=str(nonce_ns),
        sender=signer.ss58_address,
        receiver=receiver,
    )
    headers = {
        http_auth.HEADER_VERSION: http_auth.VERSION,
        http_auth.HEADER_HOTKEY: signer.ss58_address,
        http_auth.HEADER_RECEIVER: receiver,
        http_auth.HEADER_NONCE: str(nonce_ns),
        http_auth.HEADER_SIGNATURE: "0x" + signer.sign(payload).hex(),
        DIGEST_HEADER: stated,
    }
    if scheme != _SR25519:
        headers[http_auth.HEADER_CRYPTO] = scheme
    return headers


def stated_nonce(headers: Mapping[str, str]) -> str:
    """What a request gives as its nonce, proven or not; nothing if it gives none."""
    return headers.get(http_auth.HEADER_NONCE, "")


def claimed_hotkey(headers: Mapping[str, str]) -> str:
    """The hotkey that the request says it is from; nothing is proven yet."""
    return _header(headers, http_auth.HEADER_HOTKEY)


def verify(
    headers: Mapping[str, str],
    *,
    path: str,
    receiver: str,
    now_ns: int,
    max_age_s: float = http_auth.DEFAULT_MAX_AGE,
    allowed_skew_s: float = http_auth.DEFAULT_ALLOWED_SKEW,
) -> Claim:
    """Check everything of a signed POST that does not need its body, in the order of `http_auth.verify`.

    Args:
        headers: looked up by name as given here: a case-insensitive mapping.
        receiver: this node's hotkey.
        now_ns: Unix time in nanoseconds.

    Raises:
        MalformedRequest: a header is missing or unreadable.
        WrongReceiver: signed for another hotkey.
        StaleRequest: signed outside the window.
        BadSignature: not signed by the claimed hotkey.
    """
    version = headers.get(http_auth.HEADER_VERSION)
    if version != http_auth.VERSION:
        raise MalformedRequest(f"{http_auth.HEADER_VERSION} is {version!r}", f"sign with {http_auth.PROTOCOL}")
    sender = claimed_hotkey(headers)
    nonce = _header(headers, http_auth.HEADER_NONCE)
    signature_text = _header(headers, http_auth.HEADER_SIGNATURE)
    stated = _header(headers, DIGEST_HEADER)
    try:
        crypto_type = parse_crypto_type(headers.get(http_auth.HEADER_CRYPTO, _SR25519))
        signature = bytes.fromhex(signature_text.removeprefix("0x"))
        nonce_ns = int(nonce) if nonce.isascii() and nonce.isdigit() and len(nonce) <= 20 else None
    except ValueError:
        nonce_ns = None
    match = _DIGEST.fullmatch(stated)
    if nonce_ns is None or match is None:
        raise MalformedRequest(
            "signature scheme, signature, nonce or Content-Digest is unreadable",
            "send the btauth/1 headers and Content-Digest: blake3-head=:base64:, blake3-payload=:base64:",
        )
    target = _header(headers, http_auth.HEADER_RECEIVER)
    if target != receiver:
        raise WrongReceiver(f"signed for {target[:48]}, this is {receiver}", "look the peer's endpoint up again")
    age_s = (now_ns - nonce_ns) / 1e9
    if not -allowed_skew_s <= age_s <= max_age_s:
        raise StaleRequest(
            f"signed {age_s:.1f} s ago, allowed -{allowed_skew_s:g} to {max_age_s:g} s",
            "sign when sending and keep the clock in sync (NTP)",
        )
    payload = _payload(
        scheme=CRYPTO_TYPE_NAMES[crypto_type],
        path=path,
        stated=stated,
        nonce=nonce,
        sender=sender,
        receiver=target,
    )
    try:
        valid = sp_core.verify(payload, signature, sender, crypto_type)
    except ValueError:
        raise MalformedRequest(
            "hotkey or signature has a wrong length or encoding", "send ss58 and 64 bytes of hex"
        ) from None
    if not valid:
        raise BadSignature(f"signature is not {sender}'s for POST {path}", "sign with the hotkey that the header names")
    return Claim(sender, nonce_ns, Digests(base64.b64decode(match[1]), base64.b64decode(match[2])))


def _header(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if not value:
        raise MalformedRequest(f"header {name} is missing", f"sign with {http_auth.PROTOCOL}")
    return value


def _payload(*, scheme: str, path: str, stated: str, nonce: str, sender: str, receiver: str) -> bytes:
    """The signed bytes of `http_auth.build_payload`, with the text of ``Content-Digest`` as the body."""
    signed = hashlib.sha256(stated.encode()).hexdigest()
    lines = (http_auth.PROTOCOL, scheme, METHOD, path, signed, nonce, sender, receiver)
    return "\n".join(lines).encode()
