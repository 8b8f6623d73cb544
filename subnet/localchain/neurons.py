"""The table of a subnet's neurons: which hotkey holds which uid, and the per-uid columns that go with it.

On chain every column is one storage item holding a vector with an entry per uid, so a new neuron appends to
all of them and a replaced one resets its entry in all of them.
"""

from __future__ import annotations

from subnet.localchain.dispatch import Context
from subnet.localchain.errors import DispatchError
from subnet.localchain.state import Reader

# Columns of zeros for a new neuron. LastUpdate, Active and ValidatorPermit are set apart below.
SCORES = ("Consensus", "Incentive", "Dividends", "ValidatorTrust", "Emission")


def uid_of(state: Reader, netuid: int, hotkey: str) -> int | None:
    """The uid that `hotkey` holds on the subnet, None for an unregistered one."""
    if not state.exists("SubtensorModule.Uids", netuid, hotkey):
        return None
    return state.number("SubtensorModule.Uids", netuid, hotkey)


def hotkeys(state: Reader, netuid: int) -> list[str]:
    """All hotkeys of the subnet, by uid."""
    count = state.number("SubtensorModule.SubnetworkN", netuid)
    return [state.account("SubtensorModule.Keys", netuid, uid) or "" for uid in range(count)]


def subnet_exists(state: Reader, netuid: int) -> bool:
    return state.flag("SubtensorModule.NetworksAdded", netuid)


def stake_of(state: Reader, netuid: int, hotkey: str) -> int:
    """Alpha (rao) staked to a hotkey on the subnet."""
    return state.number("SubtensorModule.TotalHotkeyAlpha", hotkey, netuid)


def register(ctx: Context, netuid: int, hotkey: str) -> int:
    """Give `hotkey` a uid: a free one, or that of the neuron that is pruned. Returns the uid."""
    count = ctx.state.number("SubtensorModule.SubnetworkN", netuid)
    if count < ctx.state.number("SubtensorModule.MaxAllowedUids", netuid):
        uid = count
        ctx.state.put("SubtensorModule.SubnetworkN", (netuid,), count + 1)
    else:
        uid = _neuron_to_prune(ctx, netuid)
        _clear(ctx, netuid, uid)
    _set_column(ctx, netuid, "LastUpdate", uid, ctx.number)
    _set_column(ctx, netuid, "Active", uid, True)
    _set_column(ctx, netuid, "ValidatorPermit", uid, False)
    for column in SCORES:
        _set_column(ctx, netuid, column, uid, 0)
    ctx.state.put("SubtensorModule.Keys", (netuid, uid), hotkey)
    ctx.state.put("SubtensorModule.Uids", (netuid, hotkey), uid)
    ctx.state.put("SubtensorModule.BlockAtRegistration", (netuid, uid), ctx.number)
    ctx.state.put("SubtensorModule.IsNetworkMember", (hotkey, netuid), True)
    ctx.emit("SubtensorModule", "NeuronRegistered", (netuid, uid, hotkey))
    return uid


def _set_column(ctx: Context, netuid: int, column: str, uid: int, value: int) -> None:
    name = f"SubtensorModule.{column}"
    values = ctx.state.numbers(name, netuid)
    if uid == len(values):
        values.append(value)
    else:
        values[uid] = value
    ctx.state.put(name, (netuid,), values)


def _neuron_to_prune(ctx: Context, netuid: int) -> int:
    """Outside immunity, the lowest emission, oldest registration, lowest uid; never the owner's."""
    immunity = ctx.state.number("SubtensorModule.ImmunityPeriod", netuid)
    owner = ctx.state.account("SubtensorModule.SubnetOwnerHotkey", netuid)
    emission = ctx.state.numbers("SubtensorModule.Emission", netuid)
    candidates = []
    for uid, hotkey in enumerate(hotkeys(ctx.state, netuid)):
        registered = ctx.state.number("SubtensorModule.BlockAtRegistration", netuid, uid)
        if hotkey != owner and ctx.number - registered >= immunity:
            candidates.append((emission[uid], registered, uid))
    if not candidates:
        raise DispatchError("NoNeuronIdAvailable")
    return min(candidates)[2]


def _clear(ctx: Context, netuid: int, uid: int) -> None:
    """Forget the neuron that holds `uid`:

    its key, endpoint, weights and bonds, and the bonds others hold on it.
    """
    hotkey = ctx.state.account("SubtensorModule.Keys", netuid, uid)
    ctx.state.delete("SubtensorModule.Uids", netuid, hotkey)
    ctx.state.delete("SubtensorModule.IsNetworkMember", hotkey, netuid)
    ctx.state.delete("SubtensorModule.Axons", netuid, hotkey)
    ctx.state.delete("SubtensorModule.Weights", netuid, uid)
    ctx.state.delete("SubtensorModule.Bonds", netuid, uid)
    for row in range(ctx.state.number("SubtensorModule.SubnetworkN", netuid)):
        bonds = ctx.state.pairs("SubtensorModule.Bonds", netuid, row)
        kept = [(target, value) for target, value in bonds if target != uid]
        if len(kept) < len(bonds):
            ctx.state.put("SubtensorModule.Bonds", (netuid, row), kept)
