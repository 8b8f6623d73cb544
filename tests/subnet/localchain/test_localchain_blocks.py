"""The chain without sockets: what the pool takes and refuses, and what calls do to the state."""

from __future__ import annotations

from collections.abc import Mapping

import bittensor_core
import pytest

from subnet.localchain import neurons
from subnet.localchain.block import Block
from subnet.localchain.blocks import Chain
from subnet.localchain.codec import blake2_256
from subnet.localchain.errors import RpcError
from subnet.localchain.extrinsic import make
from subnet.localchain.genesis import DEVELOPMENT_TAO, RAO_PER_TAO, ChainConfig, address, keypair
from subnet.localchain.metadata import compact
from subnet.localchain.pallets import balances

BOB, BOB_HOTKEY = "//Bob", "//Bob//hotkey"
POOR = "//NobodyFundedThis"
TX = "SubtensorModule"


class Bench:
    """A chain whose blocks are made by hand."""

    def __init__(self, **config: float) -> None:
        self.chain = Chain(ChainConfig(**config))  # type: ignore[arg-type]
        self.now = 1_000

    def sign(
        self,
        uri: str,
        module: str,
        function: str,
        args: Mapping[str, object],
        *,
        nonce: int | None = None,
        period: int | None = 16,
        genesis: bytes | None = None,
        scheme: int = bittensor_core.CRYPTO_SR25519,
    ) -> bytes:
        """A signed extrinsic, as a client would make it on the newest block."""
        chain, key = self.chain, bittensor_core.Keypair.create_from_uri(uri, scheme)
        call = chain.codec.encode_call(module, function, args)
        nonce = chain.next_nonce(key.ss58_address) if nonce is None else nonce
        current, genesis = (chain.head.number, chain.head.hash), genesis or chain.hash_of(0) or b""
        return make(chain.codec, call, key, period=period or 0, nonce=nonce, current=current, genesis=genesis)

    def block(self, *extrinsics: bytes) -> Block:
        for raw in extrinsics:
            self.chain.submit(raw)
        self.now += 250
        return self.chain.produce(self.now)[0]

    def events(self) -> list[tuple[str, str, object]]:
        """Events of the newest block, as the SDK reads them."""
        records = self.chain.snapshot(self.chain.head.number).value("System.Events")
        assert isinstance(records, list)
        return [(r["event"]["module_id"], r["event"]["event_id"], r["event"]["attributes"]) for r in records]

    def run(self, uri: str, module: str, function: str, args: Mapping[str, object]) -> str | None:
        """Put one call into a block of its own; the name of the error it fails with, None if it succeeds."""
        self.block(self.sign(uri, module, function, args))
        last = self.events()[-1]
        if last[1] == "ExtrinsicSuccess":
            return None
        error = last[2]["dispatch_error"]  # type: ignore[index]
        if isinstance(error, str):
            return error
        if "Module" not in error:
            return str(next(iter(error.values())))
        index = bytes.fromhex(error["Module"]["error"][2:])[0]
        return str(self.chain.codec._rt.module_error(error["Module"]["index"], index)[0])

    def register(self, coldkey: str = BOB, hotkey: str = BOB_HOTKEY) -> str | None:
        return self.run(coldkey, TX, "burned_register", {"netuid": 9, "hotkey": address(hotkey)})

    def commit(self, hotkey: str, *fields: Mapping[str, object]) -> str | None:
        return self.run(hotkey, "Commitments", "set_commitment", {"netuid": 9, "info": {"fields": list(fields)}})

    def stake(self, hotkey: str, tao: float, coldkey: str = BOB) -> str | None:
        amount = round(tao * RAO_PER_TAO)
        args = {"hotkey": address(hotkey), "netuid": 9, "amount_staked": amount}
        return self.run(coldkey, TX, "add_stake", args)

    def weights(self, hotkey: str, uids: list[int], values: list[int], version: int = 0) -> str | None:
        args = {"netuid": 9, "dests": uids, "weights": values, "version_key": version}
        return self.run(hotkey, TX, "set_weights", args)


@pytest.fixture
def bench() -> Bench:
    return Bench()


