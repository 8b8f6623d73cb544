"""Whether an axon answers at an address: one unsigned `GET /health` over a connection of its own.

It proves as much as a push needs, a way there and back to a process that speaks for the hotkey, and costs the other
side nothing. What is read is bounded, and no more of it is handed on than whose axon it says it is.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from subnet.transport import http1, sockets
from subnet.transport.connection import Connection
from subnet.transport.http1 import BadHead

_LIMIT: Final = 8 * 1024
"""Bytes of an answer."""


class Outcome(StrEnum):
    """What became of a knock."""

    ANSWERED = "answered"
    """By an axon of the hotkey that was looked for."""
    OTHER = "other"
    """Something listens, which is not that axon."""
    REFUSED = "refused"
    """Nobody listens, or there is no way there."""
    SILENT = "silent"
    """Nothing came in time: what a firewall looks like."""


@dataclass(frozen=True, slots=True)
class Knocked:
    outcome: Outcome
    connect: float
    """Seconds until the connection stood: one round trip. All the time there was, where it never did."""
    whole: float
    """Seconds until the outcome was known."""


async def knock(ip: str, port: int, hotkey: str, *, deadline: float) -> Knocked:
    """Look for the axon of `hotkey`, for at most `deadline` seconds.

    Args:
        ip: in digits, no name is looked up. Raises ValueError for anything else.
    """
    version = ipaddress.ip_address(ip).version
    clock = asyncio.get_running_loop().time
    began, stood = clock(), None
    connection = Connection(sockets.outgoing(socket.AF_INET6 if version == 6 else socket.AF_INET, ip), ip)
    try:
        async with asyncio.timeout(deadline):
            await connection.connect((ip, port))
            stood = clock()
            found = await _whose(connection, ip)
        outcome = Outcome.ANSWERED if found == hotkey else Outcome.OTHER
    except TimeoutError:
        outcome = Outcome.SILENT if stood is None else Outcome.OTHER
    except OSError:
        outcome = Outcome.REFUSED if stood is None else Outcome.OTHER
    finally:
        connection.close()
    ended = clock()
    return Knocked(outcome, (ended if stood is None else stood) - began, ended - began)


async def _whose(connection: Connection, ip: str) -> str | None:
    """The hotkey that the axon at the other end says it serves; None if none is there. Raises `OSError`."""
    authority = f"[{ip}]" if ":" in ip else ip
    await connection.write([http1.request("GET", "/health", {"Host": authority, "Connection": "close"})])
    try:
        raw = await connection.head()
        head = None if raw is None else http1.parse_response(raw)
    except BadHead:
        return None
    if head is None or head.status != 200 or not 0 < (head.length or 0) <= _LIMIT:
        return None
    body = memoryview(bytearray(head.length or 0))
    if await connection.fill(body) < body.nbytes:
        return None
    try:
        health = json.loads(bytes(body))
    except (ValueError, RecursionError):
        return None
    hotkey = health.get("hotkey") if isinstance(health, dict) else None
    return hotkey if isinstance(hotkey, str) else None
