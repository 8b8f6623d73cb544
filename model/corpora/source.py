"""What documents are read from: files of known size and content, read by ranges, wherever they lie."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model.data import DataError

PIECE = 1 << 20
"""Bytes."""


class Source(Protocol):
    """One file. It must not change while it is used."""

    @property
    def name(self) -> str:
        """The file as its owner knows it, without the way to it."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def identity(self) -> str:
        """What changes with the content: "sha256:…", or "etag:…" where a store has it, or "size" where nothing else is
        known."""
        ...

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, which is at most `size`. Raises `DataError`."""
        ...


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A file on a disk, known by its SHA-256."""

    path: Path
    name: str
    size: int
    identity: str
    changed_ns: int
    """Time of its last change, when it was hashed."""

    @classmethod
    def open(cls, path: Path, name: str) -> LocalSource:
        """Hashes the file. Raises `DataError`."""
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"source {path} cannot be read ({error.strerror}): check --from") from error
        return cls(path, name, found.st_size, f"sha256:{digest}", found.st_mtime_ns)

    def read(self, start: int, end: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                file.seek(start)
                data = file.read(end - start)
        except OSError as error:
            raise DataError(f"source {self.path} cannot be read ({error.strerror}): start again to go on") from error
        if (found.st_size, found.st_mtime_ns) != (self.size, self.changed_ns) or len(data) != end - start:
            raise DataError(f"source {self.path} changed while it was read: leave it alone and give another --out")
        return data


class SourceReader(io.RawIOBase):
    """A source as the file object that other libraries want."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._source.size}[whence]
        self._place = base + offset
        return self._place

    def read(self, size: int = -1, /) -> bytes:
        end = self._source.size if size < 0 else min(self._place + size, self._source.size)
        data = self._source.read(self._place, end) if self._place < end else b""
        self._place += len(data)
        return data
