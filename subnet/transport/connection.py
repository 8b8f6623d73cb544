"""One TCP stream between two nodes, read into and written from the caller's memory without a copy in between.

`asyncio`'s streams, and HTTP servers built on them, receive into a buffer of their own, copy it to the parser's chunks
and those to the body, and copy what a socket does not take at once: two thirds of the time of a large message. Here
the socket is read straight into the preallocated body and written straight from the tensors. The loop says when there
is something to do; each time one piece of at most `PIECE` bytes passes, so large bodies hold up nobody else.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from subnet.transport.http1 import END, HEAD_LIMIT, BadHead

PIECE: Final = 1024 * 1024
"""Bytes received or sent before the loop has its turn: about half a millisecond."""
Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
"""As `socket.getaddrinfo` gives it."""
HEAP: Final = 256 * 1024
"""Bytes of a large body that are waited for at a time: a slow link delivers 64 KiB or less, each worth a wake-up."""
_BUFFERS: Final = 64
"""Parts handed to one system call, far below what any system allows (1024)."""


class Connection:
    """A connected, or connecting, non-blocking stream socket. One reader and one writer at a time."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        """`peer` names the other end in messages."""
        self.peer = peer
        self.connected = False
        """By `connect`."""
        self._sock = sock
        self._number = sock.fileno()  # what the loop knows it by: it would print a socket that it does not know
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray(HEAD_LIMIT)
        self._ahead = range(0)
        """Where in the buffer bytes lie that came with the last head."""
        self._heap = 1
        self._waiting: set[asyncio.Future[None]] = set()

    async def connect(self, address: Address) -> None:
        """Raises `OSError`."""
        try:
            self._sock.connect(address)
        except BlockingIOError:
            await self._until(lambda: True, self._loop.add_writer, self._loop.remove_writer)
            error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error)) from None
        self.connected = True

    @property
    def source(self) -> str:
        """IP address of the other end, of a connection that was accepted."""
        return self.peer.rpartition(":")[0]

    @property
    def quiet(self) -> bool:
        """Open, with nothing to read: ready for another request."""
        if self._ahead or self._sock.fileno() < 0:
            return False
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    async def head(self) -> bytes | None:
        """The next head, its empty line included; None if the stream ends before it begins.

        Raises:
            BadHead: too long, or cut off.
            OSError: the connection broke.
        """
        buffer, count = self._buffer, len(self._ahead)
        buffer[:count] = buffer[self._ahead.start : self._ahead.stop]
        self._ahead = range(0)
        view = memoryview(buffer)
        while (end := buffer.find(END, 0, count)) < 0:
            if count == HEAD_LIMIT:
                raise BadHead(f"head of more than {HEAD_LIMIT} bytes")
            got = await self.some(view[count:])
            if not got and count:
                raise BadHead(f"head cut off after {count} bytes")
            if not got:
                return None
            count += got
        self._ahead = range(end + len(END), count)
        return bytes(view[: end + len(END)])

    async def some(self, into: memoryview) -> int:
        """Receive at least one byte; the number received, 0 at the stream's end. Raises `OSError`."""
        if self._ahead:
            return self._take(into)
        while True:
            try:
                return self._sock.recv_into(into)
            except BlockingIOError:
                await self._readable()

    async def fill(self, into: memoryview, seen: Callable[[memoryview], object] | None = None) -> int:
        """Receive exactly `into`, unless the stream ends; the number of bytes received. Raises `OSError`.

        `seen` is called with each piece as it arrives.
        """
        size = into.nbytes
        filled = self._take(into)
        if filled and seen is not None:
            seen(into[:filled])

        def advance() -> bool:
            nonlocal filled
            got = self._sock.recv_into(into[filled : filled + PIECE])
            if got and seen is not None:
                seen(into[filled : filled + got])
            filled += got
            if self._heap > 1 and size - filled < self._heap:
                self._wait_for(max(1, size - filled))
            return filled == size or not got

        if filled < size and not _at_once(advance):
            large = size - filled > HEAP
            if large:
                self._wait_for(HEAP)
            try:
                await self._until(advance, self._loop.add_reader, self._loop.remove_reader)
            finally:
                if large and self._sock.fileno() >= 0:
                    self._wait_for(1)
        return filled

    async def write(self, parts: Sequence[bytes | memoryview], *, heed: bool = False) -> bool:
        """Send the parts in order; whether they were all sent. Raises `OSError`.

        `heed` ends it when something arrives, or the stream ends, before all could be sent.
        """
        left = [view for part in parts if (view := memoryview(part)).nbytes]

        def advance() -> bool:
            sent = self._sock.sendmsg(_piece(left))
            while left and sent >= left[0].nbytes:
                sent -= left.pop(0).nbytes
            if sent:
                left[0] = left[0][sent:]
            return not left

        if left and not _at_once(advance):
            await self._until(advance, self._loop.add_writer, self._loop.remove_writer, heed=heed)
        return not left

    def close(self, *, abruptly: bool = False) -> None:
        """End it; whoever waits for it gets a `ConnectionAbortedError`. `abruptly` tells the peer by a reset."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._number)
        self._loop.remove_writer(self._number)
        if abruptly:
            close_abruptly(self._sock)
        else:
            self._sock.close()
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(ConnectionAbortedError("closed by this node"))

    def _wait_for(self, size: int) -> None:
        """Be woken only when so many bytes have come, or the stream has ended."""
        self._heap = size
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def _take(self, into: memoryview) -> int:
        count = min(len(self._ahead), into.nbytes)
        if count:
            start = self._ahead.start
            into[:count] = self._buffer[start : start + count]
            self._ahead = self._ahead[count:]
        return count

    async def _readable(self) -> None:
        await self._until(lambda: True, self._loop.add_reader, self._loop.remove_reader)

    async def _until(
        self,
        advance: Callable[[], bool],
        add: Callable[..., object],
        remove: Callable[..., object],
        *,
        heed: bool = False,
    ) -> None:
        """Call `advance` whenever the socket is ready, until it returns True or raises; or, to `heed`, data arrives."""
        done: asyncio.Future[None] = self._loop.create_future()
        add(self._number, _step, advance, done)
        if heed:
            self._loop.add_reader(self._number, _settle, done)
        self._waiting.add(done)
        try:
            await done
        finally:
            self._waiting.discard(done)
            if self._sock.fileno() >= 0:
                remove(self._number)
                if heed:
                    self._loop.remove_reader(self._number)


def close_abruptly(sock: socket.socket) -> None:
    """Tell the peer by a reset, and keep nothing of it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def _at_once(advance: Callable[[], bool]) -> bool:
    try:
        return advance()
    except BlockingIOError:
        return False


def _step(advance: Callable[[], bool], done: asyncio.Future[None]) -> None:
    if done.done():
        return
    try:
        if advance():
            done.set_result(None)
    except BlockingIOError:
        return
    except OSError as error:
        done.set_exception(error)


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _piece(parts: Sequence[memoryview]) -> list[memoryview]:
    """The first `PIECE` bytes of the parts."""
    room, piece = PIECE, []
    for part in parts[:_BUFFERS]:
        piece.append(part[:room])
        room -= part.nbytes
        if room <= 0:
            break
    return piece
