"""One end of the axon/dendrite of bittensor 10, for `scripts.bench.transport`: run by an interpreter that has that SDK.

    python scripts/bench/bittensor10.py serve          (prints its port)
    python scripts/bench/bittensor10.py send PORT      (reads lines "BYTES MESSAGES IN_FLIGHT", answers seconds)

A tensor travels the SDK's own way, as a `bittensor.Tensor` field of a Synapse, and the handler reads it. Where the SDK
leaves a choice it is the fast one: the reply carries no tensor back, and the required hash fields stay empty as by
default, so the signature does not cover the tensor. Its axon refuses nonces out of order, so every message in flight
has a dendrite of its own. It reads the handler's annotations, which must therefore be classes, not text.
"""

import asyncio
import socket
import sys
import time
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from bittensor.core.axon import Axon
from bittensor.core.chain_data import AxonInfo
from bittensor.core.dendrite import Dendrite
from bittensor.core.synapse import Synapse
from bittensor.core.tensor import Tensor
from bittensor.utils import networking
from bittensor_wallet import Keypair

HOST = "127.0.0.1"
PATIENCE_S = 120.0
IDLE_S = 3600


class Push(Synapse):  # type: ignore[misc]  # that SDK is not in this environment
    """One tensor; the axon's answer has none."""

    x: Tensor | None = None
    received: int = 0
    required_hash_fields: ClassVar[tuple[str, ...]] = ()


class Hotkey:
    """What an axon asks of a wallet."""

    def __init__(self, uri: str) -> None:
        self.hotkey = self.coldkeypub = Keypair.create_from_uri(uri)


def take(synapse: Push) -> Push:
    if synapse.x is not None:
        synapse.received = synapse.x.deserialize().nbytes
    synapse.x = None
    return synapse


def serve() -> None:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = int(free.getsockname()[1])
    axon = Axon(wallet=Hotkey("//Bob"), port=port, ip=HOST, external_ip=HOST, external_port=port)
    axon.attach(forward_fn=take)
    axon.fast_config.timeout_keep_alive = IDLE_S  # by default 5 s, and a dendrite fails on a connection that was closed
    axon.start()
    while True:
        try:
            socket.create_connection((HOST, port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    print(port, flush=True)
    sys.stdin.read()  # ends with the benchmark
    axon.stop()


async def stream(dendrite: Dendrite, axon: AxonInfo, x: np.ndarray, left: Iterator[int]) -> None:
    for _ in left:
        answer = await dendrite.call(axon, Push(x=Tensor.serialize(x)), PATIENCE_S, deserialize=False)
        if answer.received != x.nbytes:
            raise RuntimeError(f"{answer.received} of {x.nbytes} bytes arrived: {answer.dendrite}")


async def send(port: int) -> None:
    networking.get_external_ip = lambda: HOST  # it asks web services, whatever the address is needed for
    axon = Axon(wallet=Hotkey("//Bob"), port=port, ip=HOST, external_ip=HOST, external_port=port).info()
    dendrites: list[Dendrite] = []
    while line := await asyncio.to_thread(sys.stdin.readline):
        size, messages, in_flight = map(int, line.split())
        while len(dendrites) < in_flight:
            dendrites.append(Dendrite(wallet=Keypair.create_from_uri("//Alice")))
        x = np.random.default_rng(0).standard_normal(size // 4, dtype=np.float32)
        left = iter(range(messages))
        start = time.perf_counter()
        await asyncio.gather(*(stream(dendrite, axon, x, left) for dendrite in dendrites[:in_flight]))
        print(time.perf_counter() - start, flush=True)
    for dendrite in dendrites:
        await dendrite.aclose_session()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        asyncio.run(send(int(sys.argv[2])))
