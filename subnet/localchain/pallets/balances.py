"""Accounts and TAO: nonces, free balances, transfers and fees. Amounts are in rao (1 TAO = 10**9 rao)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from subnet.localchain.dispatch import Args, Context, Function
from subnet.localchain.errors import token_error
from subnet.localchain.state import Reader

EXISTENTIAL_DEPOSIT = 500
BASE_FEE = 100_000
FEE_PER_BYTE = 10

_ACCOUNT = "System.Account"
_NEW_FLAGS = 1 << 127


def fee_of(length: int) -> int:
    """The fee of an extrinsic of `length` bytes: flat plus length, about 0.0001 TAO as on the real chain."""
    return BASE_FEE + FEE_PER_BYTE * length


def nonce_of(state: Reader, who: str) -> int:
    return cast("int", (state.struct(_ACCOUNT, who) or {"nonce": 0})["nonce"])


def free_of(state: Reader, who: str) -> int:
    """Free balance in rao."""
    account = state.struct(_ACCOUNT, who)
    return 0 if account is None else cast("int", cast("Mapping[str, object]", account["data"])["free"])


def set_account(ctx: Context, who: str, *, free: int | None = None, nonce: int | None = None) -> None:
    """Write the parts of an account that are given."""
    account = ctx.state.struct(_ACCOUNT, who) or {}
    data = dict(cast("Mapping[str, object]", account["data"]))
    if free is not None:
        data["free"] = free
        account["providers"] = int(free >= EXISTENTIAL_DEPOSIT)
        data["flags"] = _NEW_FLAGS
    if nonce is not None:
        account["nonce"] = nonce
    ctx.state.put(_ACCOUNT, (who,), {**account, "data": data})


def withdraw(ctx: Context, who: str, amount: int) -> None:
    """Take `amount` rao from `who`. DispatchError Token.FundsUnavailable when there is less."""
    free = free_of(ctx.state, who)
    if free < amount:
        raise token_error("FundsUnavailable")
    set_account(ctx, who, free=free - amount)
    ctx.emit("Balances", "Withdraw", {"who": who, "amount": amount})


def deposit(ctx: Context, who: str, amount: int) -> None:
    """Give `amount` rao to `who`, creating the account if it is new."""
    free = free_of(ctx.state, who)
    if free == 0:
        if amount < EXISTENTIAL_DEPOSIT:
            raise token_error("BelowMinimum")
        ctx.emit("System", "NewAccount", {"account": who})
        ctx.emit("Balances", "Endowed", {"account": who, "free_balance": amount})
    set_account(ctx, who, free=free + amount)


def _move(ctx: Context, source: str, dest: str, amount: int, *, keep_alive: bool) -> None:
    free = free_of(ctx.state, source)
    if free < amount:
        raise token_error("FundsUnavailable")
    left = free - amount
    if left < EXISTENTIAL_DEPOSIT and source != dest:
        if keep_alive:
            raise token_error("NotExpendable")
        if left:
            ctx.emit("Balances", "DustLost", {"account": source, "amount": left})
        left = 0
    if source != dest:
        set_account(ctx, source, free=left)
        deposit(ctx, dest, amount)
    ctx.emit("Balances", "Transfer", {"from": source, "to": dest, "amount": amount})


def _transfer_keep_alive(ctx: Context, origin: str, args: Args) -> None:
    _move(ctx, origin, args.account("dest"), args.number("value"), keep_alive=True)


def _transfer_allow_death(ctx: Context, origin: str, args: Args) -> None:
    _move(ctx, origin, args.account("dest"), args.number("value"), keep_alive=False)


def _transfer_all(ctx: Context, origin: str, args: Args) -> None:
    keep_alive = args.flag("keep_alive")
    amount = free_of(ctx.state, origin) - (EXISTENTIAL_DEPOSIT if keep_alive else 0)
    _move(ctx, origin, args.account("dest"), max(0, amount), keep_alive=keep_alive)


CALLS: Mapping[str, Function] = {
    "transfer_keep_alive": _transfer_keep_alive,
    "transfer_allow_death": _transfer_allow_death,
    "transfer_all": _transfer_all,
}
