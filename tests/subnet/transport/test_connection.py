"""One stream: heads, bodies into their place, writing that heeds an answer, ends of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest

from subnet.transport.connection import PIECE, Connection
from subnet.transport.http1 import HEAD_LIMIT, BadHead

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Connection, Connection]]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    one, two = (Connection(end, name) for end, name in zip(ends, ("one", "two"), strict=True))
    yield one, two
    one.close()
    two.close()


async def test_heads_and_bodies_follow_each_other(pair: tuple[Connection, Connection]) -> None:
    one, two = pair
    assert await one.write([HEAD, b"abc", HEAD, b"", b"de"])
    assert await two.head() == HEAD
    body, pieces = memoryview(bytearray(3)), []
    assert await two.fill(body, lambda piece: pieces.append(bytes(piece))) == 3
    assert (bytes(body), b"".join(pieces)) == (b"abc", b"abc")
    assert not two.quiet  # the second message is there
    assert await two.head() == HEAD
    assert await two.fill(body[:2]) == 2
    assert bytes(body[:2]) == b"de"
    assert two.quiet


async def test_a_large_body_arrives_in_its_place_while_others_have_their_turn(
    pair: tuple[Connection, Connection],
) -> None:
    one, two = pair
    sent = os.urandom(3 * PIECE + 17)
    cuts = [memoryview(sent)[start : start + 100_000] for start in range(0, len(sent), 100_000)]
    turns, sizes = 0, []

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    body = memoryview(bytearray(len(sent)))
    whole, filled = await asyncio.gather(one.write([HEAD[:0], *cuts]), two.fill(body, lambda p: sizes.append(p.nbytes)))
    beside.cancel()
    assert (whole, filled) == (True, len(sent))
    assert bytes(body) == sent
    assert sum(sizes) == len(sent)
    assert max(sizes) <= PIECE
    assert turns >= len(sizes) - 1  # one piece, then everybody else


async def test_a_head_that_never_ends_is_refused(pair: tuple[Connection, Connection]) -> None:
    one, two = pair
    assert await one.write([b"A" * HEAD_LIMIT])
    with pytest.raises(BadHead, match=f"more than {HEAD_LIMIT} bytes"):
        await two.head()


async def test_a_stream_that_ends_says_where(pair: tuple[Connection, Connection]) -> None:
    one, two = pair
    await one.write([HEAD, b"ab"])
    one.close()
    assert await two.head() == HEAD
    assert await two.fill(memoryview(bytearray(5))) == 2
    assert await two.head() is None
    assert not two.quiet


async def test_a_head_that_is_cut_off_is_none(pair: tuple[Connection, Connection]) -> None:
    one, two = pair
    await one.write([HEAD[:-1]])
    one.close()
    with pytest.raises(BadHead, match=f"cut off after {len(HEAD) - 1} bytes"):
        await two.head()


async def test_writing_heeds_an_answer(pair: tuple[Connection, Connection]) -> None:
    one, two = pair
    large = memoryview(bytes(64 * PIECE))  # more than any buffer takes, and nobody reads
    writing = asyncio.create_task(one.write([large], heed=True))
    await two.write([HEAD])
    assert await writing is False
    assert await one.head() == HEAD


async def test_closing_wakes_who_waits(pair: tuple[Connection, Connection]) -> None:
    one, two = pair
    waiting = [asyncio.create_task(one.head()), asyncio.create_task(two.write([bytes(64 * PIECE)]))]
    await asyncio.sleep(0)  # both have begun
    one.close()
    with pytest.raises(ConnectionAbortedError, match="closed by this node"):
        await waiting[0]
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        await waiting[1]
    with pytest.raises(OSError, match="descriptor"):
        await one.head()


async def test_a_reset_is_told_apart_from_an_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as stack:
        near = socket.socket()
        near.setblocking(False)
        one = Connection(near, "one")
        stack.callback(one.close)
        await one.connect(listening.getsockname())
        far, _ = listening.accept()
        far.setblocking(False)
        Connection(far, "two").close(abruptly=True)
        with pytest.raises(ConnectionResetError):
            await one.head()


async def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        near = socket.socket()
        near.setblocking(False)
        one = Connection(near, "one")
        with pytest.raises(ConnectionRefusedError):
            await one.connect(unused.getsockname())
        assert not one.connected
        one.close()
