"""A knock tells an axon of the hotkey from another one, from another program, and from nobody."""

import asyncio
import socket
import time

from subnet.identity import Identity
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.knock import Outcome, knock

HERE = "127.0.0.1"
HOTKEY = Identity.from_uri("//Alice").hotkey


def axon_of(hotkey: str) -> Axon:
    return Axon(Admission(hotkey, allow=lambda _hotkey, _route: None, now_ns=time.time_ns))


async def test_an_axon_answers_for_its_own_hotkey_only() -> None:
    axon = axon_of(HOTKEY)
    await axon.start()
    try:
        mine = await knock(HERE, axon.port, HOTKEY, deadline=5)
        other = await knock(HERE, axon.port, Identity.from_uri("//Bob").hotkey, deadline=5)
    finally:
        await axon.stop()
    assert mine.outcome is Outcome.ANSWERED
    assert 0 < mine.connect <= mine.whole < 5
    assert other.outcome is Outcome.OTHER


async def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind((HERE, 0))
        found = await knock(HERE, free.getsockname()[1], HOTKEY, deadline=5)
    assert found.outcome is Outcome.REFUSED


async def test_what_takes_a_connection_and_says_nothing_is_something_else() -> None:
    with socket.socket() as mute:
        mute.bind((HERE, 0))
        mute.listen()
        found = await knock(HERE, mute.getsockname()[1], HOTKEY, deadline=0.2)
    assert found.outcome is Outcome.OTHER
    assert found.whole >= 0.2 > found.connect


async def test_a_full_backlog_looks_like_a_firewall() -> None:
    with socket.socket() as full:
        full.bind((HERE, 0))
        full.listen(0)
        waiting = []
        for _ in range(8):  # what no longer fits is neither taken nor refused
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
            waiting.append(sock)
        found = await knock(HERE, full.getsockname()[1], HOTKEY, deadline=0.3)
        for sock in waiting:
            sock.close()
    assert found.outcome is Outcome.SILENT
    assert found.connect >= 0.3


async def test_whatever_is_answered_is_bounded_and_never_raises() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
    answers = [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}",
        head % 10**9 + b"{" * 1000,
        head % 2 + b"{}",
        head % 4 + b"\xff\xfe{}",
        head % 20 + b"[" * 20,
        head % 50 + b"cut off",
        head % 13 + b'{"hotkey": 5}',
    ]

    async def serve(answer: bytes) -> Outcome:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(talk, HERE, 0)
        async with server:
            return (await knock(HERE, server.sockets[0].getsockname()[1], HOTKEY, deadline=5)).outcome

    assert [await serve(answer) for answer in answers] == [Outcome.OTHER] * len(answers)
