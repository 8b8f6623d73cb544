"""Warm connections to one neighbour: a cold one costs about a second for the first boundary tensor at 50 ms."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

from subnet.transport.connection import Address, Connection
from subnet.transport.line import Line
from subnet.transport.sockets import THIS_MACHINE, Sockets


class Neighbour:
    """Up to `streams` connections to one endpoint, kept for the next call: one for all large bodies, the others taken
    and given back inside `async with gate`."""

    def __init__(self, endpoint: str, streams: int, *, version: int, sockets: Sockets = THIS_MACHINE) -> None:
        """`version` of the protocol is spoken to it until it says that it is older.

        Raises `ValueError` if `endpoint` is not of the form ``http://host:port``.
        """
        parts = urlsplit(endpoint)
        if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path:
            raise ValueError(f"endpoint {endpoint!r} is not of the form http://host:port")
        self.endpoint = endpoint
        self.authority = parts.netloc
        self.gate = asyncio.Semaphore(streams)
        self.turn = asyncio.Lock()
        """Held while a large body leaves. Side by side they would all arrive last: four tensors that share a link take
        four times as long, each of them and on every hop."""
        self._line: Line | None = None
        self._sockets = sockets
        self._host, self._port = parts.hostname, parts.port
        self.version = version
        self._idle: list[tuple[Connection, float]] = []
        """Open connections nobody uses, the one used last at the end, with the loop's time from when on."""
        self._used: set[Connection] = set()
        self._closed = False

    async def take(self) -> Connection:
        """A connection of one's own, warm where there is one, until `put` or `drop`. Raises `OSError`."""
        while self._idle:
            connection, _ = self._idle.pop()
            if connection.quiet:
                self._used.add(connection)
                return connection
            connection.close()
        error = OSError(f"{self._host} has no address")
        for family, address in await self._addresses():
            if self._closed:
                raise ConnectionAbortedError("closed by this node")
            connection = Connection(self._sockets.outgoing(family, address[0]), self.endpoint)
            self._used.add(connection)
            try:
                await connection.connect(address)
            except OSError as refused:
                error = refused
            else:
                return connection
            finally:
                if not connection.connected:
                    self.drop(connection)
        raise error

    async def line(self) -> Line:
        """Where large bodies leave; to be asked for while holding `turn`. Raises `OSError`."""
        line = self._line
        if line is not None and (line.ended or (line.empty and not line.connection.quiet)):
            line.end()
            line = None
        if line is None:
            line = self._line = Line(await self.take())
            self._used.discard(line.connection)
        return line

    def put(self, connection: Connection) -> None:
        """Give back a connection that is ready for another request."""
        self._used.discard(connection)
        self._idle.append((connection, asyncio.get_running_loop().time()))

    def drop(self, connection: Connection) -> None:
        """Give back one that is not: it is closed."""
        self._used.discard(connection)
        connection.close()

    def cool(self, before: float) -> None:
        """Close what nobody has used since `before`, in the loop's time."""
        for connection, since in self._idle:
            if since < before:
                connection.close()
        self._idle = [(connection, since) for connection, since in self._idle if since >= before]
        if self._line is not None and self._line.empty and self._line.since < before:
            self._line.end()

    def close(self) -> None:
        """Close every connection; calls that use one end with `ConnectionAbortedError`."""
        self._closed = True
        for connection in (*self._used, *(connection for connection, _ in self._idle)):
            connection.close()
        self._idle.clear()
        if self._line is not None:
            self._line.end()

    async def _addresses(self) -> list[tuple[int, Address]]:
        """Family and address, in the resolver's order. Raises `OSError`."""
        kind = socket.SOCK_STREAM
        try:  # addresses in digits need no resolver, which would take a thread
            found = socket.getaddrinfo(self._host, self._port, type=kind, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=kind)
        return [(family, address) for family, _, _, _, address in found]
