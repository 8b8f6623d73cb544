"""Heads of HTTP/1.1: what is read, and that whatever two readers could take differently is refused."""

from __future__ import annotations

import pytest

from subnet.transport import http1
from subnet.transport.http1 import BadHead


def test_a_request_survives_the_wire() -> None:
    head = http1.parse_request(http1.request("POST", "/push", {"Host": "a:1", "Content-Length": "7", "X-Empty": ""}))
    assert (head.method, head.target, head.version) == ("POST", "/push", 1)
    assert dict(head.fields) == {"host": "a:1", "content-length": "7", "x-empty": ""}
    assert head.fields["CONTENT-length"] == "7"
    assert "Content-Length" in head.fields
    assert head.fields.get("Nothing") is None
    assert (head.length, head.keeps) == (7, True)


@pytest.mark.parametrize("keep", [True, False])
def test_a_response_survives_the_wire(keep: bool) -> None:
    head = http1.parse_response(http1.response(421, 12, kind="application/json", keep=keep))
    assert (head.status, head.length, head.keeps) == (421, 12, keep)
    assert head.fields["content-type"] == "application/json"


def test_white_space_around_a_value_is_no_part_of_it() -> None:
    assert http1.parse_request(b"GET / HTTP/1.1\r\nA:\t b c \t\r\n\r\n").fields["a"] == "b c"


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET /\r\n\r\n",
        b"get / HTTP/1.1\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET http://elsewhere/ HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\nA: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nA : b\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\nContent-Length: 1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nA:" + b" " * 15_000 + b"\x01\r\n\r\n",  # must not take long either
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n: nameless\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\ncontent-length: 2\r\n\r\n",
    ],
)
def test_requests_that_are_refused(raw: bytes) -> None:
    with pytest.raises(BadHead):
        http1.parse_request(raw)


@pytest.mark.parametrize("raw", [b"HTTP/1.1 999 No\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n", b"ICY 200 OK\r\n\r\n"])
def test_responses_that_are_refused(raw: bytes) -> None:
    with pytest.raises(BadHead, match="status line"):
        http1.parse_response(raw)


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"Content-Length": "0"}, 0),
        ({}, None),
        ({"Content-Length": "-1"}, None),
        ({"Content-Length": "+1"}, None),
        ({"Content-Length": "1, 1"}, None),
        ({"Content-Length": "9" * 16}, None),
        ({"Content-Length": "5", "Transfer-Encoding": "chunked"}, None),
    ],
)
def test_what_the_length_of_a_body_is(fields: dict[str, str], length: int | None) -> None:
    assert http1.parse_request(http1.request("POST", "/", fields)).length == length


@pytest.mark.parametrize(
    ("version", "connection", "keeps"), [(1, "keep-alive", True), (1, "Close", False), (0, "", False)]
)
def test_who_keeps_a_connection(version: int, connection: str, keeps: bool) -> None:
    assert http1.parse_request(f"GET / HTTP/1.{version}\r\nConnection: {connection}\r\n\r\n".encode()).keeps is keeps
