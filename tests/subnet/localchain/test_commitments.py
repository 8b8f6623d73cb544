"""Commitments as the unmodified SDK makes and reads them, and the chain's own word on what is too much."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import bittensor as bt
import pytest
import pytest_asyncio

from subnet.localchain import ChainConfig, LocalChain
from subnet.localchain.genesis import OWNER_COLDKEY_URI, OWNER_HOTKEY_URI
from subnet.wallets import create_wallet

NETUID = 9


@pytest.fixture(autouse=True)
def sdk_cache(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path / "runtime-cache"))
        yield


@pytest_asyncio.fixture
async def client(sdk_cache: None) -> AsyncIterator[bt.RpcSubstrate]:
    async with LocalChain(ChainConfig(netuid=NETUID, tempo=600, block_time=0.03)) as local:
        client = bt.RpcSubstrate(local.url)
        await client.connect()
        yield client
        await client.close()


@pytest.fixture
def owner(tmp_path: Path) -> bt.Wallet:
    return create_wallet("owner", "owner", tmp_path, coldkey_uri=OWNER_COLDKEY_URI, hotkey_uri=OWNER_HOTKEY_URI)


async def commit(client: bt.RpcSubstrate, wallet: bt.Wallet, *fields: bytes) -> bt.ExtrinsicResult:
    info = {"fields": [[{f"Raw{len(field)}": field} for field in fields]]}
    call = await client.compose(bt.calls.Commitments.set_commitment(netuid=NETUID, info=info))
    return await client.submit(call, wallet.hotkey)


async def test_two_fields_are_read_back(client: bt.RpcSubstrate, owner: bt.Wallet) -> None:
    assert (await commit(client, owner, bytes(108), b"\xff" * 128)).success
    key = [NETUID, owner.hotkey.ss58_address]
    found = await client.query("Commitments", "CommitmentOf", key)
    assert found["info"]["fields"] == [{"Raw108": "0x" + "00" * 108}, {"Raw128": "0x" + "ff" * 128}]
    usage = await client.query("Commitments", "UsedSpaceOf", key)
    assert usage == {"last_epoch": 0, "used_space": 236}


async def test_the_quota_is_named(client: bt.RpcSubstrate, owner: bt.Wallet) -> None:
    assert await client.query("Commitments", "MaxSpace") == 3_100
    for _ in range(12):
        assert (await commit(client, owner, bytes(128), bytes(128))).success
    result = await commit(client, owner, b"one", b"more")
    assert not result.success
    assert result.error is not None
    assert result.error.name == "SpaceLimitExceeded"