REMARKABLE = {"dest": address("//Charlie"), "value": RAO_PER_TAO}


def transfer(bench: Bench, **options: object) -> bytes:
    return bench.sign(BOB, "Balances", "transfer_keep_alive", REMARKABLE, **options)  # type: ignore[arg-type]


def refused(bench: Bench, raw: bytes) -> tuple[int, str]:
    with pytest.raises(RpcError) as caught:
        bench.chain.submit(raw)
    return caught.value.code, str(caught.value.data or caught.value.message)


# blocks ---------------------------------------------------------------------------------------------


def test_headers_chain_and_hash_as_on_substrate(bench: Bench) -> None:
    first, second = bench.block(), bench.block(transfer(bench))
    assert second.parent == first.hash
    header = first.hash + compact(2) + second.state_root + second.extrinsics_root + b"\0"
    assert second.hash == blake2_256(header)
    assert second.state_root != first.state_root
    assert bench.chain.number_of(second.hash) == 2
    assert bench.chain.finalized is first


def test_chains_of_the_same_configuration_have_the_same_genesis() -> None:
    assert Bench().chain.head.hash == Bench().chain.head.hash
    assert Bench().chain.head.hash != Bench(tempo=30).chain.head.hash


def test_time_is_handed_in_and_never_stands_still(bench: Bench) -> None:
    bench.block()
    bench.now = 0
    assert bench.block().timestamp_ms == 1_251


# the pool -------------------------------------------------------------------------------------------


def test_a_transfer_moves_money_and_costs_a_fee(bench: Bench) -> None:
    raw = transfer(bench)
    bench.block(raw)
    state = bench.chain.snapshot(1)
    fee = balances.fee_of(len(raw))
    assert balances.free_of(state, address(BOB)) == (DEVELOPMENT_TAO - 1) * RAO_PER_TAO - fee
    assert balances.free_of(state, address("//Charlie")) == (DEVELOPMENT_TAO + 1) * RAO_PER_TAO
    assert balances.nonce_of(state, address(BOB)) == 1
    assert [(module, event) for module, event, _ in bench.events()] == [
        ("System", "ExtrinsicSuccess"),
        ("Balances", "Withdraw"),
        ("Balances", "Transfer"),
        ("TransactionPayment", "TransactionFeePaid"),
        ("System", "ExtrinsicSuccess"),
    ]


def test_an_ed25519_account_can_sign(bench: Bench) -> None:
    key = bittensor_core.Keypair.create_from_uri("//Ed", bittensor_core.CRYPTO_ED25519)
    bench.run(BOB, "Balances", "transfer_keep_alive", {"dest": key.ss58_address, "value": RAO_PER_TAO})
    args = {"dest": address(BOB), "value": 1_000}
    bench.block(bench.sign("//Ed", "Balances", "transfer_keep_alive", args, scheme=bittensor_core.CRYPTO_ED25519))
    assert bench.events()[-1][1] == "ExtrinsicSuccess"


def test_a_changed_byte_is_a_bad_signature(bench: Bench) -> None:
    raw = bytearray(transfer(bench))
    raw[-1] ^= 1
    assert refused(bench, bytes(raw)) == (1010, "Transaction has a bad signature")


def test_a_signature_for_another_chain_is_a_bad_signature(bench: Bench) -> None:
    assert refused(bench, transfer(bench, genesis=b"\1" * 32)) == (1010, "Transaction has a bad signature")


def test_the_same_extrinsic_counts_once(bench: Bench) -> None:
    raw = transfer(bench)
    bench.chain.submit(raw)
    assert refused(bench, raw)[0] == 1013
    bench.block()
    assert refused(bench, raw) == (1010, "Transaction is outdated")


def test_a_used_nonce_is_outdated(bench: Bench) -> None:
    bench.block(transfer(bench))
    assert refused(bench, transfer(bench, nonce=0)) == (1010, "Transaction is outdated")


def test_a_waiting_nonce_is_not_replaced(bench: Bench) -> None:
    bench.chain.submit(transfer(bench))
    assert refused(bench, transfer(bench, nonce=0, period=32))[0] == 1014


