"""The development chain at the size of a full subnet: 256 neurons, reads and extrinsics on the machine's own cores.

    python -m scripts.bench.chain --out runs/bench

Starts the chain as a process with its state on disk, registers neurons until the subnet is full, and measures: how long
the SDK takes to read the metagraph at a block that it has not read before, idle and under load; whether extrinsics sent
at a steady rate are all included, how soon, and how even the blocks stay; how many a second are included when they all
come at once; and what durability costs per block. Result: JSON on standard output and in OUT/chain.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import bittensor_core
from websockets.asyncio.client import ClientConnection, connect

from scripts.bench.report import report
from subnet.chain import BittensorChain
from subnet.localchain import ChainConfig, metadata
from subnet.localchain.blocks import Chain
from subnet.localchain.genesis import DEVELOPMENT_URIS, OWNER_COLDKEY_URI, address, keypair

NETUID = 9
NEURONS = 256
BATCH = 64
TIMEOUT = 30.0
DURABILITY_BLOCKS = 2_000


class Client:
    """A plain JSON-RPC client that signs: the load must not be limited by the SDK's own pace."""

    def __init__(self, socket: ClientConnection, runtime: bittensor_core.Runtime) -> None:
        self.socket = socket
        self.runtime = runtime
        self.genesis = b""
        self.nonces: dict[str, int] = {}

    async def ask(self, method: str, *params: object) -> object:
        """One request and its answer, on a connection without subscriptions."""
        await self.socket.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))
        answer = cast("dict[str, object]", json.loads(await self.socket.recv()))
        if "result" not in answer:
            raise RuntimeError(f"{method}: {answer.get('error')}")
        return answer["result"]

    async def head(self) -> int:
        header = cast("dict[str, str]", await self.ask("chain_getHeader"))
        return int(header["number"], 16)

    async def sign(self, uri: str, call: bytes) -> str:
        """An immortal extrinsic as 0x-hex, with the key's next nonce."""
        key = keypair(uri)
        if uri not in self.nonces:
            self.nonces[uri] = int(cast("int", await self.ask("system_accountNextIndex", key.ss58_address)))
        self.genesis = self.genesis or bytes.fromhex(str(await self.ask("chain_getBlockHash", 0))[2:])
        signed = {"era": "00", "nonce": self.nonces[uri], "tip": 0, "tip_asset_id": None}
        self.nonces[uri] += 1
        payload = self.runtime.signature_payload(call, genesis_hash=self.genesis, era_block_hash=self.genesis, **signed)
        raw, _ = self.runtime.encode_signed_extrinsic(
            call,
            public_key=bytes(key.public_key),
            signature=key.sign(payload),
            signature_version=bittensor_core.CRYPTO_SR25519,
            **signed,
        )
        return "0x" + bytes(raw).hex()

    async def fill(self) -> None:
        """Register neurons until there are 256, in batches that succeed or fail as one."""
        for start in range(1, NEURONS, BATCH):
            calls = [
                self.runtime.compose_call(
                    "SubtensorModule", "burned_register", {"netuid": NETUID, "hotkey": address(f"//bench//{uid}")}
                )
                for uid in range(start, min(start + BATCH, NEURONS))
            ]
            batch = bytes(self.runtime.compose_call("Utility", "batch_all", {"calls": calls}))
            await self.ask("author_submitExtrinsic", await self.sign(OWNER_COLDKEY_URI, batch))
            first = await self.head()
            while await self.head() < first + 2:  # noqa: ASYNC110 - a connection without subscriptions
                await asyncio.sleep(0.05)

    async def prepare(self, count: int) -> list[str]:
        """Signed extrinsics as a swarm sends them: commitments of its hotkeys, and transfers."""
        record = {"netuid": NETUID, "info": {"fields": [{"Raw128": bytes(128)}]}}
        commitment = bytes(self.runtime.compose_call("Commitments", "set_commitment", record))
        made = []
        for number in range(count):
            if number % 2:
                made.append(await self.sign(f"//bench//{1 + number // 2 % (NEURONS - 1)}", commitment))
            else:
                uri = DEVELOPMENT_URIS[1 + number // 2 % (len(DEVELOPMENT_URIS) - 1)]
                transfer = {"dest": address(OWNER_COLDKEY_URI), "value": 1_000_000}
                call = bytes(self.runtime.compose_call("Balances", "transfer_keep_alive", transfer))
                made.append(await self.sign(uri, call))
        return made


@asynccontextmanager
async def running(block_time: float, folder: Path) -> AsyncIterator[str]:
    """The chain as a process of its own; its URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "subnet.localchain", "--port", "0", "--block-time", str(block_time),
        "--netuid", str(NETUID), "--state", str(folder),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        if process.stdout is None:
            raise RuntimeError("the chain has no standard output")
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.terminate()
        await process.communicate()


async def read_metagraphs(chain: BittensorChain, count: int) -> list[float]:
    """Seconds that the SDK takes for the whole subnet, each time at a block it has not read before."""
    times = []
    number = (await chain.finalized()).number
    for _ in range(count):
        head = await chain.wait_for_block(number, timeout=TIMEOUT)
        number = head.number + 1
        start = time.perf_counter()
        state = await chain.state_at(head.number)
        times.append(time.perf_counter() - start)
        if len(state.neurons) != NEURONS:
            raise RuntimeError(f"the metagraph has {len(state.neurons)} neurons, not {NEURONS}")
    return times


class Load:
    """Extrinsics on their way: when each was sent and when it was in a block."""

    def __init__(self, extrinsics: list[str]) -> None:
        self.extrinsics = extrinsics
        self.sent: dict[int, float] = {}
        self.included: dict[int, float] = {}
        self.heads: list[float] = []
        self._numbers: dict[str, int] = {}

    async def submit(self, socket: ClientConnection, rate: float | None) -> None:
        """Send them all, at `rate` a second or at once."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        for number, raw in enumerate(self.extrinsics):
            if rate is not None:
                await asyncio.sleep(start + number / rate - loop.time())
            self.sent[number] = loop.time()
            request = {"jsonrpc": "2.0", "id": number, "method": "author_submitAndWatchExtrinsic", "params": [raw]}
            await socket.send(json.dumps(request))

    def note(self, message: dict[str, object], now: float) -> None:
        """Take in one message of the node's. RuntimeError when it refuses or drops an extrinsic."""
        if "error" in message:
            raise RuntimeError(f"extrinsic {message['id']}: {message['error']}")
        if isinstance(message.get("id"), int):
            self._numbers[str(message["result"])] = cast("int", message["id"])
        elif message.get("method") == "chain_newHead":
            self.heads.append(now)
        elif message.get("method") == "author_extrinsicUpdate":
            update = cast("dict[str, str | dict[str, str]]", message["params"])
            number, status = self._numbers[str(update["subscription"])], update["result"]
            if status == "invalid":
                raise RuntimeError(f"extrinsic {number} was dropped")
            if "inBlock" in status:
                self.included[number] = now

    def result(self) -> dict[str, object]:
        latencies = sorted(self.included[number] - sent for number, sent in self.sent.items())
        intervals = sorted(later - earlier for earlier, later in itertools.pairwise(self.heads[1:]))
        return {
            "extrinsics": len(self.extrinsics),
            "included_per_second": round(
                len(self.included) / (max(self.included.values()) - min(self.sent.values())), 1
            ),
            "seconds_to_inclusion": {"median": _at(latencies, 0.5), "p99": _at(latencies, 0.99)},
            "block_interval_seconds": {"median": _at(intervals, 0.5), "p99": _at(intervals, 0.99)},
        }


async def send(url: str, extrinsics: list[str], *, rate: float | None) -> dict[str, object]:
    """Send at `rate` a second, or all at once; wait until each is in a block, and say how that went."""
    loop = asyncio.get_running_loop()
    load = Load(extrinsics)
    async with (
        connect(url, max_queue=None, max_size=None) as socket,
        asyncio.timeout(TIMEOUT + len(extrinsics) / (rate or 100)),
        asyncio.TaskGroup() as tasks,
    ):
        await socket.send('{"jsonrpc":"2.0","id":"heads","method":"chain_subscribeNewHeads"}')
        tasks.create_task(load.submit(socket, rate))
        while len(load.included) < len(extrinsics):
            load.note(json.loads(await socket.recv()), loop.time())
    return load.result()


def durability() -> dict[str, float]:
    """Milliseconds per empty block, in memory and on disk."""
    costs: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, state in (("memory", None), ("disk", Path(folder) / "state")):
            chain = Chain(ChainConfig(), state=state)
            times = []
            for _ in range(DURABILITY_BLOCKS):
                start = time.perf_counter()
                chain.produce(0)
                times.append((time.perf_counter() - start) * 1000)
            chain.close()
            costs |= {f"{name}_median": _at(sorted(times), 0.5), f"{name}_p99": _at(sorted(times), 0.99)}
    return costs


def _at(ordered: list[float], share: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 4) if ordered else 0.0


async def measure(folder: Path, *, seconds: float, rate: float, block_time: float) -> dict[str, object]:
    runtime = bittensor_core.Runtime(
        metadata.load(slot_ms=round(block_time * 1000)),
        metadata.SPEC_VERSION,
        metadata.TRANSACTION_VERSION,
        metadata.SS58_FORMAT,
    )
    async with running(block_time, folder) as url, connect(url, max_size=None) as socket:
        client = Client(socket, runtime)
        await client.fill()
        chain = await BittensorChain.connect(url, NETUID, None, timeout=TIMEOUT)
        try:
            idle = await read_metagraphs(chain, 20)
            steady = await client.prepare(round(seconds * rate))
            reading = asyncio.create_task(read_metagraphs(chain, round(seconds)))
            at_rate = await send(url, steady, rate=rate)
            busy = await reading
            burst = await send(url, await client.prepare(1_000), rate=None)
        finally:
            await chain.close()
    return {
        "neurons": NEURONS,
        "block_time": block_time,
        "metagraph_seconds": {"median": round(statistics.median(idle), 4), "max": round(max(idle), 4)},
        "metagraph_seconds_under_load": {"median": round(statistics.median(busy), 4), "max": round(max(busy), 4)},
        "rate": rate,
        "at_rate": at_rate,
        "burst": burst,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.chain", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the steady load (default: 20)")
    parser.add_argument("--rate", type=float, default=20.0, help="extrinsics per second of it (default: 20)")
    parser.add_argument("--block-time", type=float, default=0.25, help="seconds between blocks (default: 0.25)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        measured = asyncio.run(
            measure(Path(folder) / "state", seconds=options.seconds, rate=options.rate, block_time=options.block_time)
        )
    report("chain", options.out, {**measured, "block_milliseconds": durability()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
