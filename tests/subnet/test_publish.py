"""Records on chain: two fields, in order, in time or never, and within the epoch's space."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import bittensor as bt
import pytest
import pytest_asyncio

from subnet.chain import BittensorChain, ChainError, ChainRefused, ChainUnreachable, Endpoint, create_wallet
from subnet.localchain import ChainConfig, LocalChain
from subnet.localchain.errors import RpcError
from subnet.localchain.extrinsic import Extrinsic, parse
from subnet.localchain.genesis import address
from tests.subnet.test_chain import proxied

pytestmark = pytest.mark.asyncio(loop_scope="module")

NETUID, MINER = 9, "//Bob//miner"
TIMEOUT = 20.0


@pytest.fixture(scope="module")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> bt.Wallet:
    path = tmp_path_factory.mktemp("wallets")
    return create_wallet("bob", "miner", path, coldkey_uri="//Bob", hotkey_uri=MINER)


@pytest.fixture(scope="module", autouse=True)
def sdk_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path_factory.mktemp("runtime-cache")))
        yield


@asynccontextmanager
async def connected(url: str, wallet: bt.Wallet, *, timeout: float = TIMEOUT) -> AsyncIterator[BittensorChain]:  # noqa: ASYNC109
    chain = await BittensorChain.connect(url, NETUID, wallet, timeout=timeout)
    try:
        yield chain
    finally:
        await chain.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def local(sdk_cache: None) -> AsyncIterator[LocalChain]:
    async with LocalChain(ChainConfig(netuid=NETUID, tempo=40, block_time=0.05)) as chain:
        yield chain


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def miner(local: LocalChain, wallet: bt.Wallet) -> AsyncIterator[BittensorChain]:
    async with connected(local.url, wallet) as chain:
        assert await chain.register_neurons({address(MINER): 0.0}) == {address(MINER): 1}
        yield chain


async def record_at(chain: BittensorChain, block: int) -> bytes | None:
    return (await chain.state_at(block)).neurons[1].record


class Submissions:
    """What a node is sent. `lost`: it loses the first, though it answers as always."""

    def __init__(self, local: LocalChain, patch: pytest.MonkeyPatch, *, lost: bool = False) -> None:
        self.seen: list[bytes] = []
        self.first = asyncio.Event()
        take = local.chain.submit

        def submit(raw: bytes) -> Extrinsic:
            self.seen.append(raw)
            self.first.set()
            return parse(local.chain.codec, raw) if lost and len(self.seen) == 1 else take(raw)

        patch.setattr(local.chain, "submit", submit)


# two fields -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [b"", b"\0" * 8, bytes(range(128))])
async def test_shard_digests_are_read_back_beside_the_record(miner: BittensorChain, shards: bytes) -> None:
    block = await miner.publish(b"record", shards)
    neuron = (await miner.state_at(block)).neurons[1]
    assert (neuron.record, neuron.shards, neuron.record_block) == (b"record", shards, block)


async def test_a_later_record_without_digests_has_none(miner: BittensorChain) -> None:
    await miner.publish(b"first", b"digests")
    neuron = (await miner.state_at(await miner.publish(b"second"))).neurons[1]
    assert (neuron.record, neuron.shards) == (b"second", b"")


async def test_digests_that_are_too_long_are_refused_before_anything_is_sent(
    local: LocalChain, miner: BittensorChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Submissions(local, monkeypatch)
    with pytest.raises(ChainRefused, match=r"record of 3 \+ 136 bytes: the chain takes 128 in a field"):
        await miner.publish(b"abc", bytes(136))
    assert sent.seen == []


# order and time -------------------------------------------------------------------------------------


async def test_what_is_published_together_lands_in_the_order_of_the_calls(miner: BittensorChain) -> None:
    first, _, second = await asyncio.gather(
        miner.publish(b"first"), miner.serve_axon(Endpoint("127.0.0.1", 8_000)), miner.publish(b"second", b"digests")
    )
    states = [await miner.state_at(block) for block in range(first, second + 1)]
    served = next(state.head.number for state in states if state.neurons[1].endpoint is not None)
    assert first < served < second
    assert await record_at(miner, second - 1) == b"first"
    assert await record_at(miner, second) == b"second"


async def test_a_deadline_that_is_past_is_refused_before_anything_is_sent(
    local: LocalChain, miner: BittensorChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Submissions(local, monkeypatch)
    past = (await miner.finalized()).number - 1
    with pytest.raises(ChainRefused, match=rf"block {past} is too near the finalized block .*publish earlier"):
        await miner.publish(b"late", until_block=past)
    assert sent.seen == []


async def test_a_record_whose_era_is_over_cannot_land(
    local: LocalChain, miner: BittensorChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = await miner.publish(b"before")
    node = Submissions(local, monkeypatch, lost=True)
    until = (await miner.finalized()).number + 8
    task = asyncio.create_task(miner.publish(b"for one phase", until_block=until))
    await node.first.wait()
    task.cancel()
    await miner.wait_for_block(until, timeout=TIMEOUT)
    with pytest.raises(RpcError, match=r"ancient birth block|bad signature"):
        local.chain.submit(node.seen[0])
    head = await miner.wait_for_block(until + 2, timeout=TIMEOUT)
    assert await record_at(miner, head.number) == b"before"
    assert block <= until


async def test_a_record_that_is_lost_holds_up_the_next_until_its_era_is_over(
    local: LocalChain, miner: BittensorChain, wallet: bt.Wallet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(local.url, wallet, timeout=1.0) as chain:
        node = Submissions(local, monkeypatch, lost=True)
        until = (await chain.finalized()).number + 8
        lost = asyncio.create_task(chain.publish(b"lost", until_block=until))
        await node.first.wait()
        behind = asyncio.create_task(chain.publish(b"behind it"))
        with pytest.raises(ChainUnreachable, match="no answer within"):
            await lost
        assert await behind > until
        assert await record_at(chain, await behind) == b"behind it"


async def test_a_record_cannot_be_overtaken_by_the_one_after_it(
    local: LocalChain, miner: BittensorChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one waits in a pool for a nonce that was lost; the new one would fill the gap and land before it."""
    after = local.chain.next_nonce
    with monkeypatch.context() as patch:
        patch.setattr(local.chain, "next_nonce", lambda who: after(who) + 1)
        node = Submissions(local, patch)
        until = (await miner.finalized()).number + 16
        old = asyncio.create_task(miner.publish(b"old", until_block=until))
        await node.first.wait()
        old.cancel()
    block = await miner.publish(b"new")
    head = await miner.wait_for_block(max(block, until) + 2, timeout=TIMEOUT)
    assert await record_at(miner, head.number) == b"new"


