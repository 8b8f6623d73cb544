"""What can go wrong between two hotkeys, as types that survive the wire.

Three families. `Refused`: the other side, or our own admission, said no; it has a fixed HTTP status and a
fixed code, and travels as ``{"error": code, "message": one line}``, so the dendrite raises the class that
the axon raised. `Unreachable`: nobody answered in time, so it is not known whether the request was carried
out. `BadReply`: somebody answered with something that is not a reply to what was asked. Callers choose by
type, never by the message's text: `Busy` and `Unavailable` mean another try elsewhere or later, `Dropped`
means never again, the rest are a fault of one side.
"""

from __future__ import annotations

import json
from typing import ClassVar, Final

MESSAGE_LIMIT: Final = 500
"""Characters of a message; a longer one is cut, on both sides of the wire."""


class TransportError(Exception):
    """Base of everything the transport raises on purpose."""


class PortTaken(TransportError):  # noqa: N818  (as its siblings: what happened, in the field's words)
    """The axon cannot listen where it was told to."""


class Unreachable(TransportError):  # noqa: N818
    """No complete answer: refused, cut or too late. The request may have been carried out."""


class Silent(Unreachable):
    """No answer in time: it may be gone, frozen or slow. Any other `Unreachable` says that nobody listens there."""


class Unserved(Unreachable):
    """Not carried out, and worth sending again at once: a request before it ended the connection, or it was in a
    version of the protocol that the other side is too old for."""


class BadReply(TransportError):  # noqa: N818
    """The answer is not a reply of the type, shape or size that was asked for: the peer's fault."""


class Refused(TransportError):  # noqa: N818
    """A request was refused; subclasses fix `status` and `code`.

    `reason` names the value and the limit, `remedy` what to do; together they are one line. `peer` is the
    endpoint that refused, None when this process did.
    """

    status: ClassVar[int] = 400
    code: ClassVar[str] = "refused"

    def __init__(self, reason: str, remedy: str = "", *, retry_after: float | None = None) -> None:
        line = f"{reason}; {remedy}" if remedy else reason
        line = "".join(c if c.isprintable() else " " for c in line)  # a peer's text ends up in our log
        self.message = line[:MESSAGE_LIMIT]
        self.retry_after = retry_after
        """Seconds after which another try makes sense, where the refusing side knows."""
        self.peer: str | None = None
        super().__init__(self.message)

    def to_wire(self) -> bytes:
        """The body of the error reply: JSON, at most a few kilobytes."""
        fields: dict[str, str | float] = {"error": self.code, "message": self.message}
        if self.retry_after is not None:
            fields["retry_after"] = self.retry_after
        return json.dumps(fields).encode()


class MalformedRequest(Refused):
    """Not a request of this protocol: method, headers, framing or JSON."""

    status, code = 400, "malformed"


class BadSignature(Refused):
    """The signature does not belong to the claimed hotkey, or the body is not the one that was signed."""

    status, code = 401, "bad_signature"


class StaleRequest(Refused):
    """Signed too long ago, or in the future: a late packet or a clock that is off."""

    status, code = 401, "stale"


class UnknownHotkey(Refused):
    """The caller is not registered, or not a neighbour of this node in the round's roster."""

    status, code = 403, "unknown_hotkey"


class NotPicked(Refused):
    """No seed picked what was asked for, so nobody is shown it."""

    status, code = 403, "not_picked"


class OverQuota(Refused):
    """The caller has had what it may have, of a round or of a time; asking again at once cannot help."""

    status, code = 403, "over_quota"


class UnknownRoute(Refused):
    """This axon does not serve that kind of synapse."""

    status, code = 404, "unknown_route"


class OtherVersion(Refused):
    """The request is in a version of the protocol that this node does not speak."""

    status, code = 404, "other_version"


class UnknownRun(Refused):
    """The request names a run (manifest) this node does not take part in; asking again cannot help."""

    status, code = 404, "unknown_run"


class TooSlow(Refused):
    """The body came below the minimum rate and was cut off."""

    status, code = 408, "too_slow"


class ReplayedRequest(Refused):
    """This very request was seen before."""

    status, code = 409, "replayed"


class Dropped(Refused):
    """DROP: it will never be accepted, here or by a sibling: its round, version or attempt is over."""

    status, code = 410, "dropped"


class LengthRequired(Refused):
    """No Content-Length, so its size cannot be judged before reading it."""

    status, code = 411, "length_required"


class TooLarge(Refused):
    """More bytes than any valid request of this kind has."""

    status, code = 413, "too_large"


class WrongReceiver(Refused):
    """The request was signed for another hotkey: an address that changed hands, or a request passed on."""

    status, code = 421, "wrong_receiver"


class WrongTensor(Refused):
    """A tensor's name, dtype, shape or size is not what the plan says."""

    status, code = 422, "wrong_tensor"


class NotFinite(Refused):
    """A tensor holds NaN or infinity."""

    status, code = 422, "not_finite"


class Busy(Refused):
    """BUSY: no slot for this caller now; back off for `retry_after` or try a sibling."""

    status, code = 429, "busy"


class Full(Busy):
    """BUSY because the replica has work enough waiting: a sibling may have room, and so will this one soon."""

    status, code = 429, "full"


class Broken(Refused):
    """The handler failed in a way nobody foresaw; that node's log has the traceback under the given id."""

    status, code = 500, "internal"


class Unavailable(Refused):
    """The node cannot serve anybody now: buffers full, starting or stopping."""

    status, code = 503, "unavailable"


REFUSALS: Final[dict[str, type[Refused]]] = {
    kind.code: kind
    for kind in (
        MalformedRequest, BadSignature, StaleRequest, UnknownHotkey, UnknownRoute, OtherVersion, UnknownRun, TooSlow,
        ReplayedRequest, Dropped, LengthRequired, TooLarge, WrongReceiver, WrongTensor, NotFinite, Busy,
        Full, Broken, Unavailable, NotPicked, OverQuota,
    )
}  # fmt: skip


def from_wire(status: int, body: bytes) -> Refused | BadReply:
    """The exception that an error reply stands for.

    Never raises: a body that is no error of this protocol, or has another code's status, is a `BadReply`.
    """
    try:
        fields = json.loads(body)
        kind, message, retry_after = REFUSALS[fields["error"]], fields["message"], fields.get("retry_after")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return BadReply(f"answered {status} with a body that is no Orion error; is another program listening there?")
    if not isinstance(message, str) or kind.status != status:
        return BadReply(f"answered {status} for error {kind.code!r}, whose status is {kind.status}")
    known = isinstance(retry_after, int | float) and 0 <= retry_after < 3600
    return kind(message, retry_after=float(retry_after) if known else None)
