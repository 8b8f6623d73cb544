"""The door by itself: btauth/1 as bittensor writes it, replays under odd clocks, slots and buffers."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from bittensor import http_auth
from bittensor.sp_core import Keypair
from multidict import CIMultiDict

from subnet.transport import auth
from subnet.transport.admission import Admission, ReplayCache
from subnet.transport.digests import Digests
from subnet.transport.errors import (
    BadSignature,
    Busy,
    LengthRequired,
    MalformedRequest,
    Refused,
    ReplayedRequest,
    StaleRequest,
    TooLarge,
    Unavailable,
    UnknownHotkey,
    WrongReceiver,
)

ALICE = Keypair.create_from_uri("//Alice")
BOB = Keypair.create_from_uri("//Bob")
EVE = Keypair.create_from_uri("//Eve")
SECOND = 1_000_000_000
BODY = b"body"
DIGESTS = Digests(b"h" * 32, b"p" * 32)
NO_DIGESTS = Digests(bytes(32), bytes(32))


class Clock:
    def __init__(self) -> None:
        self.ns = 1_000 * SECOND

    def __call__(self) -> int:
        return self.ns


def rule(hotkey: str, route: str) -> None:
    if hotkey != ALICE.ss58_address:
        raise UnknownHotkey(f"{hotkey} is not in the roster for {route}", "register on the subnet")


def admission(clock: Clock, *, slots: int = 2, buffer_bytes: int = 100) -> Admission:
    return Admission(BOB.ss58_address, allow=rule, now_ns=clock, slots=slots, buffer_bytes=buffer_bytes)


def request(
    nonce_ns: int, signer: Keypair = ALICE, receiver: str = BOB.ss58_address, length: int = len(BODY)
) -> CIMultiDict[str]:
    headers = auth.sign(signer, path="/push", digests=DIGESTS, receiver=receiver, nonce_ns=nonce_ns)
    return CIMultiDict(headers | {"Content-Length": str(length)})


def admit(door: Admission, headers: CIMultiDict[str], *, stack: ExitStack | None = None) -> None:
    with ExitStack() as own:
        (stack or own).enter_context(door.admit(headers, route="push", path="/push", max_bytes=64))


def test_bittensors_own_verifier_accepts_our_headers() -> None:
    headers = request(5)
    caller = http_auth.verify(
        headers,
        headers["Content-Digest"].encode(),
        method="POST",
        path="/push",
        self_hotkey_ss58=BOB.ss58_address,
        now_ns=6,
        nonce_store=http_auth.InMemoryNonceStore(),
    )
    assert caller.hotkey_ss58 == ALICE.ss58_address


def test_headers_signed_by_bittensor_are_accepted() -> None:
    clock = Clock()
    door = admission(clock)
    headers = request(clock.ns)
    stated = headers["Content-Digest"].encode()
    headers.update(
        http_auth.sign(
            ALICE, method="POST", path="/push", body=stated, receiver_ss58=BOB.ss58_address, nonce_ns=clock.ns
        )
    )
    with door.admit(headers, route="push", path="/push", max_bytes=64) as ticket:
        assert (ticket.caller, ticket.length) == (ALICE.ss58_address, len(BODY))
        assert ticket.digests == DIGESTS


@pytest.mark.parametrize(
    ("change", "kind", "status", "told"),
    [
        ({"Content-Length": None}, LengthRequired, 411, "no Content-Length"),
        ({"Content-Length": "65"}, TooLarge, 413, "body of 65 bytes, limit 64"),
        ({"Content-Length": "-1"}, MalformedRequest, 400, "no size"),
        ({"Content-Length": "9" * 4000}, MalformedRequest, 400, "no size"),
        ({"Transfer-Encoding": "chunked"}, MalformedRequest, 400, "chunked"),
        ({"Content-Encoding": "gzip"}, MalformedRequest, 400, "compressed"),
        ({"X-Bittensor-Version": "2"}, MalformedRequest, 400, "X-Bittensor-Version is '2'"),
        ({"X-Bittensor-Hotkey": None}, MalformedRequest, 400, "X-Bittensor-Hotkey is missing"),
        ({"X-Bittensor-Hotkey": "nobody"}, UnknownHotkey, 403, "not in the roster"),
        ({"X-Bittensor-Nonce": "1_0"}, MalformedRequest, 400, "unreadable"),
        ({"X-Bittensor-Nonce": str(1_001 * SECOND)}, BadSignature, 401, "is not"),
        ({"X-Bittensor-Signature": "0xzz"}, MalformedRequest, 400, "unreadable"),
        ({"X-Bittensor-Signature": "0x00"}, MalformedRequest, 400, "wrong length"),
        ({"X-Bittensor-Signature": "0x" + "01" * 64}, BadSignature, 401, "is not"),
        ({"X-Bittensor-Crypto": "rsa"}, MalformedRequest, 400, "unreadable"),
        ({"X-Bittensor-Crypto": "ed25519"}, BadSignature, 401, "is not"),
        ({"Content-Digest": None}, MalformedRequest, 400, "Content-Digest is missing"),
        ({"Content-Digest": "blake3-head=:AAAA:, blake3-payload=:AAAA:"}, MalformedRequest, 400, "unreadable"),
        ({"Content-Digest": auth.content_digest(NO_DIGESTS)[:-1]}, MalformedRequest, 400, "unreadable"),
        (
            {"Content-Digest": auth.content_digest(NO_DIGESTS).replace("blake3-head", "blake3")},
            MalformedRequest,
            400,
            "unreadable",
        ),
        ({"Content-Digest": auth.content_digest(NO_DIGESTS)}, BadSignature, 401, "is not"),
        ({"X-Bittensor-Receiver": None}, MalformedRequest, 400, "X-Bittensor-Receiver is missing"),
        ({"X-Bittensor-Receiver": EVE.ss58_address}, WrongReceiver, 421, "signed for"),
    ],
)
def test_headers_that_are_refused(change: dict[str, str | None], kind: type[Refused], status: int, told: str) -> None:
    clock = Clock()
    headers = request(clock.ns)
    for name, value in change.items():
        headers.pop(name, None)
        if value is not None:
            headers[name] = value
    with pytest.raises(kind) as caught:
        admit(admission(clock), headers)
    assert caught.value.status == status
    assert told in caught.value.message


def test_the_path_is_part_of_what_is_signed() -> None:
    clock = Clock()
    with (
        pytest.raises(BadSignature),
        admission(clock).admit(request(clock.ns), route="pull", path="/pull", max_bytes=64),
    ):
        pass


@pytest.mark.parametrize(("age_s", "fresh"), [(9.9, True), (10.1, False), (-1.9, True), (-2.1, False)])
def test_freshness(age_s: float, fresh: bool) -> None:
    clock = Clock()
    door = admission(clock)
    clock.ns += 60 * SECOND
    headers = request(clock.ns - int(age_s * SECOND))
    if fresh:
        admit(door, headers)
    else:
        with pytest.raises(StaleRequest, match=f"signed {age_s:.1f} s ago, allowed -2 to 10 s"):
            admit(door, headers)


def test_a_request_is_accepted_once() -> None:
    clock = Clock()
    door = admission(clock)
    headers = request(clock.ns)
    admit(door, headers)
    with pytest.raises(ReplayedRequest) as caught:
        admit(door, headers)
    assert caught.value.status == 409


def test_a_forged_request_does_not_use_up_the_nonce() -> None:
    clock = Clock()
    door = admission(clock)
    forged = request(clock.ns)
    forged["X-Bittensor-Signature"] = "0x" + "01" * 64
    with pytest.raises(BadSignature):
        admit(door, forged)
    admit(door, request(clock.ns))


def test_no_clock_lets_a_nonce_in_twice() -> None:
    """An accepted nonce is refused for ever after, also when the clock steps back; memory is bounded."""
    cache = ReplayCache(window_ns=12, now_ns=100)
    accepted = []
    for now in [*range(100, 400), *range(350, 200, -3), *range(210, 500, 7)]:
        nonce = now + 2
        try:
            cache.accept("a", nonce, now_ns=now)
        except Refused:
            continue
        accepted.append(nonce)
        for old in accepted:
            with pytest.raises((ReplayedRequest, StaleRequest)):
                cache.accept("a", old, now_ns=now)
    assert len(accepted) == len(set(accepted)) > 300
    assert len(cache._young) + len(cache._old) <= 60


def test_what_was_forgotten_stays_refused_when_later_generations_are_older() -> None:
    """A clock that steps back fills a generation with smaller nonces than the one before it had."""
    cache = ReplayCache(window_ns=12, now_ns=100)
    cache.accept("a", 112, now_ns=100)
    for now, nonce in [(112, 111), (124, 124), (136, 136)]:
        cache.accept("a", nonce, now_ns=now)
    with pytest.raises(StaleRequest):
        cache.accept("a", 112, now_ns=136)


def test_a_restart_does_not_let_a_recorded_request_in() -> None:
    clock = Clock()
    recorded = request(clock.ns)
    admit(admission(clock), recorded)
    clock.ns += SECOND
    with pytest.raises(StaleRequest, match="memory of requests"):
        admit(admission(clock), recorded)


def test_slots_and_buffers_are_held_by_the_admitted_only() -> None:
    clock = Clock()
    door = admission(clock, slots=2, buffer_bytes=100)
    with ExitStack() as stack:
        admit(door, request(clock.ns, length=60), stack=stack)
        with pytest.raises(Unavailable, match="60 bytes on top of 60 in buffers, limit 100") as full:
            admit(door, request(clock.ns + 1, length=60))
        admit(door, request(clock.ns + 2), stack=stack)
        with pytest.raises(Busy, match=r"2 requests of .* in progress, limit 2") as busy:
            admit(door, request(clock.ns + 3))
        assert (full.value.status, busy.value.status, busy.value.retry_after) == (503, 429, 0.1)
    admit(door, request(clock.ns + 4, length=60))
    assert (door._buffered, dict(door._held)) == (0, {})


def test_an_impostor_cannot_hold_a_neighbours_slots() -> None:
    clock = Clock()
    door = admission(clock, slots=1)
    forged = request(clock.ns, signer=EVE)
    forged["X-Bittensor-Hotkey"] = ALICE.ss58_address
    with ExitStack() as stack:
        with pytest.raises(BadSignature):
            admit(door, forged, stack=stack)
        admit(door, request(clock.ns), stack=stack)
