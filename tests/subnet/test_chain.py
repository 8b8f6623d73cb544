"""From wallet to weights: the real SDK, through `subnet.chain`, against the local chain on a real websocket."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from subnet.chain import (
    BittensorChain,
    ChainError,
    ChainRefused,
    ChainUnreachable,
    Endpoint,
    NotRegistered,
    WalletError,
    create_wallet,
    load_wallet,
)
from subnet.identity import Identity, verify
from subnet.localchain import ChainConfig, LocalChain
from subnet.localchain.genesis import OWNER_HOTKEY_URI, address
from subnet.transport.protocol import PROTOCOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

NETUID, TEMPO = 9, 20
VALIDATOR, MINER, STRANGER = "validator", "miner", "stranger"
TIMEOUT = 20.0


@pytest.fixture(scope="module", autouse=True)
def sdk_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The SDK keeps downloaded metadata on disk: not in anyone's home during tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path_factory.mktemp("runtime-cache")))
        yield


@pytest.fixture(scope="module")
def wallets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wallets")
    for hotkey in (VALIDATOR, MINER, STRANGER):
        create_wallet("bob", hotkey, path, coldkey_uri="//Bob", hotkey_uri=f"//Bob//{hotkey}")
    return path


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def local(sdk_cache: None) -> AsyncIterator[LocalChain]:
    async with LocalChain(ChainConfig(netuid=NETUID, tempo=TEMPO, block_time=0.05)) as chain:
        yield chain


async def connected(local: LocalChain, wallets: Path, hotkey: str) -> BittensorChain:
    wallet = load_wallet("bob", hotkey, wallets)
    return await BittensorChain.connect(local.url, NETUID, wallet, timeout=TIMEOUT)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def validator(local: LocalChain, wallets: Path) -> AsyncIterator[BittensorChain]:
    """A registered validator with stake; it has registered the miner too."""
    chain = await connected(local, wallets, VALIDATOR)
    stakes = {address(f"//Bob//{VALIDATOR}"): 1_000.0, address(f"//Bob//{MINER}"): 0.0}
    assert await chain.register_neurons(stakes) == dict(zip(stakes, (1, 2), strict=True))
    yield chain
    await chain.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def miner(local: LocalChain, wallets: Path, validator: BittensorChain) -> AsyncIterator[BittensorChain]:
    chain = await connected(local, wallets, MINER)
    yield chain
    await chain.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def stranger(local: LocalChain, wallets: Path) -> AsyncIterator[BittensorChain]:
    chain = await connected(local, wallets, STRANGER)
    yield chain
    await chain.close()


def one_line_with_remedy(error: ChainError) -> bool:
    return "\n" not in str(error) and any(mark in str(error) for mark in ("; ", "remedy"))


# reading --------------------------------------------------------------------------------------------


async def test_finalized_heads_advance_and_are_pinned_by_hash(validator: BittensorChain) -> None:
    head = await validator.finalized()
    later = await validator.wait_for_block(head.number + 3, timeout=TIMEOUT)
    assert later.number == head.number + 3
    assert later.timestamp_ms > head.timestamp_ms
    assert later.hash != head.hash
    assert await validator.block_hash(head.number) == head.hash
    assert await validator.wait_for_block(head.number, timeout=0) == head


async def test_a_new_subnet_has_its_owner_as_uid_0(validator: BittensorChain) -> None:
    state = await validator.state_at(0)
    assert state.owner_hotkey == address(OWNER_HOTKEY_URI)
    assert state.tempo == TEMPO
    (owner,) = state.neurons
    assert (owner.uid, owner.hotkey, owner.coldkey) == (0, state.owner_hotkey, address("//Alice"))
    assert owner.validator_permit
    assert owner.record is None
    assert owner.endpoint is None


async def test_a_registered_neuron_is_in_the_state(validator: BittensorChain) -> None:
    state = await validator.state_at((await validator.finalized()).number)
    neuron = state.by_hotkey(address(f"//Bob//{VALIDATOR}"))
    assert neuron is not None
    assert neuron.coldkey == address("//Bob")
    assert neuron.stake >= 1_000
    assert 0 < neuron.registered_at <= state.head.number
    assert state.by_hotkey(address("//Nobody")) is None


async def test_blocks_that_are_not_final_are_not_read(validator: BittensorChain) -> None:
    far = (await validator.finalized()).number + 1_000
    with pytest.raises(ChainRefused, match="not final"):
        await validator.block_hash(far)
    with pytest.raises(ChainRefused, match="not final"):
        await validator.state_at(far)
    with pytest.raises(ChainUnreachable, match=f"block {far} was not finalized within"):
        await validator.wait_for_block(far, timeout=0.1)


async def test_waiting_for_a_block_reads_nothing(validator: BittensorChain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many wait for one block in a node; each reading every block on the way would keep a core busy."""
    head = await validator.finalized()

    async def read(what: str, *_: object, **__: object) -> object:
        raise AssertionError(f"{what}, though nobody asked")

    monkeypatch.setattr(validator, "_read", read)
    await asyncio.gather(*(validator.passed(head.number + 3, stall=TIMEOUT) for _ in range(3)))
    monkeypatch.undo()
    assert (await validator.finalized()).number >= head.number + 3
    with pytest.raises(ChainUnreachable, match="not finalized within"):
        await validator.passed(10**6, stall=0.0)


