"""Bodies between nodes of one machine: the sender writes them into memory of its own, the receiver reads them there.

Past the sockets, whose copies and wake-ups cost more than the hashes do. The request stays what it is, signed, admitted
and answered over its connection, but has no body; a field says where that lies: an anonymous file of the sender's
(memfd), which the receiver opens as /proc/PID/fd/NUMBER. It reads a copy, hashed like any body, so what the sender does
to the file meanwhile is seen. There is no name and nothing to clean up: the file goes with its last user, however that
one ends. Who cannot open it (another user, another container) says so, and the body is sent after all.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Final

from subnet.transport.digests import Digests, Running
from subnet.transport.errors import Elsewhere, MalformedRequest

FIELD: Final = "Orion-Memory"
"""The header field that says where a body lies."""
FROM: Final = 256 * 1024
"""Bytes from which on a body goes this way; a smaller one is sooner sent."""
OFFERED: Final = hasattr(os, "memfd_create")
"""Whether this system has files without a name."""
_NAME: Final = "orion-body"
_LINK: Final = f"/memfd:{_NAME} (deleted)"
_PIECE: Final = 1024 * 1024
"""Copied, then hashed while it is in the cache."""
_KEPT: Final = 16
"""Files kept for the next bodies, each as large as the largest it has held."""
_PLACE: Final = re.compile(r"([0-9]{1,10})/([0-9]{1,10})/([0-9]{1,15})")


def is_beside(host: str) -> bool:
    """Whether an address, in digits, is this machine's own loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a body lies."""

    process: int
    number: int
    length: int

    @classmethod
    def parse(cls, text: str) -> Place:
        """Raises `MalformedRequest`."""
        match = _PLACE.fullmatch(text)
        if match is None:
            raise MalformedRequest(f"{FIELD} {text[:40]!r} is no place", "send PROCESS/NUMBER/LENGTH")
        return cls(int(match[1]), int(match[2]), int(match[3]))

    def __str__(self) -> str:
        return f"{self.process}/{self.number}/{self.length}"

    def read(self, into: memoryview) -> Digests:
        """Copy the body into as many bytes; the digests of what was copied.

        Raises:
            Elsewhere: it cannot be opened from here, or is no such file.
            MalformedRequest: it ends before its length.
        """
        path = f"/proc/{self.process}/fd/{self.number}"
        try:
            # Looked at first: another thing of that process may block whoever opens it.
            if str(Path(path).readlink()) != _LINK:
                raise Elsewhere(f"{path} holds no body", "send it over the connection")
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise Elsewhere(f"{path} cannot be opened ({error.strerror})", "send it over the connection") from None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise Elsewhere(f"{path} holds no body", "send it over the connection")
            running, filled = Running(), 0
            while filled < self.length:
                piece = into[filled : filled + _PIECE]
                got = os.preadv(file, [piece], filled)
                if not got:
                    raise MalformedRequest(f"{filled} of {self.length} bytes in memory", "send the whole body")
                running.update(piece[:got])
                filled += got
            return running.digests()
        finally:
            os.close(file)


@dataclass(slots=True)
class Sheet:
    """A file that holds one body at a time."""

    number: int
    _writing: Lock = field(default_factory=Lock)
    """A call that is given up may still be writing, in a thread: its number must not be another file's meanwhile."""

    def write(self, parts: Sequence[memoryview], *, payload: bytes | None = None) -> tuple[Place, Digests]:
        """Put a body there; where it lies, and its digests, of which that of its payload may be known.

        Raises `OSError` where there is no room for it.
        """
        running, end = Running(), 0
        with self._writing:
            for part in parts:
                for start in range(0, part.nbytes, _PIECE):
                    piece = part[start : start + _PIECE]
                    written = 0
                    while written < piece.nbytes:
                        written += os.pwritev(self.number, [piece[written:]], end + written)
                    if part is parts[0] or payload is None:
                        running.update(piece)
                    end += piece.nbytes
        found = running.digests()
        digests = found if payload is None else Digests(found.head, payload)
        return Place(os.getpid(), self.number, end), digests

    def close(self) -> None:
        """Whoever has opened it keeps it."""
        with self._writing:
            os.close(self.number)


class Sheets:
    """One sender's files, used again: fresh pages would have to be cleared first."""

    def __init__(self) -> None:
        self._idle: list[Sheet] = []

    def take(self) -> Sheet:
        """One of one's own until it is given back. Raises `OSError`."""
        return self._idle.pop() if self._idle else Sheet(os.memfd_create(_NAME, os.MFD_CLOEXEC))

    def give_back(self, sheet: Sheet, *, read: bool) -> None:
        """`read`: nobody reads it any more; else its file is left to whoever still does."""
        if read and len(self._idle) < _KEPT:
            self._idle.append(sheet)
        else:
            sheet.close()

    def close(self) -> None:
        """Let go of all that are not in use."""
        while self._idle:
            self._idle.pop().close()
