"""Killed at any moment, the chain starts again as the same chain with every block that it had announced as final."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection, connect

from subnet.localchain.codec import blake2_256
from subnet.localchain.genesis import RAO_PER_TAO, address
from subnet.localchain.metadata import compact
from tests.subnet.localchain.test_localchain_blocks import BOB, Bench

pytestmark = pytest.mark.alone

BLOCK_TIME = 0.02


@dataclass
class Witness:
    """What has been seen of the chain, by one who was there for all of its lives."""

    final: dict[int, str] = field(default_factory=dict)
    paid: int = 0  # transfers in final blocks, counted by nonce
    time: int = 0


def header_hash(header: dict[str, str]) -> str:
    parts = [header[name] for name in ("parentHash", "stateRoot", "extrinsicsRoot")]
    parent, state, extrinsics = (bytes.fromhex(part[2:]) for part in parts)
    digest = blake2_256(parent + compact(int(header["number"], 16)) + state + extrinsics + compact(0))
    return "0x" + digest.hex()


async def ask(socket: ClientConnection, method: str, *params: object) -> object:
    """The answer to one request, whatever notifications come before it."""
    await socket.send(json.dumps({"jsonrpc": "2.0", "id": method, "method": method, "params": params}))
    while True:
        answer = json.loads(await socket.recv())
        if answer.get("id") == method:
            assert "result" in answer, answer
            return answer["result"]


async def check(socket: ClientConnection, witness: Witness, bench: Bench) -> None:
    """All that was final is still there, and nothing has gone back."""
    numbers = sorted(witness.final)
    for at in range(0, len(numbers), 500):
        some = numbers[at : at + 500]
        assert await ask(socket, "chain_getBlockHash", some) == [witness.final[number] for number in some]
    head = await ask(socket, "chain_getFinalizedHead")
    header = await ask(socket, "chain_getHeader", head)
    assert isinstance(header, dict)
    assert int(header["number"], 16) >= max(numbers, default=0)
    nonce = await ask(socket, "system_accountNextIndex", address(BOB))
    assert isinstance(nonce, int)
    assert nonce >= witness.paid
    now = await ask(socket, "state_getStorage", "0x" + bench.chain.codec.key("Timestamp.Now").hex())
    assert isinstance(now, str)
    time = int.from_bytes(bytes.fromhex(now[2:]), "little")
    assert time > witness.time
    witness.time = time


async def watch(socket: ClientConnection, witness: Witness, bench: Bench, *, heads: int) -> None:
    """Send transfers and note final blocks until `heads` have been seen."""
    await socket.send('{"jsonrpc":"2.0","id":0,"method":"chain_subscribeFinalizedHeads"}')
    nonce = await ask(socket, "system_accountNextIndex", address(BOB))
    assert isinstance(nonce, int)
    first, finals = nonce, 0
    while finals < heads:
        args = {"dest": address("//Eve"), "value": RAO_PER_TAO // 1000}
        raw = bench.sign(BOB, "Balances", "transfer_keep_alive", args, nonce=nonce, period=None)
        request = {
            "jsonrpc": "2.0",
            "id": nonce,
            "method": "author_submitAndWatchExtrinsic",
            "params": ["0x" + raw.hex()],
        }
        await socket.send(json.dumps(request))
        nonce += 1
        update = json.loads(await socket.recv())
        if update.get("method") == "chain_finalizedHead":
            header = update["params"]["result"]
            number = int(header["number"], 16)
            assert witness.final.setdefault(number, header_hash(header)) == header_hash(header)
            finals += 1
        elif update.get("method") == "author_extrinsicUpdate" and "finalized" in update["params"]["result"]:
            first += 1
            witness.paid = max(witness.paid, first)


async def kill_and_restart(folder: Path, *, cycles: int, seed: int) -> Witness:
    chance, witness = random.Random(seed), Witness()  # noqa: S311 - for repeatable kills
    bench = Bench(tempo=5, block_time=BLOCK_TIME)  # signs for the same genesis
    for _ in range(cycles):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "subnet.localchain", "--port", "0", "--block-time", str(BLOCK_TIME),
            "--tempo", "5", "--state", str(folder),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            if chance.random() < 0.2:  # killed while it starts, when it opens or makes its folder
                await asyncio.sleep(chance.uniform(0.2, 0.8))
            else:
                url = (await process.stdout.readline()).decode().strip()
                assert url, (await process.communicate())[1].decode()
                async with connect(url, max_queue=None) as socket:
                    await check(socket, witness, bench)
                    await watch(socket, witness, bench, heads=chance.randrange(1, 8))
                    await asyncio.sleep(chance.uniform(0, 2 * BLOCK_TIME))
                    process.send_signal(signal.SIGKILL)
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()
    return witness


async def test_fifteen_kills_lose_no_final_block(tmp_path: Path) -> None:
    witness = await kill_and_restart(tmp_path / "state", cycles=15, seed=0)
    assert len(witness.final) >= 15
    assert witness.paid > 0


@pytest.mark.long
@pytest.mark.timeout(3_600)
async def test_five_hundred_kills_lose_no_final_block(tmp_path: Path) -> None:
    witness = await kill_and_restart(tmp_path / "state", cycles=500, seed=1)
    assert len(witness.final) >= 500
