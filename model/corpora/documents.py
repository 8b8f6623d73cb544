"""Documents of JSONL and text files.

A file is read in blocks, each of which can be read alone. A block of bytes holds the documents that begin in it, so
blocks of any size give the same documents, and none is found twice. Separators that can overlap themselves ("\n\n" in
"\n\n\n") are refused, because who begins to read in the middle would not know where one ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Protocol

from model.corpora.compressed import compressed_lines, compression
from model.corpora.source import PIECE, Source
from model.data import DataError
from model.nearest import nearest

NEWLINE = b"\n"


class LeftOut(Enum):
    """Why a document is not in the shards."""

    EMPTY = auto()
    """Nothing but white space, or null."""
    TOO_LONG = auto()
    BROKEN = auto()
    """No UTF-8, or a line that is no JSON."""


class BrokenError(DataError):
    """A document that cannot be read, in a file that can: one line with its place and what is wrong."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a source that is read in one go: `start` to `end` are bytes, or row groups of a parquet file."""

    source: int
    """Number of the source."""
    start: int
    end: int
    size: int
    """Bytes."""


class Reader(Protocol):
    """How one format is read. `skip_broken` says whether a broken document is left out, or an error."""

    def blocks(self, number: int, source: Source, size: int) -> list[Block]:
        """Source `number` cut into blocks of about `size` bytes. Raises `DataError` for a file of another kind."""
        ...

    def documents(self, source: Source, block: Block) -> Iterator[str | LeftOut]:
        """The block's documents in order, `TOO_LONG` and perhaps `BROKEN` ones too; empty ones are text here. Raises
        `DataError`, `BrokenError` for a broken document."""
        ...