# writing --------------------------------------------------------------------------------------------


async def test_a_wait_that_is_cancelled_as_its_block_comes_is_cancelled() -> None:
    chain = BittensorChain(None, None, NETUID, None, TIMEOUT)  # type: ignore[arg-type]
    waiting = asyncio.create_task(chain._reach(7, TIMEOUT))
    await asyncio.sleep(0)
    chain._advance(7)  # the block has come, and whoever waits for it has not gone on yet
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_an_endpoint_is_published(miner: BittensorChain) -> None:
    await miner.serve_axon(Endpoint("127.0.0.1", 8_091))
    state = await miner.state_at((await miner.finalized()).number)
    assert state.neurons[2].endpoint == Endpoint("127.0.0.1", 8_091)
    assert (state.neurons[1].protocol, state.neurons[2].protocol) == (0, PROTOCOL)
    await miner.serve_axon(Endpoint("2001:db8::1", 65_535))
    state = await miner.state_at((await miner.finalized()).number)
    assert state.neurons[2].endpoint == Endpoint("2001:db8::1", 65_535)


@pytest.mark.parametrize(
    "record",
    [b"", b"plain text", b"0x41", b"\xff\xfe\x00\x80", bytes(128), bytes(range(128, 256))],
    ids=["empty", "text", "looks-like-hex", "not-utf-8", "zeros", "high-bytes"],
)
async def test_a_record_is_read_back_byte_for_byte(miner: BittensorChain, record: bytes) -> None:
    block = await miner.publish(record)
    state = await miner.state_at(block)
    assert state.neurons[2].record == record
    assert state.neurons[2].record_block == block


async def test_state_is_read_as_it_was_at_a_block(miner: BittensorChain) -> None:
    first = await miner.publish(b"first")
    second = await miner.publish(b"second")
    assert (await miner.state_at(first)).neurons[2].record == b"first"
    assert (await miner.state_at(second - 1)).neurons[2].record == b"first"
    assert (await miner.state_at(second)).neurons[2].record == b"second"


async def test_publications_of_one_hotkey_queue_up(miner: BittensorChain) -> None:
    blocks = await asyncio.gather(*(miner.publish(bytes([index])) for index in range(5)))
    assert list(blocks) == sorted(set(blocks))


async def test_a_record_lands_by_its_deadline_or_is_refused(miner: BittensorChain) -> None:
    for blocks in (7, 8, 12, 15):  # an era that just fits, and some that do not divide evenly
        head = await miner.finalized()
        until = head.number + blocks
        assert head.number < await miner.publish(b"in time", until_block=until) <= until
    with pytest.raises(ChainRefused, match="too near the finalized block"):
        await miner.publish(b"late", until_block=(await miner.finalized()).number + 1)


async def test_a_record_that_is_too_long_is_refused_here(miner: BittensorChain) -> None:
    with pytest.raises(ChainRefused, match="129 bytes"):
        await miner.publish(bytes(129))


async def test_weights_become_incentive_at_the_epoch(validator: BittensorChain, miner: BittensorChain) -> None:
    await validator.wait_for_block(await validator.next_epoch_block(), timeout=TIMEOUT)  # gives the permit
    block = await validator.set_weights({0: 0.25, 2: 0.75})
    assert await validator.weights() == {1: {0: pytest.approx(0.25, abs=1e-4), 2: pytest.approx(0.75, abs=1e-4)}}
    before = await validator.state_at(block)
    assert before.neurons[1].last_update == block
    epoch = await validator.next_epoch_block()
    assert block <= epoch <= block + TEMPO
    after = await validator.state_at((await validator.wait_for_block(epoch, timeout=TIMEOUT)).number)
    assert [neuron.validator_permit for neuron in after.neurons] == [True, True, False]
    assert after.neurons[2].incentive == pytest.approx(0.75, abs=1e-3)
    assert after.neurons[1].dividends == pytest.approx(1.0)
    assert after.neurons[2].stake > before.neurons[2].stake


