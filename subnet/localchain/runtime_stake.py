"""Runtime APIs about stake and prices: positions, what can be withdrawn, fees, swaps, the cost of a new subnet.

One alpha is one TAO here, so swaps are free and exact, and nothing is ever locked. There is no root network, so root
baskets are empty, and nobody is a delegate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from subnet.localchain import neurons
from subnet.localchain.pallets import staking
from subnet.localchain.runtime_neurons import Method
from subnet.localchain.state import Snapshot

_P = "SubtensorModule."


def _info(snapshot: Snapshot, hotkey: str, coldkey: str, netuid: int) -> dict[str, object]:
    uid = neurons.uid_of(snapshot, netuid, hotkey)
    emission = snapshot.numbers(_P + "Emission", netuid)
    return {
        "hotkey": hotkey,
        "coldkey": coldkey,
        "netuid": netuid,
        "stake": staking.position(snapshot, netuid, hotkey, coldkey),
        "locked": 0,
        "emission": 0 if uid is None else emission[uid],
        "tao_emission": 0,
        "drain": 0,
        "is_registered": uid is not None,
    }


def _positions(snapshot: Snapshot, coldkey: str) -> list[dict[str, object]]:
    """Every position of a coldkey that is not empty."""
    infos = [
        _info(snapshot, hotkey, coldkey, netuid)
        for hotkey in snapshot.accounts(_P + "StakingHotkeys", coldkey)
        for netuid in neurons.subnets(snapshot)
    ]
    return [info for info in infos if info["stake"]]


def _for_coldkey(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    return _positions(snapshot, cast("str", inputs[0]))


def _for_coldkeys(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    return [(coldkey, _positions(snapshot, coldkey)) for coldkey in cast("list[str]", inputs[0])]


def _for_position(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    hotkey, coldkey, netuid = cast("tuple[str, str, int]", tuple(inputs))
    return _info(snapshot, hotkey, coldkey, netuid)


def _availability(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    coldkeys, netuids = cast("tuple[list[str], list[int] | None]", tuple(inputs))
    wanted = neurons.subnets(snapshot) if netuids is None else netuids
    found = {}
    for coldkey in coldkeys:
        totals = dict.fromkeys(wanted, 0)
        for info in _positions(snapshot, coldkey):
            netuid = cast("int", info["netuid"])
            if netuid in totals:
                totals[netuid] += cast("int", info["stake"])
        found[coldkey] = {netuid: {"total": total, "locked": 0, "available": total} for netuid, total in totals.items()}
    return found


def _zero(_snapshot: Snapshot, _inputs: Sequence[object]) -> object:
    return 0


def _none_listed(_snapshot: Snapshot, _inputs: Sequence[object]) -> object:
    return []


def _nothing(_snapshot: Snapshot, _inputs: Sequence[object]) -> object:
    return None


def _price(_snapshot: Snapshot, _inputs: Sequence[object]) -> object:
    return staking.PRICE


def _prices(snapshot: Snapshot, _inputs: Sequence[object]) -> object:
    return [{"netuid": netuid, "price": staking.PRICE} for netuid in neurons.subnets(snapshot)]


def _simulate_swap(_snapshot: Snapshot, inputs: Sequence[object]) -> object:
    """What goes in comes out: no fee, no slippage."""
    amount = inputs[1]
    free = dict.fromkeys(("tao_fee", "alpha_fee", "tao_slippage", "alpha_slippage"), 0)
    return {"tao_amount": amount, "alpha_amount": amount, **free}


def _subnet_cost(snapshot: Snapshot, _inputs: Sequence[object]) -> object:
    """Nobody ever created a subnet here, so the price of one is at its floor."""
    return snapshot.number(_P + "NetworkMinLockCost")


def _no_conviction(_snapshot: Snapshot, _inputs: Sequence[object]) -> object:
    return {"bits": 0}


def _empty_basket(_snapshot: Snapshot, inputs: Sequence[object]) -> object:
    amounts = dict.fromkeys(("nav_tao", "spot_nav_tao", "shares", "deposited_tao", "redeemed_tao"), 0)
    return {"hotkey": inputs[0], "holdings": [], **amounts}


def _no_basket_trading(_snapshot: Snapshot, _inputs: Sequence[object]) -> object:
    return {"enabled": False, "frozen": False, **dict.fromkeys(("refill_blocks", "tao_available", "budget_tao"), 0)}


_BASKETS: Mapping[str, Method] = {
    "get_root_basket_owed": _zero,
    "get_root_basket_positions": _none_listed,
    "get_root_basket_portfolio": _none_listed,
    "get_root_basket_total_nav": _zero,
    "get_basket_payout": _zero,
    "get_basket_position": _nothing,
    "get_validator_basket": _none_listed,
    "get_validator_basket_nav": _zero,
    "get_validator_basket_summary": _empty_basket,
    "get_basket_trading_status": _no_basket_trading,
    "get_all_validator_baskets": _none_listed,
    "get_beta_position": _nothing,
    "get_beta_portfolio": _none_listed,
    "get_beta_pricing": _nothing,
}

METHODS: Mapping[str, Method] = {
    **{f"BetaBasketRuntimeApi_{name}": method for name, method in _BASKETS.items()},
    "DelegateInfoRuntimeApi_get_delegates": _none_listed,
    "DelegateInfoRuntimeApi_get_delegate": _nothing,
    "DelegateInfoRuntimeApi_get_delegated": _none_listed,
    "StakeInfoRuntimeApi_get_stake_info_for_coldkey": _for_coldkey,
    "StakeInfoRuntimeApi_get_stake_info_for_coldkeys": _for_coldkeys,
    "StakeInfoRuntimeApi_get_stake_info_for_hotkey_coldkey_netuid": _for_position,
    "StakeInfoRuntimeApi_get_stake_availability_for_coldkeys": _availability,
    "StakeInfoRuntimeApi_get_stake_fee": _zero,
    "StakeInfoRuntimeApi_get_coldkey_lock": _nothing,
    "StakeInfoRuntimeApi_get_hotkey_conviction": _no_conviction,
    "StakeInfoRuntimeApi_get_most_convicted_hotkey_on_subnet": _nothing,
    "SubnetRegistrationRuntimeApi_get_network_registration_cost": _subnet_cost,
    "SwapRuntimeApi_current_alpha_price": _price,
    "SwapRuntimeApi_current_alpha_price_all": _prices,
    "SwapRuntimeApi_sim_swap_tao_for_alpha": _simulate_swap,
    "SwapRuntimeApi_sim_swap_alpha_for_tao": _simulate_swap,
}