def test_a_future_nonce_waits_for_the_one_before_it(bench: Bench) -> None:
    bench.block(transfer(bench, nonce=1))
    assert len(bench.chain.head.extrinsics) == 1
    bench.block(transfer(bench, nonce=0))
    assert len(bench.chain.head.extrinsics) == 3


def test_an_era_that_is_over_is_refused(bench: Bench) -> None:
    bench.block()
    raw = transfer(bench, period=4)  # valid in blocks 1 to 4
    for _ in range(3):
        bench.block()
    assert refused(bench, raw) == (1010, "Transaction has an ancient birth block")
    # One block on, the era's bytes mean the next era, whose first block is another than the one that was signed.
    bench.block()
    assert refused(bench, raw) == (1010, "Transaction has a bad signature")


def test_an_era_lasts_to_its_last_block_and_no_longer(bench: Bench) -> None:
    bench.block()
    raw = transfer(bench, period=4)
    bench.block()
    bench.block()
    bench.block(raw)
    assert bench.chain.head.number == 4
    assert len(bench.chain.head.extrinsics) == 2


def test_an_extrinsic_that_expires_in_the_pool_is_dropped(bench: Bench) -> None:
    bench.block()
    bench.chain.submit(transfer(bench, nonce=1, period=4))
    dropped = [tx for _ in range(4) for tx in bench.chain.produce(0)[2]]
    assert len(dropped) == 1
    assert bench.chain.pending() == []


def test_who_cannot_pay_the_fee_is_refused(bench: Bench) -> None:
    raw = bench.sign(POOR, "System", "remark", {"remark": b"x"})
    assert refused(bench, raw) == (1010, "Inability to pay some fees (e.g. account balance too low)")


@pytest.mark.parametrize("raw", [b"", b"\0", b"\xff" * 40, compact(3) + b"\x84\0\0", compact(1) + b"\x04"])
def test_bytes_that_are_no_extrinsic_are_refused(bench: Bench, raw: bytes) -> None:
    assert refused(bench, raw)[0] == 1001


def test_every_truncation_of_an_extrinsic_is_refused(bench: Bench) -> None:
    raw = transfer(bench)
    for length in range(len(raw)):
        assert refused(bench, raw[:length])[0] == 1001
    assert refused(bench, raw + b"\0")[0] == 1001


def test_a_call_that_this_chain_leaves_out_says_so(bench: Bench) -> None:
    assert bench.run(BOB, "System", "remark", {"remark": b"x"}) == "CallFiltered"


# calls ----------------------------------------------------------------------------------------------


def test_registration(bench: Bench) -> None:
    assert bench.register() is None
    state = bench.chain.snapshot(bench.chain.head.number)
    assert neurons.uid_of(state, 9, address(BOB_HOTKEY)) == 1
    assert neurons.hotkeys(state, 9) == [address("//Alice//hotkey"), address(BOB_HOTKEY)]
    assert state.account(f"{TX}.Owner", address(BOB_HOTKEY)) == address(BOB)
    assert (TX, "NeuronRegistered", (9, 1, address(BOB_HOTKEY))) in bench.events()


def test_registration_that_fails(bench: Bench) -> None:
    bench.register()
    assert bench.register() == "HotKeyAlreadyRegisteredInSubNet"
    hotkey = address("//New")
    assert (
        bench.run(BOB, TX, "burned_register", {"netuid": 0, "hotkey": hotkey}) == "RegistrationNotPermittedOnRootSubnet"
    )
    assert bench.run(BOB, TX, "burned_register", {"netuid": 8, "hotkey": hotkey}) == "SubnetNotExists"
    limited = {"netuid": 9, "hotkey": hotkey, "limit_price": 1}
    assert bench.run(BOB, TX, "register_limit", limited) == "RegistrationPriceLimitExceeded"


def test_registration_needs_the_burn_on_top_of_the_fee(bench: Bench) -> None:
    args = {"dest": address(POOR), "value": 400_000}
    bench.run(BOB, "Balances", "transfer_keep_alive", args)
    assert bench.register(coldkey=POOR, hotkey="//New") == "NotEnoughBalanceToStake"