# refusals -------------------------------------------------------------------------------------------


async def test_an_unregistered_hotkey_is_told_to_register(stranger: BittensorChain) -> None:
    for attempt in (
        stranger.publish(b"x"),
        stranger.serve_axon(Endpoint("127.0.0.1", 8_092)),
        stranger.set_weights({0: 1.0}),
    ):
        with pytest.raises(NotRegistered, match="btcli subnets register") as caught:
            await attempt
        assert one_line_with_remedy(caught.value)


async def test_a_neuron_without_a_permit_cannot_set_weights(miner: BittensorChain) -> None:
    with pytest.raises(ChainRefused, match="NeuronNoValidatorPermit") as caught:
        await miner.set_weights({0: 1.0})
    assert one_line_with_remedy(caught.value)


async def test_weights_that_are_none_are_refused(validator: BittensorChain) -> None:
    with pytest.raises(ChainRefused, match="zero"):
        await validator.set_weights({0: 0.0})
    with pytest.raises(ChainRefused):
        await validator.set_weights({0: -1.0})
    with pytest.raises(ChainRefused, match="UidVecContainInvalidOne"):
        await validator.set_weights({0: 1.0, 200: 1.0})


@pytest.mark.parametrize("endpoint", [Endpoint("not an address", 1), Endpoint("127.0.0.1", 0)])
async def test_an_endpoint_that_is_none_is_refused(miner: BittensorChain, endpoint: Endpoint) -> None:
    with pytest.raises(ChainRefused) as caught:
        await miner.serve_axon(endpoint)
    assert one_line_with_remedy(caught.value)


async def test_a_registration_that_fails_registers_nobody(validator: BittensorChain) -> None:
    known, new = address(f"//Bob//{VALIDATOR}"), address("//Bob//new")
    with pytest.raises(ChainRefused, match="HotKeyAlreadyRegisteredInSubNet"):
        await validator.register_neurons({new: 0.0, known: 0.0})
    with pytest.raises(ChainRefused, match="NotEnoughBalanceToStake"):
        await validator.register_neurons({new: 10_000_000.0})
    state = await validator.state_at((await validator.finalized()).number)
    assert state.by_hotkey(new) is None


async def test_without_a_wallet_the_chain_is_read_only(local: LocalChain) -> None:
    chain = await BittensorChain.connect(local.url, NETUID, None, timeout=TIMEOUT)
    try:
        assert (await chain.state_at(0)).neurons
        with pytest.raises(ChainRefused, match="read-only"):
            await chain.publish(b"x")
    finally:
        await chain.close()


# connections ----------------------------------------------------------------------------------------


async def test_a_wrong_network_or_subnet_is_named(local: LocalChain) -> None:
    with pytest.raises(ChainRefused, match="Unknown network 'nowhere'"):
        await BittensorChain.connect("nowhere", NETUID, None, timeout=TIMEOUT)
    with pytest.raises(ChainRefused, match="no subnet 77"):
        await BittensorChain.connect(local.url, 77, None, timeout=TIMEOUT)
    with pytest.raises(ChainUnreachable, match="check that the node runs"):
        await BittensorChain.connect("ws://127.0.0.1:1", NETUID, None, timeout=TIMEOUT)


async def test_a_chain_that_is_gone_for_good_is_unreachable() -> None:
    async with LocalChain(ChainConfig(block_time=0.05)) as local:
        chain = await BittensorChain.connect(local.url, NETUID, None, timeout=TIMEOUT)
    try:
        with pytest.raises(ChainUnreachable, match="lost the chain for more than a tempo of 20 blocks, after"):
            await chain.wait_for_block(10**6, timeout=TIMEOUT)
        with pytest.raises(ChainUnreachable):
            await chain.finalized()
    finally:
        await chain.close()


async def test_for_a_tempo_what_is_known_stays_known() -> None:
    async with LocalChain(ChainConfig(block_time=0.05, tempo=1_000)) as local:
        chain = await BittensorChain.connect(local.url, NETUID, None, timeout=TIMEOUT)
        state = await chain.state_at((await chain.finalized()).number)
    try:
        with pytest.raises(ChainUnreachable, match="not finalized within"):
            await chain.wait_for_block(10**6, timeout=2.0)
        assert (await chain.finalized()).number >= state.head.number
        assert await chain.state_at(state.head.number) is state
    finally:
        await chain.close()


