"""Stake: TAO in, alpha out, on a subnet with the stable mechanism, where one alpha is always one TAO.

`TotalHotkeyAlpha` is what a hotkey has; a coldkey's share of it is `AlphaV2` over `TotalHotkeySharesV2`, so
emission paid to a hotkey reaches every coldkey behind it without touching each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from subnet.localchain import neurons
from subnet.localchain.dispatch import Args, Context, Function
from subnet.localchain.errors import DispatchError
from subnet.localchain.pallets import balances
from subnet.localchain.state import Reader

MIN_STAKE = 2_000_000
PRICE = 1_000_000_000  # rao of TAO per alpha

_SHARES = "SubtensorModule.AlphaV2"
_ALL_SHARES = "SubtensorModule.TotalHotkeySharesV2"
_ALPHA = "SubtensorModule.TotalHotkeyAlpha"


def _read_shares(state: Reader, name: str, *keys: object) -> int:
    shares = state.struct(name, *keys) or {"mantissa": 0}
    return cast("int", shares["mantissa"])


def position(state: Reader, netuid: int, hotkey: str, coldkey: str) -> int:
    """Alpha (rao) that `coldkey` holds on `hotkey`."""
    total = _read_shares(state, _ALL_SHARES, hotkey, netuid)
    if total == 0:
        return 0
    own = _read_shares(state, _SHARES, hotkey, coldkey, netuid)
    return own * state.number(_ALPHA, hotkey, netuid) // total


def credit(ctx: Context, netuid: int, hotkey: str, coldkey: str, alpha: int) -> None:
    """Add (or with a negative `alpha` take away) alpha of one coldkey on one hotkey."""
    state = ctx.state
    pool, total = state.number(_ALPHA, hotkey, netuid), _read_shares(state, _ALL_SHARES, hotkey, netuid)
    shares = alpha if pool == 0 or total == 0 else alpha * total // pool
    own = _read_shares(state, _SHARES, hotkey, coldkey, netuid)
    state.put(_ALPHA, (hotkey, netuid), pool + alpha)
    state.put(_ALL_SHARES, (hotkey, netuid), {"mantissa": max(0, total + shares), "exponent": 0})
    state.put(_SHARES, (hotkey, coldkey, netuid), {"mantissa": max(0, own + shares), "exponent": 0})
    for name, amount in (("SubnetAlphaOut", alpha), ("TotalAlphaStaked", alpha)):
        item = f"SubtensorModule.{name}"
        state.put(item, (netuid,), max(0, state.number(item, netuid) + amount))


def _move_tao(ctx: Context, netuid: int, amount: int) -> None:
    for item, keys in (("SubtensorModule.SubnetTAO", (netuid,)), ("SubtensorModule.TotalStake", ())):
        ctx.state.put(item, keys, max(0, ctx.state.number(item, *keys) + amount))


def _check_subnet(ctx: Context, netuid: int, hotkey: str) -> None:
    if not neurons.subnet_exists(ctx.state, netuid):
        raise DispatchError("SubnetNotExists")
    if not ctx.state.flag("SubtensorModule.SubtokenEnabled", netuid):
        raise DispatchError("SubtokenDisabled")
    if ctx.state.account("SubtensorModule.Owner", hotkey) is None:
        raise DispatchError("HotKeyAccountNotExists")


def _add(ctx: Context, coldkey: str, args: Args) -> None:
    hotkey, netuid, amount = args.account("hotkey"), args.number("netuid"), args.number("amount_staked")
    _check_subnet(ctx, netuid, hotkey)
    if amount < MIN_STAKE:
        raise DispatchError("AmountTooLow")
    if balances.free_of(ctx.state, coldkey) < amount:
        raise DispatchError("NotEnoughBalanceToStake")
    balances.withdraw(ctx, coldkey, amount)
    credit(ctx, netuid, hotkey, coldkey, amount)
    _move_tao(ctx, netuid, amount)
    staking = ctx.state.accounts("SubtensorModule.StakingHotkeys", coldkey)
    if hotkey not in staking:
        ctx.state.put("SubtensorModule.StakingHotkeys", (coldkey,), [*staking, hotkey])
    ctx.emit("SubtensorModule", "StakeAdded", (coldkey, hotkey, amount, amount, netuid, 0))


def _add_limit(ctx: Context, coldkey: str, args: Args) -> None:
    if args.number("limit_price") < PRICE:
        raise DispatchError("SlippageTooHigh")
    _add(ctx, coldkey, args)


def _remove(ctx: Context, coldkey: str, args: Args) -> None:
    hotkey, netuid, amount = args.account("hotkey"), args.number("netuid"), args.number("amount_unstaked")
    _check_subnet(ctx, netuid, hotkey)
    held = position(ctx.state, netuid, hotkey, coldkey)
    if held == 0:
        raise DispatchError("NotEnoughStakeToWithdraw")
    amount = min(amount, held)
    if amount < MIN_STAKE or 0 < held - amount < MIN_STAKE:
        raise DispatchError("AmountTooLow")
    credit(ctx, netuid, hotkey, coldkey, -amount)
    _move_tao(ctx, netuid, -amount)
    balances.deposit(ctx, coldkey, amount)
    ctx.emit("SubtensorModule", "StakeRemoved", (coldkey, hotkey, amount, amount, netuid, 0))


def _remove_limit(ctx: Context, coldkey: str, args: Args) -> None:
    if args.number("limit_price") > PRICE:
        raise DispatchError("SlippageTooHigh")
    _remove(ctx, coldkey, args)


CALLS: Mapping[str, Function] = {
    "add_stake": _add,
    "add_stake_limit": _add_limit,
    "remove_stake": _remove,
    "remove_stake_limit": _remove_limit,
}
