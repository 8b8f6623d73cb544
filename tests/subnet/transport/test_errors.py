"""Errors survive the wire as the class they were, and a peer's nonsense never becomes one."""

from __future__ import annotations

import pytest

from subnet.transport import errors
from subnet.transport.errors import BadReply, Busy, Refused


@pytest.mark.parametrize("kind", errors.REFUSALS.values())
def test_every_refusal_survives_the_wire(kind: type[Refused]) -> None:
    sent = kind("7 of 5", "use fewer", retry_after=0.5)
    got = errors.from_wire(kind.status, sent.to_wire())
    assert type(got) is kind
    assert got.message == "7 of 5; use fewer"
    assert got.retry_after == 0.5


def descendants(kind: type[Refused]) -> set[type[Refused]]:
    return {child for direct in kind.__subclasses__() for child in (direct, *descendants(direct))}


def test_every_subclass_is_in_the_table_under_a_code_of_its_own() -> None:
    assert set(errors.REFUSALS.values()) == descendants(Refused)
    assert len({kind.code for kind in descendants(Refused)}) == len(descendants(Refused))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>", b"[]", b"{}", b'{"error":"no such"}', b'{"error":["busy"],"message":"m"}',
        b'{"error":"busy","message":3}', b'{"error":"stale","message":"another status"}', b"[" * 9000,
        b"\xff",
    ],
)  # fmt: skip
def test_other_bodies_are_bad_replies(body: bytes) -> None:
    assert isinstance(errors.from_wire(429, body), BadReply)


@pytest.mark.parametrize("wait", ['"x"', "-1", "1e9", "NaN", "[]"])
def test_a_senseless_retry_after_is_ignored(wait: str) -> None:
    got = errors.from_wire(429, b'{"error":"busy","message":"m","retry_after":%b}' % wait.encode())
    assert isinstance(got, Busy)
    assert got.retry_after is None


def test_messages_are_one_short_printable_line() -> None:
    message = Refused("a\nb\x1b[31m\u2028" + "c" * 5000, "d").message
    assert message.isprintable()
    assert len(message) == errors.MESSAGE_LIMIT