async def test_pruned_state_is_read_from_an_archive() -> None:
    """Two nodes make the same blocks; one keeps the state of the last 64 of them, the other of all."""

    def config(history: int) -> ChainConfig:
        return ChainConfig(block_time=60, history=history)

    def clock() -> float:
        return 1_000.0

    async with (
        LocalChain(config(64), clock=clock) as pruned,
        LocalChain(config(4_096), clock=clock) as keeper,
    ):
        for _ in range(80):
            pruned.advance()
            keeper.advance()
        alone = await BittensorChain.connect(pruned.url, NETUID, None, timeout=TIMEOUT)
        helped = await BittensorChain.connect(pruned.url, NETUID, None, timeout=TIMEOUT, archive=keeper.url)
        try:
            with pytest.raises(ChainRefused, match="archive"):
                await alone.state_at(1)
            assert (await helped.state_at(1)).head.number == 1
        finally:
            await alone.close()
            await helped.close()


async def test_the_beacon_of_a_time_is_drands_next_round() -> None:
    """Round 1000 of quicknet, which the local chain takes only with drand's real signature."""
    genesis, period = 1_692_803_367, 3
    due = genesis + 999 * period
    signature = bytes.fromhex(
        "b44679b9a59af2ec876b1a6b1ad52ea9b1615fc3982b19576350f93447cb1125e342b73a8dd2bacbe47e4b6b63ed5e39"
    )
    async with LocalChain(ChainConfig(block_time=0.05)) as local:
        local.chain.add_pulse(1_000, signature)
        chain = await BittensorChain.connect(local.url, NETUID, None, timeout=TIMEOUT)
        try:
            await chain.wait_for_block(local.chain.head.number + 2, timeout=TIMEOUT)
            expected = hashlib.sha256(signature).digest()
            assert [await chain.beacon(due - seconds) for seconds in (0, 2, 3)] == [expected, expected, None]
            assert await chain.beacon(due + 1) is None
        finally:
            await chain.close()


async def test_a_dropped_connection_is_made_again(local: LocalChain) -> None:
    """Everything between the node and its chain breaks; reads and the stream of heads go on."""
    async with proxied(local) as (url, drop):
        chain = await BittensorChain.connect(url, NETUID, None, timeout=TIMEOUT)
        try:
            head = await chain.finalized()
            drop()
            later = await chain.wait_for_block(head.number + 10, timeout=TIMEOUT)
            drop()
            assert (await chain.state_at(later.number)).head == later
        finally:
            await chain.close()


@contextlib.asynccontextmanager
async def proxied(local: LocalChain) -> AsyncIterator[tuple[str, object]]:
    """A TCP relay in front of the chain, and a function that cuts every connection through it."""
    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_connection("127.0.0.1", local.port)
        writers.extend((writer, upstream[1]))
        await asyncio.gather(pump(reader, upstream[1]), pump(upstream[0], writer))

    def drop() -> None:
        for writer in writers:
            writer.transport.abort()
        writers.clear()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", drop
    finally:
        drop()
        server.close()


async def test_closing_wakes_whoever_waits(local: LocalChain) -> None:
    chain = await BittensorChain.connect(local.url, NETUID, None, timeout=TIMEOUT)
    waiting = asyncio.create_task(chain.wait_for_block(10**6, timeout=TIMEOUT))
    await asyncio.sleep(0)
    await chain.close()
    with pytest.raises(ChainUnreachable, match="closed"):
        await waiting


# wallets and identities -----------------------------------------------------------------------------


async def test_a_missing_wallet_names_the_path_and_the_remedy(wallets: Path) -> None:
    with pytest.raises(WalletError, match=r"bob/hotkeys/nobody.*hotkeys there: miner, stranger, validator.*--hotkey"):
        load_wallet("bob", "nobody", wallets)
    with pytest.raises(WalletError, match="no hotkeys under"):
        load_wallet("alice", "nobody", wallets)


async def test_a_broken_hotkey_file_is_named(tmp_path: Path) -> None:
    create_wallet("bob", "one", tmp_path)
    (tmp_path / "bob" / "hotkeys" / "one").write_text("not a key")
    with pytest.raises(WalletError, match="hotkeys/one cannot be used"):
        load_wallet("bob", "one", tmp_path)


async def test_wallets_are_not_overwritten(wallets: Path) -> None:
    with pytest.raises(WalletError, match="exists already"):
        create_wallet("bob", MINER, wallets)
    with pytest.raises(WalletError, match="is not //Alice"):
        create_wallet("bob", "another", wallets, coldkey_uri="//Alice")


async def test_fresh_keys_are_different_and_can_sign(tmp_path: Path) -> None:
    keys = {create_wallet("fresh", name, tmp_path).hotkey.ss58_address for name in ("one", "two")}
    assert len(keys) == 2
    identity = Identity(load_wallet("fresh", "one", tmp_path))
    assert identity.hotkey in keys
    assert verify(identity.hotkey, b"message", identity.sign(b"message"))
