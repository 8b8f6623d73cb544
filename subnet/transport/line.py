"""Requests on one connection, one behind the other, none of which waits for an answer (RFC 9112, §9.3.2).

So that all large bodies to a neighbour are one TCP flow, whose congestion control knows the link. Over 200 Mbit/s and
50 ms such a flow carries 5.3 MB in 0.269 s after any pause, which is what the link needs; a connection that is new to
it takes 1.1 s, and of several in rotation each begins like that, and each stops by itself to measure (BBR's PROBE_RTT).
Answers come in the order of the requests. A request that loses its connection before its answer's turn, because of
what became of one before it, may be sent again: `Unserved`.
"""

from __future__ import annotations

import asyncio
from collections import deque

from subnet.transport.connection import Connection
from subnet.transport.errors import Unserved


class Line:
    """A connection and those who wait for its answers. Requests are sent by one at a time."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.ended = False
        self.since = 0.0
        """When the last answer was read, in the loop's time."""
        self._members: deque[Member] = deque()

    @property
    def empty(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self._members

    def enter(self) -> Member:
        """The place of the request that is sent next."""
        member = Member(self, first=self.empty)
        self._members.append(member)
        return member

    def leave(self, member: Member, *, keeps: bool) -> None:
        """Called when an answer is read, `keeps` says whether another can follow it, or when nobody waits for it."""
        if not keeps or self.ended:
            self.end()
            return
        self._members.remove(member)
        self.since = asyncio.get_running_loop().time()
        if self._members:
            self._members[0].turn.set_result(None)

    def end(self) -> None:
        """Close the connection; all who still wait get an `Unserved`."""
        self.ended = True
        self.connection.close()
        while self._members:
            turn = self._members.popleft().turn
            if not turn.done():
                turn.set_exception(Unserved(f"{self.connection.peer} closed before its answer; it may be sent again"))
                turn.exception()  # whoever has given up waiting need not look


class Member:
    """A request's place in the line."""

    def __init__(self, line: Line, *, first: bool) -> None:
        self.line = line
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when its answer is the next one."""
        if first:
            self.turn.set_result(None)

    @property
    def first(self) -> bool:
        """Whether what arrives is for this one."""
        return self.turn.done()
