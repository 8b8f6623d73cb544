"""Who may speak, and how much: decided from the headers, before a byte of the body is read.

In this order, cheapest and most telling first: a Content-Length within what any valid request of the route
has; the claimed hotkey allowed on the route (the owner's rule, from the round's roster); its signature,
freshness and replay; a free slot of that hotkey; room in the buffers of the whole node. A slot or buffer is
thus only ever held by a caller that has proven who it is. What is admitted is a `Ticket`, valid inside
`with admission.admit(...)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from bittensor import http_auth

from subnet.transport import auth
from subnet.transport.digests import Digests
from subnet.transport.errors import (
    Busy,
    LengthRequired,
    MalformedRequest,
    ReplayedRequest,
    StaleRequest,
    TooLarge,
    Unavailable,
)

_NS: Final = 1_000_000_000

Allow = Callable[[str, str], None]
"""(hotkey, route): returns if that hotkey may use that route now, else raises a `Refused`."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """An admitted request: who sent it, how many bytes follow and what their digests are."""

    caller: str
    length: int
    digests: Digests


class ReplayCache:
    """Remembers accepted nonces while they are fresh: two generations, so expiry never searches for an entry.

    What is forgotten is refused as stale from then on, whatever the clock says: a clock that steps back, or a
    restart, does not let a recorded request in. The floor therefore starts at the time of construction.
    """

    def __init__(self, *, window_ns: int, now_ns: int) -> None:
        self._window = window_ns
        self._floor = now_ns
        self._turn = now_ns + window_ns
        self._young: set[tuple[str, int]] = set()
        self._old: set[tuple[str, int]] = set()

    def accept(self, hotkey: str, nonce_ns: int, *, now_ns: int) -> None:
        """Record a nonce whose signature has been verified.

        Raises:
            StaleRequest: older than anything this cache can still tell apart.
            ReplayedRequest: seen before.
        """
        if now_ns >= self._turn:
            self._floor = max(self._floor, max((nonce + 1 for _, nonce in self._old), default=0))
            self._old, self._young = self._young, set()
            self._turn = now_ns + self._window
        if nonce_ns < self._floor:
            raise StaleRequest(
                f"signed {(now_ns - nonce_ns) / _NS:.1f} s ago, before this axon's memory of requests begins",
                "sign again and keep the clock in sync (NTP)",
            )
        key = (hotkey, nonce_ns)
        if key in self._young or key in self._old:
            raise ReplayedRequest(f"nonce {nonce_ns} of {hotkey} was used", "sign every try with a new nonce")
        self._young.add(key)


class Admission:
    """The rules at a node's door. One per node, shared by everything that listens for its hotkey."""

    def __init__(
        self,
        hotkey: str,
        *,
        allow: Allow,
        now_ns: Callable[[], int],
        slots: int = 8,
        buffer_bytes: int = 1 << 30,
        max_age_s: float = http_auth.DEFAULT_MAX_AGE,
        allowed_skew_s: float = http_auth.DEFAULT_ALLOWED_SKEW,
    ) -> None:
        """
        Args:
            hotkey: ss58 of this node; requests signed for another are refused.
            allow: the owner's rule.
            now_ns: Unix time in nanoseconds, as signed nonces use.
            slots: requests of one hotkey admitted at a time. More refusals with 429 than expected? Raise it.
            buffer_bytes: bytes of all admitted bodies together, the memory that callers can claim.
            max_age_s: age of a signature accepted, in seconds.
            allowed_skew_s: seconds that a sender's clock may be ahead.
        """
        self.hotkey = hotkey
        self._allow = allow
        self._now_ns = now_ns
        self._slots = slots
        self._buffer_bytes = buffer_bytes
        self._max_age_s = max_age_s
        self._allowed_skew_s = allowed_skew_s
        self._replays = ReplayCache(window_ns=int((max_age_s + allowed_skew_s) * _NS), now_ns=now_ns())
        self._held: Counter[str] = Counter()
        self._buffered = 0

    @contextmanager
    def admit(self, headers: Mapping[str, str], *, route: str, path: str, max_bytes: int) -> Iterator[Ticket]:
        """Admit one request, holding its slot and buffer until the block ends.

        Args:
            headers: of the request, a case-insensitive mapping.
            route: name of the route, for `allow`.
            path: request target as received, which the signature covers.
            max_bytes: the largest valid body of this route.

        Raises:
            Refused: the subclass says why; nothing is held then.
        """
        length = _length(headers, max_bytes)
        self._allow(auth.claimed_hotkey(headers), route)
        now = self._now_ns()
        claim = auth.verify(
            headers,
            path=path,
            receiver=self.hotkey,
            now_ns=now,
            max_age_s=self._max_age_s,
            allowed_skew_s=self._allowed_skew_s,
        )
        self._replays.accept(claim.caller, claim.nonce_ns, now_ns=now)
        held = self._held[claim.caller]
        if held >= self._slots:
            raise Busy(
                f"{held} requests of {claim.caller} in progress, limit {self._slots}",
                "back off or try a sibling",
                retry_after=0.1,
            )
        if self._buffered + length > self._buffer_bytes:
            raise Unavailable(
                f"{length} bytes on top of {self._buffered} in buffers, limit {self._buffer_bytes}",
                "back off or try a sibling",
                retry_after=1.0,
            )
        self._held[claim.caller] += 1
        self._buffered += length
        try:
            yield Ticket(claim.caller, length, claim.digests)
        finally:
            self._buffered -= length
            self._held[claim.caller] -= 1
            if not self._held[claim.caller]:
                del self._held[claim.caller]


def _length(headers: Mapping[str, str], max_bytes: int) -> int:
    if "Transfer-Encoding" in headers or "Content-Encoding" in headers:
        raise MalformedRequest("chunked or compressed body", "send the blob as it is, with its Content-Length")
    text = headers.get("Content-Length")
    if text is None:
        raise LengthRequired("no Content-Length", "send one: bodies are judged by size before they are read")
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise MalformedRequest(f"Content-Length {text[:20]!r} is no size", "send it in decimal bytes")
    if int(text) > max_bytes:
        raise TooLarge(f"body of {text} bytes, limit {max_bytes} on this route", "send what the run's plan says")
    return int(text)
