"""Registration as an economy: the price, who is replaced, the owner's rules, the shield around it."""

from __future__ import annotations

from collections.abc import Mapping

import bittensor_core
import pytest

from subnet.localchain.genesis import ChainConfig, address
from subnet.localchain.pallets import shield
from tests.subnet.localchain.test_localchain_blocks import BOB, TX, Bench

ALICE = "//Alice"
MULTIPLIER = {"bits": int(1.26 * (1 << 64))}
FLOOR = 500_000


def strict(**hyperparameters: object) -> Bench:
    return Bench(hyperparameters=hyperparameters)  # type: ignore[arg-type]


def price(bench: Bench) -> int:
    return bench.chain.snapshot(bench.chain.head.number).number("SubtensorModule.Burn", 9)


def key(number: int) -> str:
    return f"//Bob//{number}"


def uid(bench: Bench, hotkey: str) -> int | None:
    state = bench.chain.snapshot(bench.chain.head.number)
    present = state.exists("SubtensorModule.Uids", 9, address(hotkey))
    return state.number("SubtensorModule.Uids", 9, address(hotkey)) if present else None


def admin(bench: Bench, setter: str, args: Mapping[str, object], who: str = ALICE) -> str | None:
    return bench.run(who, "AdminUtils", f"sudo_set_{setter}", {"netuid": 9, **args})


# the price ------------------------------------------------------------------------------------------


def test_the_price_rises_by_the_multiplier_and_halves_in_a_half_life() -> None:
    bench = strict(Burn=10**9, BurnIncreaseMult=MULTIPLIER, BurnHalfLife=360)
    bench.block()
    before = price(bench)
    assert bench.register(hotkey=key(0)) is None
    assert price(bench) == pytest.approx(before * 1.26, rel=0.003)
    risen = price(bench)
    for _ in range(360):
        bench.block()
    assert price(bench) == pytest.approx(risen / 2, rel=1e-4)


def test_the_price_stays_between_floor_and_ceiling() -> None:
    bench = strict(BurnIncreaseMult={"bits": 1_000 << 64}, MaxBurn=2 * FLOOR)
    for _ in range(10):
        bench.block()
    assert price(bench) == FLOOR
    assert bench.register(hotkey=key(0)) is None
    assert price(bench) == 2 * FLOOR


def test_at_most_so_many_registrations_per_block() -> None:
    bench = strict(MaxRegistrationsPerBlock=1)
    calls = [bench.sign(uri, TX, "burned_register", {"netuid": 9, "hotkey": address(f"{uri}//h")})
             for uri in ("//Bob", "//Charlie")]  # fmt: skip
    bench.block(*calls)
    assert [uid(bench, f"{uri}//h") for uri in ("//Bob", "//Charlie")] == [1, None]
    assert bench.register("//Charlie", "//Charlie//h") is None


# who is replaced ------------------------------------------------------------------------------------


def full(**hyperparameters: object) -> Bench:
    """Four slots: the owner's and keys 0 to 2, registered in that order."""
    bench = strict(MaxAllowedUids=4, **hyperparameters)
    for number in range(3):
        assert bench.register(hotkey=key(number)) is None
    return bench


def test_the_oldest_of_those_who_earn_nothing_is_replaced_never_the_owner() -> None:
    bench = full(ImmunityPeriod=2, MinNonImmuneUids=0)
    bench.block()
    bench.block()
    assert bench.register(hotkey=key(3)) is None
    assert [uid(bench, key(number)) for number in range(4)] == [None, 2, 3, 1]
    assert uid(bench, "//Alice//hotkey") == 0
    assert bench.register("//Charlie", key(0)) == "NonAssociatedColdKey"  # it lost its slot, not its owner


def test_while_enough_others_are_immune_the_free_ones_stay() -> None:
    """`MinNonImmuneUids` neurons outside immunity are kept; then even an immune one has to go."""
    bench = full(ImmunityPeriod=5, MinNonImmuneUids=1)
    while bench.chain.head.number < 5:
        bench.block()
    # In block 6 key 0 is 5 blocks old and alone outside its immunity.
    assert bench.register(hotkey=key(3)) is None
    assert [uid(bench, key(number)) for number in range(4)] == [1, None, 3, 2]