async def test_nonces_are_read_anew_after_a_reconnection(
    local: LocalChain, miner: BittensorChain, wallet: bt.Wallet
) -> None:
    """Meanwhile another process has used the hotkey."""
    async with proxied(local) as (url, drop), connected(url, wallet) as chain:
        await chain.publish(b"one")
        drop()
        await miner.publish(b"two")
        assert await record_at(chain, await chain.publish(b"three")) == b"three"


async def test_a_connection_lost_in_mid_publication_does_not_stop_the_next(
    local: LocalChain, miner: BittensorChain, wallet: bt.Wallet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxied(local) as (url, drop), connected(url, wallet) as chain:
        node = Submissions(local, monkeypatch)
        cut_off = asyncio.create_task(chain.publish(b"cut off"))
        await node.first.wait()
        drop()
        behind = await chain.publish(b"behind it")
        assert await record_at(chain, behind) == b"behind it"
        try:
            assert await cut_off < behind
        except ChainError as error:
            assert "publishing a record of 7 bytes" in str(error)  # noqa: PT017 - it may land or not, as it says


# space ----------------------------------------------------------------------------------------------


async def test_the_space_of_an_epoch_is_accounted(
    wallet: bt.Wallet, sdk_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ChainConfig(netuid=NETUID, tempo=600, block_time=0.03)
    async with LocalChain(config) as local, connected(local.url, wallet) as chain:
        await chain.register_neurons({address(MINER): 0.0})
        space = await chain.space()
        assert (space.used, space.limit, space.epoch, space.next_epoch) == (0, 3_100, 0, 600)
        await chain.publish(b"x")
        assert (await chain.space()).used == 100
        for count in range(1, 12):
            await chain.publish(bytes(128), bytes(128))
            assert (await chain.space()).used == 100 + count * 256
        sent = Submissions(local, monkeypatch)
        full = r"counts as 256 bytes, and 2916 of the 3100 of epoch 0 are used; wait for the next epoch, block 600"
        with pytest.raises(ChainRefused, match=full):
            await chain.publish(bytes(128), bytes(128))
        assert sent.seen == []
        monkeypatch.undo()
        await chain.publish(bytes(128))
        assert (await chain.space()).used == 100 + 11 * 256 + 128
        while local.chain.finalized.number < space.next_epoch - 1:
            local.advance()
        await chain.wait_for_block(space.next_epoch - 1, timeout=TIMEOUT)
        await chain.publish(bytes(128), bytes(128))
        space = await chain.space()
        assert (space.used, space.epoch, space.next_epoch) == (256, 1, 1_200)


async def test_space_is_a_hotkeys(local: LocalChain) -> None:
    chain = await BittensorChain.connect(local.url, NETUID, None, timeout=TIMEOUT)
    try:
        with pytest.raises(ChainRefused, match="read-only"):
            await chain.space()
    finally:
        await chain.close()
