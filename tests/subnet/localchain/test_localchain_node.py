"""The chain on a websocket: JSON-RPC as a Substrate node speaks it, and the process around it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from subnet.localchain import ChainConfig, LocalChain, node
from subnet.localchain.genesis import address

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def chain() -> AsyncIterator[LocalChain]:
    async with LocalChain(ChainConfig(block_time=0.05)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(chain: LocalChain) -> AsyncIterator[ClientConnection]:
    async with connect(chain.url) as connection:
        yield connection


async def exchange(client: ClientConnection, frame: object) -> object:
    text = frame if isinstance(frame, str) else json.dumps(frame)
    await client.send(text)
    return json.loads(await client.recv())


async def call(client: ClientConnection, method: str, *params: object) -> object:
    answer = await exchange(client, {"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
    assert isinstance(answer, dict)
    assert answer["id"] == 1
    return answer.get("result", answer.get("error"))


async def test_blocks_by_number_and_hash(client: ClientConnection) -> None:
    genesis = await call(client, "chain_getBlockHash", 0)
    head = await call(client, "chain_getHead")
    header = await call(client, "chain_getHeader", head)
    assert isinstance(header, dict)
    number = int(header["number"], 16)
    assert number >= 1
    assert await call(client, "chain_getBlockHash", hex(number)) == head
    assert await call(client, "chain_getBlockHash", [0, number]) == [genesis, head]
    assert await call(client, "chain_getBlockHash", 10**9) is None
    assert await call(client, "chain_getHeader", "0x" + "00" * 32) is None
    block = await call(client, "chain_getBlock", head)
    assert isinstance(block, dict)
    assert block["block"]["header"] == header
    assert len(block["block"]["extrinsics"]) == 1


async def test_storage_by_key_page_and_batch(chain: LocalChain, client: ClientConnection) -> None:
    key = "0x" + chain.chain.codec.key("SubtensorModule.Tempo", (9,)).hex()
    prefix = "0x" + chain.chain.codec.key("SubtensorModule.Tempo").hex()
    genesis = await call(client, "chain_getBlockHash", 0)
    assert await call(client, "state_getStorageAt", key, genesis) == "0x1400"
    assert await call(client, "state_getKeysPaged", prefix, 10, prefix, genesis) == [key]
    assert await call(client, "state_getKeysPaged", prefix, 10, key, genesis) == []
    changes = await call(client, "state_queryStorageAt", [key, prefix], genesis)
    assert changes == [{"block": genesis, "changes": [[key, "0x1400"], [prefix, None]]}]


async def test_a_batch_is_answered_in_order(client: ClientConnection) -> None:
    batch = [
        {"jsonrpc": "2.0", "id": 7, "method": "system_chain"},
        {"jsonrpc": "2.0", "id": 8, "method": "no_such"},
        {"jsonrpc": "2.0", "method": "system_name"},
        5,
    ]
    answers = await exchange(client, batch)
    assert isinstance(answers, list)
    assert [answer["id"] for answer in answers] == [7, 8, None]
    assert [answer.get("error", {}).get("code") for answer in answers] == [None, -32601, -32600]


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("{", -32700),
        ("[]", -32600),
        ("5", -32600),
        (json.dumps([0] * 300), -32010),
        ('{"id":1,"method":"state_getStorage","params":{"a":1}}', -32602),
        ('{"id":1,"method":"state_getStorage","params":["zz"]}', -32602),
        ('{"id":1,"method":"state_getStorage","params":[]}', -32602),
        ('{"id":1,"method":"chain_getBlockHash","params":[{}]}', -32602),
        ('{"id":1,"method":"author_submitExtrinsic","params":["0x00"]}', 1001),
        ('{"id":1,"method":"system_accountNextIndex","params":["not an address"]}', -32602),
        ('{"id":1,"method":"state_getKeysPaged","params":["0x00",100000]}', 4002),
        ('{"id":1,"method":"state_call","params":["NoApi_method","0x"]}', 4003),
        ('{"id":1,"method":"state_call","params":["BabeApi_configuration","0x"]}', 4003),
        ('{"id":1,"method":"state_call","params":["SubnetInfoRuntimeApi_get_metagraph","0x"]}', 4003),
        ('{"id":1,"method":"state_call","params":["SwapRuntimeApi_current_alpha_price","0x"]}', 4003),
    ],
)
async def test_bad_frames_are_answered_with_their_error(client: ClientConnection, frame: str, code: int) -> None:
    answer = await exchange(client, frame)
    assert isinstance(answer, dict)
    assert answer["error"]["code"] == code
    assert await call(client, "system_chain") == "Orion Local"


async def test_an_unknown_runtime_api_is_named(client: ClientConnection) -> None:
    error = await call(client, "state_call", "BabeApi_configuration", "0x")
    assert isinstance(error, dict)
    assert "BabeApi_configuration" in error["message"]


async def test_state_at_an_unknown_block_is_an_error(client: ClientConnection) -> None:
    error = await call(client, "state_getStorage", "0x00", "0x" + "11" * 32)
    assert isinstance(error, dict)
    assert error["code"] == 4003


async def test_heads_are_pushed_until_unsubscribed(client: ClientConnection) -> None:
    subscription = await call(client, "chain_subscribeFinalizedHeads")
    numbers = []
    while len(numbers) < 4:
        update = json.loads(await client.recv())
        assert update["method"] == "chain_finalizedHead"
        assert update["params"]["subscription"] == subscription
        numbers.append(int(update["params"]["result"]["number"], 16))
    assert numbers[1:] == list(range(numbers[1], numbers[1] + 3))
    await client.send(json.dumps({"id": 2, "method": "chain_unsubscribeFinalizedHeads", "params": [subscription]}))
    answer: dict[str, object] = {}
    while answer.get("id") != 2:
        answer = json.loads(await client.recv())
    assert answer["result"] is True
    assert await call(client, "chain_unsubscribeFinalizedHeads", subscription) is False


async def closing(client: ClientConnection) -> AsyncIterator[object]:
    """All frames until the connection is closed, however that is."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            yield await client.recv()