def test_staking_and_unstaking(bench: Bench) -> None:
    assert bench.stake(BOB_HOTKEY, 1) == "HotKeyAccountNotExists"
    bench.register()
    assert bench.stake(BOB_HOTKEY, 0.0001) == "AmountTooLow"
    assert bench.stake(BOB_HOTKEY, 2 * DEVELOPMENT_TAO) == "NotEnoughBalanceToStake"
    assert bench.stake(BOB_HOTKEY, 100) is None
    limited = {
        "hotkey": address(BOB_HOTKEY),
        "netuid": 9,
        "amount_staked": RAO_PER_TAO,
        "allow_partial": False,
    }
    assert bench.run(BOB, TX, "add_stake_limit", limited | {"limit_price": 1}) == "SlippageTooHigh"
    args = {"hotkey": address(BOB_HOTKEY), "netuid": 9, "amount_unstaked": 40 * RAO_PER_TAO}
    assert bench.run("//Charlie", TX, "remove_stake", args) == "NotEnoughStakeToWithdraw"
    assert bench.run(BOB, TX, "remove_stake", args) is None
    stake = neurons.stake_of(bench.chain.snapshot(bench.chain.head.number), 9, address(BOB_HOTKEY))
    assert stake == 60 * RAO_PER_TAO


def test_transfers_that_fail(bench: Bench) -> None:
    too_much = {"dest": address("//Charlie"), "value": 2 * DEVELOPMENT_TAO * RAO_PER_TAO}
    assert bench.run(BOB, "Balances", "transfer_keep_alive", too_much) == "FundsUnavailable"
    dust = {"dest": address(POOR), "value": 1}
    assert bench.run(BOB, "Balances", "transfer_keep_alive", dust) == "BelowMinimum"


def test_serving(bench: Bench) -> None:
    axon = {
        "netuid": 9, "version": 1, "ip": 0x7F000001, "port": 8_091, "ip_type": 4,
        "protocol": 4, "placeholder1": 0, "placeholder2": 0,
    }  # fmt: skip
    assert bench.run(BOB_HOTKEY, TX, "serve_axon", axon) == "HotKeyNotRegisteredInNetwork"
    bench.register()
    assert bench.run(BOB_HOTKEY, TX, "serve_axon", axon | {"ip_type": 5}) == "InvalidIpType"
    assert bench.run(BOB_HOTKEY, TX, "serve_axon", axon | {"ip": 2**32 - 1}) == "InvalidIpAddress"
    assert bench.run(BOB_HOTKEY, TX, "serve_axon", axon | {"port": 0}) == "InvalidPort"
    assert bench.run(BOB_HOTKEY, TX, "serve_axon", axon) is None


def test_commitments_replace_each_other_and_have_a_quota_per_epoch(bench: Bench) -> None:
    assert bench.commit(BOB_HOTKEY, {"Raw1": b"x"}) == "AccountNotAllowedCommit"
    bench.register()
    assert bench.commit(BOB_HOTKEY, *[{"Raw1": b"x"}] * 4) == "TooManyFieldsInCommitmentInfo"
    assert bench.commit(BOB_HOTKEY, {"Raw128": bytes(128)}) is None
    assert bench.commit(BOB_HOTKEY, {"Raw3": b"\xff\0\x80"}) is None
    state = bench.chain.snapshot(bench.chain.head.number)
    stored = state.struct("Commitments.CommitmentOf", 9, address(BOB_HOTKEY))
    assert stored == {
        "deposit": 0,
        "block": bench.chain.head.number,
        "info": {"fields": [{"Raw3": "0xff0080"}]},
    }
    usage = state.struct("Commitments.UsedSpaceOf", 9, address(BOB_HOTKEY))
    assert usage is not None
    assert usage["used_space"] == 128 + 100


def test_the_commitment_quota(bench: Bench) -> None:
    bench.register()
    info = {"netuid": 9, "info": {"fields": [{"Raw1": b"x"}]}}
    nonces = range(32)
    bench.block(*[bench.sign(BOB_HOTKEY, "Commitments", "set_commitment", info, nonce=n) for n in nonces])
    outcomes = [event for _, event, _ in bench.events() if event.startswith("Extrinsic")]
    assert outcomes == ["ExtrinsicSuccess"] * 32 + ["ExtrinsicFailed"]  # the timestamp, 31 of 100 bytes, one too many