def test_a_subnet_of_the_owner_alone_has_no_slot_to_give() -> None:
    bench = strict(MaxAllowedUids=1)
    assert bench.register(hotkey=key(0)) == "NoNeuronIdAvailable"


# the owner's rules ----------------------------------------------------------------------------------


def test_the_owner_sets_hyperparameters_and_nobody_else() -> None:
    bench = Bench()
    factor = {"burn_increase_mult": MULTIPLIER}
    assert admin(bench, "burn_increase_mult", factor, BOB) == "BadOrigin"
    assert admin(bench, "burn_increase_mult", factor) is None
    state = bench.chain.snapshot(bench.chain.head.number)
    assert state.struct("SubtensorModule.BurnIncreaseMult", 9) == MULTIPLIER
    assert admin(bench, "network_registration_allowed", {"registration_allowed": False}) is None
    assert bench.register() == "SubNetRegistrationDisabled"


def test_slots_are_not_taken_from_those_who_hold_them() -> None:
    bench = full()
    assert admin(bench, "max_allowed_uids", {"max_allowed_uids": 3}) == "MaxAllowedUIdsLessThanCurrentUIds"
    assert admin(bench, "max_allowed_uids", {"max_allowed_uids": 5}) is None
    assert bench.run(ALICE, "AdminUtils", "sudo_set_tempo", {"netuid": 7, "tempo": 9}) == "SubnetDoesNotExist"


def test_a_hyperparameter_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'Bern' is no hyperparameter; choose from .*Burn"):
        ChainConfig(hyperparameters={"Bern": 1})


# the shield -----------------------------------------------------------------------------------------


def carrier(bench: Bench, inner: bytes, *, public_key: bytes | None = None) -> bytes:
    sealed = bittensor_core.encrypt_mlkem768(public_key or shield.public_key(), inner, include_key_hash=True)
    return bench.sign(BOB, "MevShield", "submit_encrypted", {"ciphertext": sealed})


def registration(bench: Bench, *, nonce: int) -> bytes:
    args = {"netuid": 9, "hotkey": address(key(0))}
    return bench.sign(BOB, TX, "burned_register", args, nonce=nonce, period=8)


def test_the_announced_key_is_the_chains() -> None:
    announced = Bench().chain.snapshot(0).value("MevShield.NextKey")
    assert announced == "0x" + shield.public_key().hex()
    assert len(shield.public_key()) == 1_184


def test_a_shielded_call_runs_right_behind_its_carrier() -> None:
    bench = Bench()
    inner = registration(bench, nonce=1)
    block = bench.block(outer := carrier(bench, inner))
    assert block.extrinsics[1:] == (outer, inner)
    assert uid(bench, key(0)) == 1
    assert [name for _, name, _ in bench.events() if name == "ExtrinsicSuccess"] == ["ExtrinsicSuccess"] * 3


@pytest.mark.parametrize("nonce", [0, 2])
def test_a_shielded_call_with_a_wrong_nonce_is_left_out(nonce: int) -> None:
    bench = Bench()
    block = bench.block(carrier(bench, registration(bench, nonce=nonce)))
    assert len(block.extrinsics) == 2
    assert uid(bench, key(0)) is None
    assert bench.chain.next_nonce(address(BOB)) == 1


@pytest.mark.parametrize("plain", [b"", b"no extrinsic", bytes(200)])
def test_a_carrier_of_rubbish_pays_its_fee_and_nothing_follows(plain: bytes) -> None:
    bench = Bench()
    assert len(bench.block(carrier(bench, plain)).extrinsics) == 2


def test_a_carrier_for_another_key_or_cut_short_does_not_open() -> None:
    bench = Bench()
    inner = registration(bench, nonce=1)
    sealed = bittensor_core.encrypt_mlkem768(shield.public_key(), inner, include_key_hash=True)
    for damaged in (sealed[:-1], sealed[:100], b"", b"0xno hex", sealed[:-1] + bytes([sealed[-1] ^ 1])):
        raw = bench.sign(BOB, "MevShield", "submit_encrypted", {"ciphertext": damaged})
        assert len(bench.block(raw).extrinsics) == 2
    assert uid(bench, key(0)) is None
