"""Commit-reveal weights: what is committed stays hidden until its epoch, then counts; what is wrong is refused."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
import aiohttp.web
import bittensor_core
import numpy as np
import pytest

from subnet.chain import BittensorChain, create_wallet, load_wallet
from subnet.localchain import ChainConfig, LocalChain, drand, epoch
from subnet.localchain.blocks import Chain
from subnet.localchain.dispatch import Context
from subnet.localchain.genesis import address, keypair
from subnet.localchain.metadata import compact
from subnet.localchain.pallets import TABLE, commit_reveal
from subnet.localchain.state import Working
from tests.subnet.localchain.test_localchain_blocks import BOB_HOTKEY, TX, Bench

# A round of quicknet's as drand published it. Sealing for a round that is over works like for one to come.
ROUND = 1_000
SIGNATURE = bytes.fromhex(
    "b44679b9a59af2ec876b1a6b1ad52ea9b1615fc3982b19576350f93447cb1125e342b73a8dd2bacbe47e4b6b63ed5e39"
)
MINER = "//Miner"


def bench(**hyperparameters: object) -> Bench:
    """A validator with a permit (uid 1) and a miner (uid 2), at the start of epoch 1, with commit-reveal on."""
    made = Bench(tempo=10, hyperparameters={"CommitRevealWeightsEnabled": True, **hyperparameters})  # type: ignore[arg-type]
    made.register()
    made.register(hotkey=MINER)
    made.stake(BOB_HOTKEY, 1_000)
    to(made, 10)
    return made


def to(made: Bench, number: int) -> None:
    while made.chain.head.number < number:
        made.block()


def weights(made: Bench, uid: int = 1) -> list[tuple[int, int]]:
    return made.chain.snapshot(made.chain.head.number).pairs(f"{TX}.Weights", 9, uid)


def seal(uids: list[int], values: list[int], hotkey: str = BOB_HOTKEY, *, number: int = ROUND) -> bytes:
    """What the SDK's encryption makes of the payload that the chain expects."""
    payload = compact(32) + bytes(keypair(hotkey).public_key)
    for numbers in (uids, values):
        payload += compact(len(numbers)) + b"".join(n.to_bytes(2, "little") for n in numbers)
    sealed, _ = bittensor_core.encrypt_at_round(payload + bytes(8), number)
    return bytes(bittensor_core.inner_ciphertext(sealed))


def commit(
    made: Bench, sealed: bytes, *, number: int = ROUND, version: int = 4, hotkey: str = BOB_HOTKEY
) -> str | None:
    args = {"netuid": 9, "mecid": 0, "commit": sealed, "reveal_round": number, "commit_reveal_version": version}
    return made.run(hotkey, TX, "commit_timelocked_mechanism_weights", args)


# timelocked -----------------------------------------------------------------------------------------


def test_a_timelocked_commit_is_held_and_revealed_after_its_period() -> None:
    made = bench()
    assert commit(made, seal([2], [7])) is None
    assert (TX, "TimelockedWeightsCommitted") in [event[:2] for event in made.events()]
    made.chain.add_pulse(ROUND, SIGNATURE)
    to(made, 19)
    assert weights(made) == []
    made.block()  # block 20 starts the reveal epoch
    assert weights(made) == [(2, 65_535)]
    assert (TX, "TimelockedWeightsRevealed", (9, address(BOB_HOTKEY))) in made.events()
    state = made.chain.snapshot(20)
    assert state.numbers(f"{TX}.Incentive", 9) == [0, 0, 65_535]  # in time for the epoch of the same block
    assert state.numbers(f"{TX}.LastUpdate", 9)[1] == 11  # the commit's block
    assert not state.exists(f"{TX}.TimelockedWeightCommits", 9, 1)