def test_weights_are_checked_in_the_chains_order(bench: Bench) -> None:
    assert bench.weights(BOB_HOTKEY, [0], [1]) == "HotKeyNotRegisteredInSubNet"
    bench.register()
    assert bench.weights(BOB_HOTKEY, [0, 1], [1]) == "WeightVecNotEqualSize"
    assert bench.weights(BOB_HOTKEY, [0, 1, 2], [1, 1, 1]) == "UidsLengthExceedUidsInSubNet"
    assert bench.weights(BOB_HOTKEY, [0], [1]) == "NeuronNoValidatorPermit"
    assert bench.weights(BOB_HOTKEY, [1], [1]) is None  # a weight on oneself alone needs no permit
    owner = "//Alice//hotkey"
    assert bench.weights(owner, [0, 0], [1, 1]) == "DuplicateUids"
    assert bench.weights(owner, [0, 7], [1, 1]) == "UidVecContainInvalidOne"
    assert bench.weights(owner, [], []) == "WeightVecLengthIsLow"
    assert bench.weights(owner, [0, 1], [1, 3]) is None
    state = bench.chain.snapshot(bench.chain.head.number)
    assert state.pairs(f"{TX}.Weights", 9, 0) == [(0, 21_845), (1, 65_535)]
    assert state.numbers(f"{TX}.LastUpdate", 9)[0] == bench.chain.head.number


def test_the_epoch_turns_weights_into_incentive_and_emission(bench: Bench) -> None:
    bench.register()
    bench.register(hotkey="//Miner")
    bench.stake(BOB_HOTKEY, 1_000)
    while bench.chain.head.number < 20:
        bench.block()
    assert bench.weights(BOB_HOTKEY, [2], [1]) is None
    while bench.chain.head.number < 40:
        bench.block()
    state = bench.chain.snapshot(40)
    assert state.numbers(f"{TX}.Incentive", 9) == [0, 0, 65_535]
    assert state.numbers(f"{TX}.Dividends", 9) == [0, 65_535, 0]
    assert state.flags(f"{TX}.ValidatorPermit", 9) == [True, True, False]
    assert state.number(f"{TX}.SubnetEpochIndex", 9) == 2
    assert state.numbers(f"{TX}.Emission", 9) == [0, 8_200_000_000, 8_200_000_000]  # 41 % of 20 alpha each
    assert neurons.stake_of(state, 9, address("//Miner")) == 8_200_000_000
    assert neurons.stake_of(bench.chain.snapshot(39), 9, address("//Miner")) == 0


def test_a_batch_is_all_or_nothing_or_goes_as_far_as_it_can(bench: Bench) -> None:
    codec = bench.chain.codec._rt
    good = codec.compose_call(TX, "burned_register", {"netuid": 9, "hotkey": address("//A")})
    bad = codec.compose_call(TX, "burned_register", {"netuid": 8, "hotkey": address("//B")})
    count = f"{TX}.SubnetworkN"
    assert bench.run(BOB, "Utility", "batch_all", {"calls": [good, bad]}) == "SubnetNotExists"
    assert bench.chain.snapshot(bench.chain.head.number).number(count, 9) == 1
    assert bench.run(BOB, "Utility", "batch", {"calls": [good, bad]}) is None
    assert bench.events()[-3][1] == "BatchInterrupted"
    assert bench.chain.snapshot(bench.chain.head.number).number(count, 9) == 2
    assert bench.run(BOB, "Utility", "force_batch", {"calls": [bad, bad]}) is None
    assert [event for _, event, _ in bench.events()].count("ItemFailed") == 2


def test_keypair_and_address_agree() -> None:
    assert keypair("//Alice").ss58_address == address("//Alice") == "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"netuid": 0}, "netuid"),
        ({"tempo": 1}, "tempo"),
        ({"block_time": 0.0}, "block time"),
        ({"history": 1}, "history"),
        ({"finality_lag": 99}, "finality lag"),
    ],
)
def test_a_configuration_out_of_bounds_names_the_bound(options: dict[str, int], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        ChainConfig(**options)
