"""HTTP/1.1 heads, the part of RFC 9112 that signed messages need, so strict that no two readers can differ.

A head is a first line and fields, each line ended by CRLF, then an empty line. Refused here, though some accept it:
bare line feeds, folded lines, spaces before the colon, a field that comes twice, more than `HEAD_LIMIT` bytes. Bodies
have a length or there is none: who meets a transfer coding refuses it by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, TypeVar, overload

_T = TypeVar("_T")

HEAD_LIMIT: Final = 16 * 1024
"""Bytes of a head, its empty line included. A signed one has about 600."""
END: Final = b"\r\n\r\n"

_REQUEST: Final = re.compile(r"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.([01])")
_RESPONSE: Final = re.compile(r"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [ -~]*)?")
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class BadHead(ValueError):  # noqa: N818
    """Not a head of HTTP/1.1: one line with what is wrong."""


class Fields(Mapping[str, str]):
    """Header fields by name, in any case of letters."""

    __slots__ = ("_by_name",)

    def __init__(self, by_name: dict[str, str]) -> None:
        """`by_name` has lower-case keys."""
        self._by_name = by_name

    def __getitem__(self, name: str) -> str:
        return self._by_name[name.lower()]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._by_name

    @overload
    def get(self, name: str, /) -> str | None: ...
    @overload
    def get(self, name: str, /, default: _T) -> str | _T: ...
    def get(self, name: str, /, default: _T | None = None) -> str | _T | None:
        """As `Mapping` does it, in a tenth of the time."""
        return self._by_name.get(name.lower(), default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)


@dataclass(frozen=True, slots=True)
class Head:
    """What a request and a response have in common."""

    fields: Fields
    version: int
    """Minor: 0 or 1."""

    @property
    def length(self) -> int | None:
        """Bytes of the body; None if it has no readable length or comes in a transfer coding."""
        text = self.fields.get("content-length", "")
        if "transfer-encoding" in self.fields or not (text.isascii() and text.isdigit() and len(text) <= 15):
            return None
        return int(text)

    @property
    def keeps(self) -> bool:
        """Whether its sender keeps the connection open afterwards."""
        return self.version == 1 and "close" not in self.fields.get("connection", "").lower()


@dataclass(frozen=True, slots=True)
class RequestHead(Head):
    method: str
    target: str
    """Path and query, as sent."""


@dataclass(frozen=True, slots=True)
class ResponseHead(Head):
    status: int


def parse_request(raw: bytes) -> RequestHead:
    """Read a request's head, its end included. Raises `BadHead`."""
    first, fields = _split(raw)
    match = _REQUEST.fullmatch(first)
    if match is None:
        raise BadHead(f"request line {first[:64]!r}")
    return RequestHead(fields, int(match[3]), match[1], match[2])


def parse_response(raw: bytes) -> ResponseHead:
    """Read a response's head, its end included. Raises `BadHead`."""
    first, fields = _split(raw)
    match = _RESPONSE.fullmatch(first)
    if match is None:
        raise BadHead(f"status line {first[:64]!r}")
    return ResponseHead(fields, int(match[1]), int(match[2]))


def request(method: str, target: str, fields: Mapping[str, str]) -> bytes:
    """A request's head."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def response(status: int, length: int, *, kind: str, keep: bool, more: Sequence[str] = ()) -> bytes:
    """A response's head, for a body of `length` bytes and this media type, with `more` lines."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Type: {kind}", f"Content-Length: {length}"]
    lines += [*more, "", ""] if keep else [*more, "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1")


def _split(raw: bytes) -> tuple[str, Fields]:
    first, *lines = raw.removesuffix(END).decode("latin-1").split("\r\n")
    by_name: dict[str, str] = {}
    unclean = _CONTROL.search("".join(lines))
    for line in lines:
        # One pattern for all would try every way to share spaces between value and padding: seconds for a stranger.
        name, colon, value = line.partition(":")
        if not colon or not _NAME.fullmatch(name) or (unclean and _CONTROL.search(value)):
            raise BadHead(f"header line {line[:64]!r}")
        by_name[name.lower()] = value.strip(" \t")
    if len(by_name) != len(lines):
        raise BadHead("a header field comes twice")
    return first, Fields(by_name)