def test_a_longer_period_takes_longer() -> None:
    made = bench(RevealPeriodEpochs=3)
    commit(made, seal([2], [7]))
    made.chain.add_pulse(ROUND, SIGNATURE)
    to(made, 39)
    assert weights(made) == []
    made.block()
    assert weights(made) == [(2, 65_535)]


def test_a_commit_waits_for_its_pulse_until_the_epoch_is_over() -> None:
    made = bench()
    commit(made, seal([2], [7]))
    to(made, 25)
    assert list(made.chain.wanted_rounds()) == [ROUND]
    made.chain.add_pulse(ROUND, SIGNATURE)
    made.block()
    assert weights(made) == [(2, 65_535)]
    assert list(made.chain.wanted_rounds()) == []


def test_a_commit_without_its_pulse_is_dropped() -> None:
    made = bench()
    commit(made, seal([2], [7]))
    to(made, 30)
    made.chain.add_pulse(ROUND, SIGNATURE)
    to(made, 32)
    assert weights(made) == []
    assert not made.chain.snapshot(32).exists(f"{TX}.TimelockedWeightCommits", 9, 1)


@pytest.mark.parametrize(
    "sealed",
    [
        pytest.param(b"no ciphertext", id="garbage"),
        pytest.param(b"", id="empty"),
        pytest.param(seal([2], [7], MINER), id="of another hotkey"),
        pytest.param(seal([2], [7], number=ROUND + 1), id="for another round"),
        pytest.param(seal([2, 2], [7, 7]), id="duplicate uids"),
        pytest.param(seal([2], [7, 7]), id="lengths that differ"),
        pytest.param(
            bytes(bittensor_core.inner_ciphertext(bittensor_core.encrypt_at_round(b"", ROUND)[0])), id="nothing"
        ),
    ],
)
def test_a_commit_that_is_void_changes_nothing_and_does_not_stop_the_others(sealed: bytes) -> None:
    made = bench()
    assert commit(made, sealed) is None
    assert commit(made, seal([2], [7], "//Alice//hotkey"), hotkey="//Alice//hotkey") is None
    made.chain.add_pulse(ROUND, SIGNATURE)
    to(made, 21)
    assert weights(made) == []
    assert weights(made, 0) == [(2, 65_535)]


def test_timelocked_commits_that_are_refused() -> None:
    made = bench(WeightsSetRateLimit=5)
    sealed = seal([2], [7])
    assert commit(made, sealed, version=3) == "IncorrectCommitRevealVersion"
    assert commit(made, sealed, hotkey="//Dave") == "HotKeyNotRegisteredInSubNet"
    assert commit(made, bytes(5_001)) == "Exhausted"
    assert commit(made, sealed) is None
    assert commit(made, sealed) == "CommittingWeightsTooFast"
    assert made.weights(BOB_HOTKEY, [2], [1]) == "CommitRevealEnabled"
    off = Bench()
    off.register()
    assert commit(off, sealed) == "CommitRevealDisabled"


def test_ten_commits_may_wait() -> None:
    made = bench(RevealPeriodEpochs=2)
    made.run("//Bob", "Balances", "transfer_keep_alive", {"dest": address(BOB_HOTKEY), "value": 10**9})  # for the fee
    args = {"netuid": 9, "reveal_round": ROUND, "commit_reveal_version": 4}
    compose = made.chain.codec._rt.compose_call
    calls = [compose(TX, "commit_timelocked_weights", args | {"commit": bytes([n])}) for n in range(11)]
    assert made.run(BOB_HOTKEY, "Utility", "batch_all", {"calls": calls}) == "TooManyUnrevealedCommits"
    assert made.run(BOB_HOTKEY, "Utility", "batch_all", {"calls": calls[:10]}) is None


