"""One client cannot take the node down, nor all of its memory, nor the others' turn."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from subnet.localchain import ChainConfig, LocalChain, blocks, node, rpc
from subnet.localchain.dispatch import Args, Context
from subnet.localchain.genesis import RAO_PER_TAO, address
from subnet.localchain.metadata import compact
from tests.subnet.localchain.test_localchain_blocks import BOB, REMARKABLE, TX, Bench, refused, transfer

METADATA = '{"jsonrpc":"2.0","id":%d,"method":"state_call","params":["Metadata_metadata_at_version","0x0f000000"]}'


@pytest_asyncio.fixture
async def chain() -> AsyncIterator[LocalChain]:
    async with LocalChain(ChainConfig(block_time=60)) as running:
        yield running


@pytest_asyncio.fixture
async def client(chain: LocalChain) -> AsyncIterator[ClientConnection]:
    async with connect(chain.url, max_queue=None, max_size=None) as connection:
        yield connection


async def ask(client: ClientConnection, frame: object) -> object:
    await client.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))
    return json.loads(await client.recv())


async def code(client: ClientConnection, frame: object) -> object:
    answer = await ask(client, frame)
    assert isinstance(answer, dict), answer
    assert answer["jsonrpc"] == "2.0"
    assert len(json.dumps(answer)) < 1_000  # what was sent is not sent back
    return answer.get("error", {}).get("code")


def request(method: str, *params: object, **fields: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params, **fields}


# frames ---------------------------------------------------------------------------------------------

LONG = "ab" * 100_000


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (b"\xff\xfe\x00", -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"system_chain"}', None),
        ("[" * 100_000, -32700),
        ('{"a":' * 100_000, -32700),
        ('{"id":NaN,"method":"system_chain"}', -32700),
        ('{"id":1e999,"method":"system_chain","params":[' + "9" * 5_000 + "]}", -32700),
        ("null", -32600),
        (request("system_chain", jsonrpc="1.0"), -32600),
        (request("system_chain", id={"a": 1}), -32600),
        (request("system_chain", id=True), -32600),
        (request("system_chain", id="x" * 10), None),
        (request("system_chain", params="text"), -32602),
        (request("system_chain", params=0), -32602),
        (request("system_chain", params=None), None),
        (request("x" * 100_000), -32601),
        (request("state_getStorage", LONG + "zz"), -32602),
        (request("state_getStorage", [LONG]), -32602),
        (request("state_getStorage", "0x00", "0x" + LONG), 4003),
        (request("chain_getBlockHash", LONG), None),
        (request("chain_getBlockHash", True), -32602),
        (request("chain_getBlockHash", 1.5), -32602),
        (request("chain_getBlockHash", [0] * 1_001), -32602),
        (request("chain_getBlockHash", -1), None),
        (request("system_accountNextIndex", LONG), -32602),
        (request("state_getKeysPaged", "0x", 10**400), 4002),
        (request("author_submitExtrinsic", "0x" + "00" * (blocks.MAX_EXTRINSIC + 1)), 1010),
        (request("state_call", LONG, "0x"), 4003),
        ([0] * 257, -32010),
    ],
)
async def test_odd_frames_have_their_error(client: ClientConnection, frame: object, expected: int | None) -> None:
    assert await code(client, frame) == expected
    assert await code(client, request("system_chain")) is None


async def test_notifications_are_not_answered_even_when_they_fail(client: ClientConnection) -> None:
    for silent in ('{"method":"system_chain"}', '{"method":"no_such"}', '[{"method":"system_chain"},{"method":"x"}]'):
        await client.send(silent)
    assert await code(client, request("system_chain")) is None


async def test_a_frame_that_is_too_large_ends_its_connection_and_no_other(
    chain: LocalChain, client: ClientConnection
) -> None:
    other = await connect(chain.url)
    await other.send("x" * (node.MAX_FRAME + 1))
    with pytest.raises(ConnectionClosed):
        await other.recv()
    assert other.close_code == 1009
    assert await code(client, request("system_chain")) is None


async def test_an_answer_that_is_too_large_is_an_error(
    client: ClientConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "MAX_RESPONSE", 10_000)
    assert await code(client, METADATA % 1) == -32008
    assert await code(client, [request("rpc_methods")] * 100) == -32011
    assert isinstance(await ask(client, [request("rpc_methods")] * 2), list)


async def test_a_batch_gives_way_after_each_request(chain: LocalChain) -> None:
    """What else is to be done is done between the requests of a batch, not after them all."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    connection = node._Connection(chain)
    await connection.answer(chain._rpc, json.dumps([request("system_chain")] * 200))
    counting.cancel()
    assert turns >= 200


async def test_a_bug_in_a_method_is_an_internal_error(
    chain: LocalChain, client: ClientConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_peer: object, _params: object) -> object:
        raise ZeroDivisionError(LONG)

    monkeypatch.setitem(chain._rpc._methods, "system_name", broken)
    assert await code(client, request("system_name")) == -32603
    assert await code(client, request("system_chain")) is None


# what a connection may take up ----------------------------------------------------------------------


