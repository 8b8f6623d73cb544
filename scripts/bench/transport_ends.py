"""One end of a link for `scripts.bench.transport`: Orion's axon and dendrite, or gloo's send and recv.

    python -m scripts.bench.transport_ends orion serve         (prints its port)
    python -m scripts.bench.transport_ends orion send PORT     (reads lines "BYTES MESSAGES IN_FLIGHT", answers seconds)

and the same with ``gloo``, whose two find each other through a file instead of a port. Every process has one compute
thread. Gloo posts that many messages at a time and waits for one acknowledgement after the last; an Orion message ends
with its own reply.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import ClassVar, Final

import torch
import torch.distributed as dist
from bittensor.sp_core import Keypair

from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.transport.synapse import Specs, Synapse, TensorSpec, tensor_bytes
from subnet.trust.ledger import digest

HOST: Final = "127.0.0.1"
PATIENCE_S: Final = 120.0
LARGEST: Final = 1 << 28
"""Bytes of the largest message the axon takes."""


class Push(Synapse):
    """One tensor."""

    route: ClassVar[str] = "push"
    count: int


class Done(Synapse):
    """Its acknowledgement."""

    received: int


@cache
def tensor_of(size: int) -> torch.Tensor:
    """`size` bytes of fp32."""
    return torch.randn(size // 4, generator=torch.Generator().manual_seed(0))


def specs(push: Push) -> Specs:
    return {"x": TensorSpec(torch.float32, (push.count,))}


async def take(_caller: str, _push: Push, tensors: dict[str, torch.Tensor]) -> tuple[Done, dict[str, torch.Tensor]]:
    return Done(received=tensors["x"].nbytes), {}


async def serve_orion() -> None:
    bob = Keypair.create_from_uri("//Bob")
    door = Admission(bob.ss58_address, allow=lambda _hotkey, _route: None, now_ns=time.time_ns, slots=16)
    axon = Axon(door, host=HOST)
    axon.serve(Push, take, specs=specs, max_bytes=LARGEST)
    await axon.start()
    print(axon.port, flush=True)
    await asyncio.to_thread(sys.stdin.read)  # ends with the benchmark
    await axon.stop()


async def stream(
    dendrite: Dendrite, endpoint: str, x: torch.Tensor, payload: bytes | None, left: Iterator[int]
) -> None:
    bob = Keypair.create_from_uri("//Bob").ss58_address
    for _ in left:
        push = Push(count=x.numel())
        done, _tensors = await dendrite.call(
            endpoint, bob, push, {"x": x}, reply=Done, deadline=PATIENCE_S, payload=payload
        )
        if done.received != x.nbytes:
            raise RuntimeError(f"{done.received} of {x.nbytes} bytes arrived")


async def send_orion(port: int, *, known: bool) -> None:
    endpoint = f"http://{HOST}:{port}"
    async with Dendrite(Keypair.create_from_uri("//Alice"), now_ns=time.time_ns) as dendrite:
        while line := await asyncio.to_thread(sys.stdin.readline):
            size, messages, in_flight = map(int, line.split())
            x = tensor_of(size)
            payload = digest(tensor_bytes(x)) if known else None
            left = iter(range(messages))
            start = time.perf_counter()
            await asyncio.gather(*(stream(dendrite, endpoint, x, payload, left) for _ in range(in_flight)))
            print(time.perf_counter() - start, flush=True)


def serve_gloo() -> None:
    folder = tempfile.mkdtemp(prefix="orion-gloo-")
    meeting = f"{folder}/store"
    print(meeting, flush=True)
    _join(meeting, 0)
    shutil.rmtree(folder)
    order = torch.zeros(2, dtype=torch.int64)
    while dist.recv(order, 1) is not None and int(order[1]):
        x = torch.empty(int(order[0]) // 4)
        for _ in range(int(order[1])):
            dist.recv(x, 1)
        dist.send(order, 1)
    dist.destroy_process_group()


def send_gloo(meeting: str) -> None:
    _join(meeting, 1)
    for line in sys.stdin:
        size, messages, in_flight = map(int, line.split())
        x = tensor_of(size)
        order = torch.tensor([size, messages])
        posted: deque[dist.Work] = deque()
        start = time.perf_counter()
        dist.send(order, 0)
        for _ in range(messages):
            if len(posted) == in_flight:
                posted.popleft().wait()
            work = dist.isend(x, 0)
            if work is None:
                raise RuntimeError("gloo took no message")
            posted.append(work)
        for work in posted:
            work.wait()
        dist.recv(order, 0)
        print(time.perf_counter() - start, flush=True)
    dist.send(torch.zeros(2, dtype=torch.int64), 0)
    dist.destroy_process_group()


def _join(meeting: str, rank: int) -> None:
    """Connect the two over loopback; they find each other through the file `meeting`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    patience = timedelta(seconds=PATIENCE_S)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=patience)


def main(argv: list[str]) -> int:
    torch.set_num_threads(1)
    match argv:
        case ["orion" | "hashed", "serve"]:
            asyncio.run(serve_orion())
        case ["orion" | "hashed" as name, "send", port]:
            asyncio.run(send_orion(int(port), known=name != "hashed"))
        case ["gloo", "serve"]:
            serve_gloo()
        case ["gloo", "send", meeting]:
            send_gloo(meeting)
        case _:
            print(f"usage: {__doc__}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