def test_the_sdks_own_commit_is_what_the_chain_opens() -> None:
    """The bytes that `get_encrypted_commit_v2` makes have the form that is opened; only their round is yet to come."""
    made = bench()
    sealed, number = bittensor_core.get_encrypted_commit_v2(
        uids=[2], weights=[65_535], version_key=0, last_epoch_block=10, pending_epoch_at=0, subnet_epoch_index=1,
        tempo=10, blocks_since_last_step=1, current_block=11, subnet_reveal_period_epochs=1, block_time=0.25,
        hotkey=bytes(keypair(BOB_HOTKEY).public_key),
    )  # fmt: skip
    assert len(sealed) == len(seal([2], [65_535]))
    assert drand.published_at(number) > time.time() - 60
    assert commit(made, bytes(sealed), number=number) is None
    assert list(made.chain.wanted_rounds()) == [number]


def test_weights_on_who_registered_after_the_commit_do_not_count() -> None:
    made = bench()
    commit(made, seal([2], [7]))
    state = Working(made.chain.codec, made.chain.history)
    ctx = Context(codec=made.chain.codec, state=state, table=TABLE, number=made.chain.head.number + 1)
    subnet, _ = epoch._gather(ctx, 9)
    assert subnet.oldest_commit is not None
    assert subnet.oldest_commit.tolist() == [np.iinfo(np.int64).max, 11, np.iinfo(np.int64).max]


# pulses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signature", [b"", bytes(48), SIGNATURE[:-1] + b"\0", SIGNATURE + b"\0"])
def test_a_forged_pulse_is_refused(signature: bytes) -> None:
    with pytest.raises(ValueError, match="is not quicknet's signature of round 1000"):
        commit_reveal.check_pulse(ROUND, signature)
    with pytest.raises(ValueError, match="round 1001"):
        commit_reveal.check_pulse(ROUND + 1, SIGNATURE)


async def relay(answers: list[aiohttp.web.Response]) -> tuple[aiohttp.web.AppRunner, str]:
    """A drand relay on loopback that gives these answers in turn, then the last one for ever."""

    async def answer(request: aiohttp.web.Request) -> aiohttp.web.Response:
        assert request.path == f"/{drand.CHAIN_HASH}/public/{ROUND}"
        given = answers.pop(0) if len(answers) > 1 else answers[0]
        return aiohttp.web.Response(status=given.status, body=given.body)

    app = aiohttp.web.Application()
    app.router.add_get("/{tail:.*}", answer)
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/"


async def test_a_relay_opens_what_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drand, "PERIOD", 0.001)
    answers = [
        aiohttp.web.Response(status=404),
        aiohttp.web.Response(text="no json"),
        aiohttp.web.Response(text='{"round":1000,"signature":"00"}'),
        aiohttp.web.Response(text=f'{{"round":1000,"signature":"{SIGNATURE.hex()}"}}'),
    ]
    runner, url = await relay(answers)
    made = bench()
    commit(made, seal([2], [7]))
    follower = asyncio.create_task(drand.follow(made.chain, url, clock=time.time))
    try:
        while len(answers) > 1 or not made.chain._pulses:  # noqa: ASYNC110 - the chain has no event for this
            await asyncio.sleep(0.01)
    finally:
        follower.cancel()
        await runner.cleanup()
    to(made, 20)
    assert weights(made) == [(2, 65_535)]
    assert len(answers) == 1


async def test_a_relay_that_is_not_there_says_so() -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(drand.RelayError, match=r"http://127\.0\.0\.1:1/.*/public/5"):
            await drand.fetch(session, "http://127.0.0.1:1", 5)


# hashed ---------------------------------------------------------------------------------------------


def hashed(made: Bench, uids: list[int], values: list[int], salt: list[int]) -> str | None:
    digest = commit_reveal.commit_hash(address(BOB_HOTKEY), 9, uids, values, salt, 0)
    return made.run(BOB_HOTKEY, TX, "commit_weights", {"netuid": 9, "commit_hash": "0x" + digest.hex()})


def reveal(made: Bench, uids: list[int], values: list[int], salt: list[int]) -> str | None:
    args = {"netuid": 9, "uids": uids, "values": values, "salt": salt, "version_key": 0}
    return made.run(BOB_HOTKEY, TX, "reveal_weights", args)