async def test_subscriptions_are_limited_and_can_be_given_back(client: ClientConnection) -> None:
    ids = []
    for _ in range(node.MAX_SUBSCRIPTIONS):
        answer = await ask(client, request("chain_subscribeNewHeads"))
        assert isinstance(answer, dict)
        ids.append(answer["result"])
        await client.recv()
    assert await code(client, request("chain_subscribeFinalizedHeads")) == -32006
    raw = transfer(Bench(block_time=60), period=None)
    assert await code(client, request("author_submitAndWatchExtrinsic", "0x" + raw.hex())) == -32006
    pending = await ask(client, request("author_pendingExtrinsics"))
    assert isinstance(pending, dict)
    assert pending["result"] == []
    assert await code(client, request("chain_unsubscribeNewHeads", ids[0])) is None
    assert await code(client, request("author_submitAndWatchExtrinsic", "0x" + raw.hex())) is None


async def test_a_watched_transaction_that_is_final_takes_up_nothing(
    chain: LocalChain, client: ClientConnection
) -> None:
    raw = transfer(Bench(block_time=60), period=None)
    await ask(client, request("author_submitAndWatchExtrinsic", "0x" + raw.hex()))
    chain.advance()
    chain.advance()
    seen = [json.loads(await client.recv())["params"]["result"] for _ in range(3)]
    assert [status if isinstance(status, str) else next(iter(status)) for status in seen] == [
        "ready", "inBlock", "finalized",
    ]  # fmt: skip
    assert not chain.watchers
    assert not next(iter(chain._connections)).subscriptions


async def test_a_client_that_leaves_is_forgotten(chain: LocalChain) -> None:
    raw = transfer(Bench(block_time=60), period=None, nonce=5)  # waits for the nonces before it
    async with connect(chain.url) as leaving:
        await ask(leaving, request("author_submitAndWatchExtrinsic", "0x" + raw.hex()))
        assert chain.watchers
    async with asyncio.timeout(10):
        while chain.watchers:  # noqa: ASYNC110 - the node has no event for this
            await asyncio.sleep(0.01)


async def test_who_asks_and_does_not_read_is_not_listened_to(chain: LocalChain, client: ClientConnection) -> None:
    """300 answers of half a megabyte are never held at once, the others are served meanwhile, and all arrive."""
    async with connect(chain.url, max_size=None, max_queue=1) as greedy:
        size = len(str(await ask(greedy, METADATA % 0)))
        for number in range(100):
            await greedy.send(METADATA % number)
        for _ in range(50):
            assert await code(client, request("system_chain")) is None
            chain.advance()
        held = max(connection._unread for connection in chain._connections)
        assert held <= node.HIGH_WATER + size
        assert [json.loads(await greedy.recv())["id"] for _ in range(100)] == list(range(100))


async def test_connections_are_limited(
    chain: LocalChain, client: ClientConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "MAX_CONNECTIONS", 1)
    async with connect(chain.url) as one_too_many:
        with pytest.raises(ConnectionClosed):
            await one_too_many.recv()
        assert one_too_many.close_code == 1013
    assert await code(client, request("system_chain")) is None


# what the pool may take up --------------------------------------------------------------------------


def test_one_signer_cannot_fill_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "POOL_PER_SIGNER", 5)
    bench = Bench()
    for nonce in range(1, 6):
        bench.chain.submit(transfer(bench, nonce=nonce))
    assert refused(bench, transfer(bench, nonce=6)) == (1016, "The transaction pool is full")
    args = {"dest": address(BOB), "value": RAO_PER_TAO}
    bench.chain.submit(bench.sign("//Charlie", "Balances", "transfer_keep_alive", args))


def test_the_pool_is_limited_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    first = transfer(bench)
    monkeypatch.setattr(blocks, "POOL_BYTES", len(first) + 1)
    bench.chain.submit(first)
    assert refused(bench, transfer(bench, nonce=1))[0] == 1016
    bench.block()
    bench.chain.submit(transfer(bench))


def test_a_transaction_that_is_never_due_does_not_stay_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "POOL_LIFE", 5)
    bench = Bench()
    bench.chain.submit(transfer(bench, nonce=3, period=None))
    dropped = [tx for _ in range(6) for tx in bench.chain.produce(0)[2]]
    assert len(dropped) == 1
    assert not bench.chain.pending()


def test_a_call_that_breaks_a_pallet_is_dropped_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()

    def broken(ctx: Context, _origin: str, _args: Args) -> None:
        ctx.state.put(f"{TX}.Tempo", (9,), 7)
        ctx.emit("Balances", "Transfer", {"from": address(BOB), "to": address(BOB), "amount": 1})
        raise ZeroDivisionError

    monkeypatch.setitem(blocks.TABLE["Balances"], "transfer_keep_alive", broken)  # type: ignore[arg-type]
    raw = transfer(bench)
    good = bench.sign("//Charlie", TX, "burned_register", {"netuid": 9, "hotkey": address("//New")})
    bench.chain.submit(raw)
    bench.chain.submit(good)
    block, included, dropped = bench.chain.produce(1_000)
    assert [tx.raw for tx in dropped] == [raw]
    assert [tx.raw for tx in included] == [good]
    state = bench.chain.snapshot(block.number)
    assert state.number(f"{TX}.Tempo", 9) == 20
    assert bench.chain.next_nonce(address(BOB)) == 0
    assert "Transfer" not in [event for _, event, _ in bench.events()]


def test_nested_calls_have_a_depth_limit() -> None:
    bench = Bench()
    codec = bench.chain.codec._rt
    raw = transfer(bench)
    shallow = bytes(codec.compose_call("Balances", "transfer_keep_alive", REMARKABLE))
    empty = bytes(codec.compose_call("Utility", "batch", {"calls": []}))
    deep = (empty[:2] + compact(1)) * 50_000 + empty
    body = raw[2 : raw.index(shallow)] + deep
    assert refused(bench, compact(len(body)) + body)[0] == 1001