async def test_a_client_that_does_not_read_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain goes on; what the client left unread does not pile up."""
    monkeypatch.setattr(node, "MAX_QUEUE", 8)
    async with LocalChain(ChainConfig(block_time=60)) as chain, connect(chain.url) as client:
        await call(client, "chain_subscribeNewHeads")
        for _ in range(64):  # without giving the writer a turn
            chain.advance()
        received = [frame async for frame in closing(client)]
        assert len(received) < 64
        assert client.close_code == 1013


async def test_old_state_is_discarded_and_says_so() -> None:
    async with LocalChain(ChainConfig(block_time=60, history=64)) as chain, connect(chain.url) as client:
        old = await call(client, "chain_getHead")
        for _ in range(70):
            chain.advance()
        error = await call(client, "state_getStorage", "0x00", old)
        assert isinstance(error, dict)
        assert f"State already discarded for {old}" in error["message"]
        assert await call(client, "chain_getBlockHash", 1) == old


# the process ----------------------------------------------------------------------------------------


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "subnet.localchain", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def test_the_process_announces_itself_serves_and_stops(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = await start("--port", "0", "--block-time", "0.05", "--netuid", "12", "--ready-file", str(ready))
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        assert ready.read_text().strip() == url
        assert url.startswith("ws://127.0.0.1:")
        async with connect(url) as client:
            assert await call(client, "account_nextIndex", address("//Alice")) == 0
    finally:
        process.send_signal(signal.SIGINT)
        await process.communicate()
    assert process.returncode == 0


async def test_a_taken_port_explains_itself() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = await start("--port", str(taken.getsockname()[1]))
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"choose another --port" in errors


async def test_a_wrong_option_explains_itself() -> None:
    process = await start("--tempo", "1")
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"tempo 1 is outside 2..50400" in errors


async def test_the_process_keeps_its_chain_and_nobody_elses(tmp_path: Path) -> None:
    """Started again on its folder it goes on; a second process and another chain are refused in one line each."""
    state = ("--port", "0", "--block-time", "0.05", "--state", str(tmp_path / "state"))
    process = await start(*state)
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        async with connect(url) as client:
            genesis = await call(client, "chain_getBlockHash", 0)
            first = await call(client, "chain_getBlockHash", 1)
        second = await start(*state)
        _, errors = await second.communicate()
        assert second.returncode == 2
        assert (
            errors.decode().splitlines()[-1].startswith(f"localchain: {tmp_path / 'state'}/chain.sqlite is in use by")
        )
    finally:
        process.send_signal(signal.SIGTERM)
        await process.communicate()
    assert process.returncode == 0
    other = await start(*state, "--tempo", "50")
    _, errors = await other.communicate()
    assert other.returncode == 2
    assert b"holds a chain with tempo 20, not 50; start with the options that it was made with" in errors
    process = await start(*state)
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        async with connect(url) as client:
            assert await call(client, "chain_getBlockHash", [0, 1]) == [genesis, first]
    finally:
        process.send_signal(signal.SIGINT)
        await process.communicate()
