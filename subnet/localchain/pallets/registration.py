"""Registration on a subnet by burning TAO: `burned_register` and `register_limit`.

The price is `Burn`: multiplied by `BurnIncreaseMult` with every registration, halved every `BurnHalfLife` blocks
(continuously, block by block), kept between `MinBurn` and `MaxBurn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from subnet.localchain import neurons
from subnet.localchain.dispatch import Args, Context, Function
from subnet.localchain.errors import DispatchError
from subnet.localchain.pallets import balances

_ROOT = 0
_Q64 = 1 << 64
_Q32 = 1 << 32


def own_hotkey(ctx: Context, coldkey: str, hotkey: str) -> None:
    """Put a new hotkey under `coldkey`; NonAssociatedColdKey if another coldkey owns it."""
    owner = ctx.state.account("SubtensorModule.Owner", hotkey)
    if owner is None:
        ctx.state.put("SubtensorModule.Owner", (hotkey,), coldkey)
        owned = ctx.state.accounts("SubtensorModule.OwnedHotkeys", coldkey)
        ctx.state.put("SubtensorModule.OwnedHotkeys", (coldkey,), [*owned, hotkey])
        staking = ctx.state.accounts("SubtensorModule.StakingHotkeys", coldkey)
        ctx.state.put("SubtensorModule.StakingHotkeys", (coldkey,), [*staking, hotkey])
    elif owner != coldkey:
        raise DispatchError("NonAssociatedColdKey")


def begin_block(ctx: Context, netuid: int) -> None:
    """What the runtime does for a subnet before a block's extrinsics: count from 0, let the price decay."""
    state = ctx.state
    if state.number("SubtensorModule.RegistrationsThisBlock", netuid):
        state.put("SubtensorModule.RegistrationsThisBlock", (netuid,), 0)
    half_life = state.number("SubtensorModule.BurnHalfLife", netuid)
    price = state.number("SubtensorModule.Burn", netuid)
    if half_life:
        # In 32-bit fixed point, as in the runtime.
        _set_price(ctx, netuid, price, price * int(_Q32 * 0.5 ** (1 / half_life)) >> 32)


def _set_price(ctx: Context, netuid: int, old: int, new: int) -> None:
    low = ctx.state.number("SubtensorModule.MinBurn", netuid)
    high = ctx.state.number("SubtensorModule.MaxBurn", netuid)
    price = min(max(new, low), high)
    if price != old:
        ctx.state.put("SubtensorModule.Burn", (netuid,), price)


def _register(ctx: Context, coldkey: str, netuid: int, hotkey: str, limit: int | None) -> None:
    state = ctx.state
    if netuid == _ROOT:
        raise DispatchError("RegistrationNotPermittedOnRootSubnet")
    if not neurons.subnet_exists(state, netuid):
        raise DispatchError("SubnetNotExists")
    if not state.flag("SubtensorModule.NetworkRegistrationAllowed", netuid):
        raise DispatchError("SubNetRegistrationDisabled")
    this_block = state.number("SubtensorModule.RegistrationsThisBlock", netuid)
    if this_block >= state.number("SubtensorModule.MaxRegistrationsPerBlock", netuid):
        raise DispatchError("TooManyRegistrationsThisBlock")
    if neurons.uid_of(state, netuid, hotkey) is not None:
        raise DispatchError("HotKeyAlreadyRegisteredInSubNet")
    price = state.number("SubtensorModule.Burn", netuid)
    if limit is not None and price > limit:
        raise DispatchError("RegistrationPriceLimitExceeded")
    if balances.free_of(state, coldkey) < price + balances.EXISTENTIAL_DEPOSIT:
        raise DispatchError("NotEnoughBalanceToStake")
    own_hotkey(ctx, coldkey, hotkey)
    balances.withdraw(ctx, coldkey, price)
    recycled = state.number("SubtensorModule.RAORecycledForRegistration", netuid)
    state.put("SubtensorModule.RAORecycledForRegistration", (netuid,), recycled + price)
    neurons.register(ctx, netuid, hotkey)
    factor = cast("int", (state.struct("SubtensorModule.BurnIncreaseMult", netuid) or {"bits": _Q64})["bits"])
    _set_price(ctx, netuid, price, price * factor >> 64)
    state.put("SubtensorModule.RegistrationsThisBlock", (netuid,), this_block + 1)
    interval = state.number("SubtensorModule.RegistrationsThisInterval", netuid)
    state.put("SubtensorModule.RegistrationsThisInterval", (netuid,), min(interval + 1, 0xFFFF))


def _burned_register(ctx: Context, origin: str, args: Args) -> None:
    _register(ctx, origin, args.number("netuid"), args.account("hotkey"), None)


def _register_limit(ctx: Context, origin: str, args: Args) -> None:
    _register(ctx, origin, args.number("netuid"), args.account("hotkey"), args.number("limit_price"))


CALLS: Mapping[str, Function] = {"burned_register": _burned_register, "register_limit": _register_limit}