def test_a_hashed_commit_is_revealed_by_its_validator() -> None:
    made = bench()
    assert reveal(made, [2], [7], [1]) == "NoWeightsCommitFound"
    assert hashed(made, [2], [7], [1, 2, 3]) is None
    assert reveal(made, [2], [7], [1, 2, 3]) == "RevealTooEarly"
    to(made, 20)
    assert reveal(made, [2], [8], [1, 2, 3]) == "InvalidRevealCommitHashNotMatch"
    assert reveal(made, [2], [7], [1, 2, 3]) is None
    assert weights(made) == [(2, 65_535)]
    assert reveal(made, [2], [7], [1, 2, 3]) == "NoWeightsCommitFound"


def test_a_hashed_commit_expires() -> None:
    made = bench()
    hashed(made, [2], [7], [1])
    to(made, 30)
    assert reveal(made, [2], [7], [1]) == "ExpiredWeightCommit"
    assert reveal(made, [2], [7], [2]) == "NoWeightsCommitFound"


def test_a_reveal_drops_older_commits_and_keeps_newer_ones() -> None:
    made = bench()
    for salt in ([1], [2], [3]):
        assert hashed(made, [2], [7], salt) is None
    to(made, 20)
    assert reveal(made, [2], [7], [2]) is None
    assert reveal(made, [2], [7], [1]) == "InvalidRevealCommitHashNotMatch"
    assert reveal(made, [2], [7], [3]) is None


def test_a_reveal_passes_the_checks_of_any_weights() -> None:
    made = bench()
    hashed(made, [2, 2], [7, 7], [1])
    to(made, 20)
    assert reveal(made, [2, 2], [7, 7], [1]) == "DuplicateUids"
    assert reveal(made, [2, 2], [7, 7], [1]) == "DuplicateUids"  # a failed call leaves no trace, the commit stays


def test_commits_survive_a_restart(tmp_path: Path) -> None:
    made = bench()
    folder = tmp_path / "state"
    kept = Bench(tempo=10)
    kept.chain = Chain(made.chain.config, state=folder)
    kept.register()
    kept.register(hotkey=MINER)
    kept.stake(BOB_HOTKEY, 1_000)
    to(kept, 10)
    assert commit(kept, seal([2], [7])) is None
    kept.chain.close()
    kept.chain = Chain(made.chain.config, state=folder)
    kept.chain.add_pulse(ROUND, SIGNATURE)
    to(kept, 20)
    assert weights(kept) == [(2, 65_535)]
    kept.chain.close()


async def test_the_sdk_sets_weights_through_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`set_weights` of the unmodified SDK finds commit-reveal on, seals the weights, and the chain holds them."""
    monkeypatch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path / "cache"))
    create_wallet("bob", "validator", tmp_path, coldkey_uri="//Bob", hotkey_uri=BOB_HOTKEY)
    config = ChainConfig(tempo=5, block_time=0.05, hyperparameters={"CommitRevealWeightsEnabled": True})
    async with LocalChain(config) as local:
        wallet = load_wallet("bob", "validator", tmp_path)
        chain = await BittensorChain.connect(local.url, 9, wallet, timeout=20)
        try:
            await chain.register_neurons({address(BOB_HOTKEY): 1_000.0})
            await chain.wait_for_block(await chain.next_epoch_block() + 1, timeout=20)
            block = await chain.set_weights({0: 1.0})
        finally:
            await chain.close()
        state = local.chain.snapshot(block)
        held = [state.value(f"{TX}.TimelockedWeightCommits", 9, at) for at in range(block)]
        (commits,) = [found for found in held if found]
        ((hotkey, at, _, number),) = commits  # type: ignore[attr-defined]
        assert (hotkey, at) == (address(BOB_HOTKEY), block)
        assert number in local.chain.wanted_rounds()