@dataclass(frozen=True, slots=True)
class JsonLines:
    """One JSON object a line; `column` holds the text, in nested objects by a dotted name. A line is at most `longest`
    bytes; null is an empty document. A compressed file is one block."""

    column: str
    longest: int
    skip_broken: bool = False

    def blocks(self, number: int, source: Source, size: int) -> list[Block]:
        whole = compression(source.name) is not None
        return _ranges(number, source.size, max(size, source.size) if whole else size)

    def documents(self, source: Source, block: Block) -> Iterator[str | LeftOut]:
        for first, raw, line in self._lines(source, block):
            if raw is None:
                yield LeftOut.TOO_LONG
            elif raw.strip():
                try:
                    yield self._text(source, raw, first=first, line=line)
                except BrokenError:
                    if not self.skip_broken:
                        raise
                    yield LeftOut.BROKEN

    def _lines(self, source: Source, block: Block) -> Iterator[tuple[bool, bytes | None, Callable[[], int]]]:
        """Whether a line is the first of its file; its bytes, None for too many; what finds out its number, for which
        all before it may have to be read."""
        if compression(source.name) is not None:
            for number, raw in enumerate(compressed_lines(source, self.longest), 1):
                yield number == 1, raw, partial(int, number)
        else:
            for place, raw in spans(source, block.start, block.end, NEWLINE, self.longest):
                yield place == 0, raw, partial(_line, source, place)

    def _text(self, source: Source, raw: bytes, *, first: bool, line: Callable[[], int]) -> str:
        def at(wrong: str) -> str:
            return f"source {source.name}, line {line()}: {wrong}"

        try:
            value = _value(json.loads(_decoded(raw, first=first)), self.column)
            if isinstance(value, str):
                value.encode()  # JSON can spell halves of characters that no text has
        except _MissingColumn as error:
            raise DataError(at(f"{error}: change --column or the file")) from error
        except UnicodeError as error:
            raise BrokenError(at(f"no UTF-8 ({_reason(error)}): mend it or --skip-broken")) from error
        except (ValueError, RecursionError) as error:
            raise BrokenError(at(f"no JSON ({error}): mend it, --skip-broken or change --format")) from error
        if value is not None and not isinstance(value, str):
            raise DataError(at(f"column '{self.column}' is {type(value).__name__}, no text: change --column"))
        return value or ""


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text in UTF-8: a document is a file or, with a `separator`, what stands between two of them, without line breaks
    at its ends. It is at most `longest` bytes."""

    separator: str | None
    longest: int
    skip_broken: bool = False

    def __post_init__(self) -> None:
        """Raises `DataError` for a separator that is empty or can overlap itself."""
        mark = self.separator
        if mark is not None and (not mark or any(mark.startswith(mark[start:]) for start in range(1, len(mark)))):
            raise DataError(f"separator {mark!r} is empty or can overlap itself: choose another --separator")

    def blocks(self, number: int, source: Source, size: int) -> list[Block]:
        if self.separator is None:
            return [Block(number, 0, source.size, source.size)]
        return _ranges(number, source.size, size)

    def documents(self, source: Source, block: Block) -> Iterator[str | LeftOut]:
        if self.separator is None:
            found: Iterable[tuple[int, bytes | None]] = [
                (0, source.read(0, source.size) if source.size <= self.longest else None)
            ]
        else:
            found = spans(source, block.start, block.end, self.separator.encode(), self.longest)
        for place, raw in found:
            if raw is None:
                yield LeftOut.TOO_LONG
                continue
            try:
                text = _decoded(raw, first=place == 0)
            except UnicodeDecodeError as error:
                if not self.skip_broken:
                    raise BrokenError(
                        f"source {source.name}, byte {place + error.start}: no UTF-8 ({error.reason}): convert the "
                        "file or --skip-broken"
                    ) from error
                yield LeftOut.BROKEN
            else:
                yield text if self.separator is None else text.strip("\r\n")


def spans(source: Source, start: int, end: int, separator: bytes, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """Place and bytes of what lies between separators and begins at `start` to `end`; None for more than `longest`
    bytes, of which no more than that is held beyond the block."""
    stop = min(end, source.size)
    base = max(0, start - len(separator))
    data = source.read(base, stop)
    place = 0
    if start > 0:
        found = data.find(separator)
        if found < 0:
            return
        place = found + len(separator)
    while base + place < stop:
        found = data.find(separator, place)
        if found < 0:
            yield base + place, _whole(source, data[place:], stop, separator, longest)
            return
        yield base + place, data[place:found] if found - place <= longest else None
        place = found + len(separator)


def _whole(source: Source, begun: bytes, place: int, separator: bytes, longest: int) -> bytes | None:
    """What begins with `begun` and goes on at `place` of the source."""
    data = bytearray(begun)
    while place < source.size:
        if len(data) >= longest + len(separator):
            return None
        seen = max(0, len(data) - len(separator) + 1)
        piece = source.read(place, min(place + PIECE, source.size))
        data += piece
        place += len(piece)
        found = data.find(separator, seen)
        if found >= 0:
            del data[found:]
            break
    return bytes(data) if len(data) <= longest else None


def _ranges(number: int, total: int, size: int) -> list[Block]:
    starts = range(0, total, size)
    return [Block(number, start, min(start + size, total), min(size, total - start)) for start in starts]


def _decoded(raw: bytes, *, first: bool) -> str:
    return raw.decode("utf-8-sig" if first else "utf-8")


def _reason(error: UnicodeError) -> str:
    return error.reason if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else str(error)


class _MissingColumn(Exception):  # noqa: N818 - never leaves this file
    """What is missing, and what is there instead."""


def _value(record: object, column: str) -> object:
    """Column `column` of a parsed line. Raises `_MissingColumn`."""
    if isinstance(record, dict) and column in record:
        return record[column]
    value = record
    for part in column.split("."):
        if not isinstance(value, dict):
            raise _MissingColumn(f"column '{column}' is not there")
        if part not in value:
            raise _MissingColumn(missing_column(column, part, value))
        value = value[part]
    return value


def missing_column(column: str, part: str, there: Iterable[str]) -> str:
    """One phrase: column `column` is missing because `part` is not among `there`, and which of them is nearest."""
    names = list(there)
    hint = f"did you mean '{nearest(part, names)}'? It has {', '.join(names[:20])}" if names else "there are none"
    return f"column '{column}' is not there, {hint}"


def _line(source: Source, place: int) -> int:
    """Number of the line that begins at `place`, from 1."""
    starts = range(0, place, PIECE)
    return 1 + sum(source.read(start, min(start + PIECE, place)).count(NEWLINE) for start in starts)
