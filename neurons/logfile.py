"""A file of lines that is only ever added to, on a disk that may be full and by a process that may be killed."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol


class Lines(Protocol):
    """Where text goes, a line at a time."""

    def write(self, text: str, /) -> object:
        """Raises `OSError` if it is not all there then."""

    def close(self) -> None: ...


class LogFile:
    """A file that lines are added to, each whole or not at all as far as readers see: what was cut off gets an end
    before the next."""

    def __init__(self, path: Path) -> None:
        """Goes on at the end of `path`. Raises `OSError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._torn = _is_torn(path)
        self._number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if self._torn:
            with suppress(OSError):  # on a full disk it is ended later
                self._torn = not os.write(self._number, b"\n")

    def write(self, text: str, /) -> None:
        """Raises `OSError`."""
        data = ("\n" + text if self._torn else text).encode()
        written = os.write(self._number, data)
        self._torn = (self._torn and not written) or 0 < written < len(data)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        os.close(self._number)


def _is_torn(path: Path) -> bool:
    """Whether a file ends in the middle of a line."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"
