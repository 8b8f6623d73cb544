"""Who takes part in `scripts.bench.load`: a node, its honest neighbour, and strangers who mean it no good.

    python -m scripts.bench.load_ends serve                      (prints its port; lines "stat" are answered)
    python -m scripts.bench.load_ends honest PORT                (reads seconds, answers with a `Pace`, JSON)
    python -m scripts.bench.load_ends attack KIND PORT           (until its standard input ends; prints what it did)

Strangers have an address of their own on the loopback net.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar, Final

import torch
from bittensor.sp_core import Keypair

from subnet.transport import auth, http1, protocol, synapse
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.transport.digests import Digests
from subnet.transport.errors import UnknownHotkey
from subnet.transport.synapse import Specs, Synapse, TensorSpec

HOST: Final = "127.0.0.1"
ELSEWHERE: Final = "127.0.0.2"
VALUES: Final = 64 << 10
"""fp32, 256 KiB: a boundary tensor at 64x."""
RATE: Final = 100.0
"""Pushes per second: 210 Mbit/s, the line of a miner of the published run."""
IN_FLIGHT: Final = 32
HELD: Final = 10_000
"""Connections that are held open."""
NOBODIES: Final = 10_000
"""Callers that nobody knows."""
AT_A_TIME: Final = 64
SPECS: Final[Specs] = {"x": TensorSpec(torch.float32, (VALUES,))}
FIRST_CPU, OTHER_CPU = 0, 1


class Push(Synapse):
    """One tensor."""

    route: ClassVar[str] = "push"
    number: int


class Done(Synapse):
    """Its acknowledgement."""


NODE, NEIGHBOUR, ABUSER = "//Bob", "//Alice", "//Mallory"


def hotkey(uri: str) -> str:
    return str(Keypair.create_from_uri(uri).ss58_address)


# -- the node ---------------------------------------------------------------------------------------------------------


def held() -> dict[str, int]:
    """What this process has, and what of its core it has used."""
    return {
        "bytes": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
        "files": len([*Path("/proc/self/fd").iterdir()]),
        "tasks": len(asyncio.all_tasks()),
        "cpu_us": int(time.process_time() * 1e6),
    }


async def serve() -> None:
    known = {hotkey(NEIGHBOUR), hotkey(ABUSER)}

    def allow(caller: str, _route: str) -> None:
        if caller not in known:
            raise UnknownHotkey(f"{caller[:60]} is no neighbour", "register")

    async def take(
        _caller: str, _push: Push, _tensors: Mapping[str, torch.Tensor]
    ) -> tuple[Done, dict[str, torch.Tensor]]:
        return Done(), {}

    os.sched_setaffinity(0, {FIRST_CPU})
    axon = Axon(Admission(hotkey(NODE), allow=allow, now_ns=time.time_ns), host="0.0.0.0")  # noqa: S104 - two addresses of loopback
    axon.serve(Push, take, specs=SPECS)
    await axon.start()
    print(axon.port, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(held()), flush=True)
    await axon.stop()


# -- its neighbour ----------------------------------------------------------------------------------------------------


async def honest(port: int) -> None:
    os.sched_setaffinity(0, {OTHER_CPU})
    x, numbers = torch.randn(VALUES), itertools.count()
    receiver = hotkey(NODE)
    async with Dendrite(Keypair.create_from_uri(NEIGHBOUR), now_ns=time.time_ns) as dendrite:
        taken: list[float] = []

        async def push() -> None:
            start = time.perf_counter()
            message = Push(number=next(numbers))
            await dendrite.call(f"http://{HOST}:{port}", receiver, message, {"x": x}, reply=Done, deadline=30)
            taken.append(time.perf_counter() - start)

        while line := await asyncio.to_thread(sys.stdin.readline):
            start, seconds = time.perf_counter(), float(line)
            taken.clear()
            running: set[asyncio.Task[None]] = set()
            for turn in range(int(seconds * RATE)):
                await asyncio.sleep(max(0.0, start + turn / RATE - time.perf_counter()))
                while len(running) >= IN_FLIGHT:
                    _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                running = {task for task in running if not task.done()} | {asyncio.create_task(push())}
            await asyncio.gather(*running)
            rate = len(taken) / max(seconds, time.perf_counter() - start)
            middle, late = statistics.median(taken), statistics.quantiles(taken, n=100)[-1]
            print(json.dumps({"rate": rate, "median_ms": 1e3 * middle, "p99_ms": 1e3 * late}), flush=True)


# -- strangers --------------------------------------------------------------------------------------------------------

Attack = Callable[[int, Counter[str]], Awaitable[None]]


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(HOST, port, local_addr=(ELSEWHERE, 0))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def send(port: int, done: Counter[str], raw: bytes, *, more: bytes = b"", times: int = 0) -> None:
    """One connection: `raw`, then `more` so often, then whatever comes back."""
    async with connected(port) as (reader, writer):
        done["connections"] += 1
        writer.write(raw)
        for _ in range(times):
            writer.write(more)
            await writer.drain()
        head = await asyncio.wait_for(reader.read(64), 5)
        done[head[9:12].decode("latin-1") or "closed"] += 1


@cache
def tensor() -> list[memoryview]:
    """A whole message."""
    return synapse.encode(Push(number=0), {"x": torch.zeros(VALUES)})


def signed(signer: Keypair, nonce_ns: int, *, parts: Sequence[memoryview]) -> bytes:
    """The head of a request with this body."""
    digests = Digests.of(parts)
    path = protocol.target(Push.route, protocol.PROTOCOL)
    fields = auth.sign(signer, path=path, digests=digests, receiver=hotkey(NODE), nonce_ns=nonce_ns)
    return http1.request("POST", path, {"Host": HOST, "Content-Length": str(synapse.size_of(parts)), **fields})


async def slow_loris(port: int, done: Counter[str]) -> None:
    """Heads that come a byte at a time, on as many connections as there can be."""

    async def drip() -> None:
        async with connected(port) as (_, writer):
            done["connections"] += 1
            writer.write(b"POST /1/push HTTP/1.1\r\nX: ")
            while not writer.transport.is_closing():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(1)

    await _many(drip, HELD)


async def idle(port: int, done: Counter[str]) -> None:
    """Connections on which nothing comes."""

    async def hold() -> None:
        async with connected(port) as (reader, _):
            done["connections"] += 1
            await reader.read(1)

    await _many(hold, HELD)


async def flood(port: int, done: Counter[str]) -> None:
    """Connections that end at once."""

    async def knock() -> None:
        async with connected(port):
            done["connections"] += 1

    await _again(knock)


async def huge_heads(port: int, done: Counter[str]) -> None:
    line = b"X-A: " + b"a" * 1000 + b"\r\n"
    await _again(lambda: send(port, done, b"POST /1/push HTTP/1.1\r\n", more=line, times=1000))


async def endless_chunks(port: int, done: Counter[str]) -> None:
    head = b"POST /1/push HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    await _again(lambda: send(port, done, head, more=chunk, times=1000))


async def bombs(port: int, done: Counter[str]) -> None:
    """Compressed bodies."""
    head = b"POST /1/push HTTP/1.1\r\nHost: b\r\nContent-Encoding: gzip\r\nContent-Length: 200000\r\n\r\n"
    await _again(lambda: send(port, done, head, more=bytes(50_000), times=4))


async def nobodies(port: int, done: Counter[str]) -> None:
    """Hotkeys that are not registered, each with a request that is signed as it should be."""
    body = bytes(1000)
    keys = [Keypair.create_from_uri(f"//nobody/{i}") for i in range(NOBODIES)]
    turns = itertools.cycle([signed(key, time.time_ns(), parts=[memoryview(body)]) + body for key in keys])
    await _again(lambda: send(port, done, next(turns)))


async def abuser(port: int, done: Counter[str]) -> None:
    """A registered hotkey that sends requests without end, over connections that it keeps."""
    signer, last = Keypair.create_from_uri(ABUSER), 0
    raw = b"".join(tensor())

    async def ask() -> None:
        nonlocal last
        async with connected(port) as (reader, writer):
            done["connections"] += 1
            while True:
                last = max(last + 1, time.time_ns())
                writer.write(signed(signer, last, parts=tensor()) + raw)
                head = await asyncio.wait_for(reader.read(4096), 5)
                if not head:
                    return
                done[head[9:12].decode("latin-1")] += 1

    await _again(ask)


async def slow_bodies(port: int, done: Counter[str]) -> None:
    """A registered hotkey whose bodies never come."""
    signer = Keypair.create_from_uri(ABUSER)

    async def ask() -> None:
        await asyncio.sleep(0.05)
        raw = signed(signer, time.time_ns(), parts=tensor())
        async with connected(port) as (reader, writer):
            done["connections"] += 1
            writer.write(raw)
            head = await asyncio.wait_for(reader.read(64), 20)
            done[head[9:12].decode("latin-1") or "closed"] += 1

    await _again(ask)


async def repeated(port: int, done: Counter[str]) -> None:
    """One request of the neighbour, which somebody has recorded, again and again."""
    raw = signed(Keypair.create_from_uri(NEIGHBOUR), time.time_ns(), parts=tensor()) + b"".join(tensor())
    await _again(lambda: send(port, done, raw))


async def none(_port: int, done: Counter[str]) -> None:
    """Nobody, who computes as much as a stranger does, for the control."""
    while True:
        done["turns"] += 1
        await asyncio.sleep(0)


async def _again(call: Callable[[], Awaitable[None]]) -> None:
    """Without end, many at a time."""

    async def ever() -> None:
        while True:
            try:
                await call()
            except (OSError, asyncio.IncompleteReadError):  # refused, reset, or no answer: the next one
                await asyncio.sleep(0)

    await asyncio.gather(*(ever() for _ in range(AT_A_TIME)))


async def _many(call: Callable[[], Awaitable[None]], count: int) -> None:
    """So many at a time, each begun again when it ends."""

    async def ever(number: int) -> None:
        await asyncio.sleep(number / 5000)
        while True:
            with contextlib.suppress(OSError):
                await call()
            await asyncio.sleep(0.1)

    await asyncio.gather(*(ever(number) for number in range(count)))


ATTACKS: Final[Mapping[str, Attack]] = {
    "none": none,
    "slow-loris": slow_loris,
    "idle": idle,
    "flood": flood,
    "huge-heads": huge_heads,
    "endless-chunks": endless_chunks,
    "bombs": bombs,
    "nobodies": nobodies,
    "abuser": abuser,
    "slow-bodies": slow_bodies,
    "repeated": repeated,
}


async def attack(kind: str, port: int) -> None:
    os.sched_setaffinity(0, {OTHER_CPU})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, HELD + 100)), hard))
    done: Counter[str] = Counter()
    running = asyncio.ensure_future(ATTACKS[kind](port, done))
    while not done and not running.done():  # noqa: ASYNC110 - who prepares, for seconds, is no load
        await asyncio.sleep(0.05)
    print("begun", flush=True)
    ended = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
    print(json.dumps(done), flush=True)
    if running.done():
        running.result()
    os._exit(0)  # ten thousand tasks need not come to their ends


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["serve"]:
            asyncio.run(serve())
        case ["honest", port]:
            asyncio.run(honest(int(port)))
        case ["attack", kind, port]:
            asyncio.run(attack(kind, int(port)))
        case _:
            sys.exit(__doc__)
