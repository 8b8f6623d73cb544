"""A chain process that is killed goes on where it was, at another port, for clients that know only its folder."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import bittensor as bt
import pytest

from subnet.chain import BittensorChain, ChainError, Endpoint, create_wallet
from subnet.localchain.genesis import address

NETUID, TIMEOUT = 9, 20.0


@pytest.fixture(autouse=True)
def sdk_cache(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path / "runtime-cache"))
        yield


@pytest.fixture
def miner(tmp_path: Path) -> bt.Wallet:
    return create_wallet("bob", "miner", tmp_path / "wallets", coldkey_uri="//Bob", hotkey_uri="//Bob//miner")


async def started(folder: Path, *flags: str) -> tuple[asyncio.subprocess.Process, str]:
    """A chain process on `folder`, the first or not, and its url; or what it says when it ends at once."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "subnet.localchain", "--port", "0", "--netuid", str(NETUID), "--tempo", "30",
        "--state", str(folder), *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    return process, (await process.stdout.readline()).decode().strip()


@asynccontextmanager
async def killed_at_the_end(folder: Path) -> AsyncIterator[str]:
    process, url = await started(folder, "--block-time", "0.05")
    try:
        assert url, (await process.communicate())[1].decode()
        yield url
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_killed_chain_is_continued_at_another_port(tmp_path: Path, miner: bt.Wallet) -> None:
    folder = tmp_path / "state"
    async with killed_at_the_end(folder) as url:
        chain = await BittensorChain.connect(url, NETUID, miner, timeout=TIMEOUT)
        await chain.register_neurons({address("//Bob//miner"): 10.0})
        await chain.serve_axon(Endpoint("127.0.0.1", 8_000))
        block = await chain.publish(b"record", b"digests")
        before = await chain.state_at(block)
        first_hash = await chain.block_hash(1)
        spent = await chain.space()
        cut_off = asyncio.create_task(chain.publish(b"cut off", until_block=block + 12))
        await asyncio.sleep(0)
    with pytest.raises(ChainError):
        await cut_off
    await chain.close()

    async with killed_at_the_end(folder) as again:
        assert again != url
        chain = await BittensorChain.connect(again, NETUID, miner, timeout=TIMEOUT)
        try:
            assert await chain.block_hash(1) == first_hash
            head = await chain.finalized()
            assert head.number >= block
            assert await chain.state_at(block) == before
            until = head.number + 10
            after = await chain.publish(b"resumed", b"more", until_block=until)
            assert head.number < after <= until
            state = await chain.state_at(after)
            assert state.tempo == before.tempo
            assert (state.neurons[1].record, state.neurons[1].shards) == (b"resumed", b"more")
            assert state.neurons[1].endpoint == Endpoint("127.0.0.1", 8_000)
            space = await chain.space()
            assert space.used == (spent.used + 100 if space.epoch == spent.epoch else 100)
            epoch = await chain.next_epoch_block()
            assert (await chain.wait_for_block(epoch, timeout=TIMEOUT)).number == epoch
            assert await chain.next_epoch_block() == epoch + 30
        finally:
            await chain.close()


async def test_a_chain_is_continued_with_its_own_hyperparameters_only(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    async with killed_at_the_end(folder):
        pass
    process, url = await started(folder, "--block-time", "0.06")
    _, errors = await process.communicate()
    assert (process.returncode, url) == (2, "")
    assert re.search(r"block_time 0.05, not 0.06; start with the options that it was made with", errors.decode())
