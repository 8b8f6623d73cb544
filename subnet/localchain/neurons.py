"""The table of a subnet's neurons: which hotkey holds which uid, and the per-uid columns that go with it.

On chain every column is one storage item holding a vector with an entry per uid, so a new neuron appends to
all of them and a replaced one resets its entry in all of them.
"""

from __future__ import annotations

from typing import cast

from subnet.localchain.dispatch import Context
from subnet.localchain.errors import DispatchError
from subnet.localchain.state import Reader, Snapshot

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


def subnets(snapshot: Snapshot) -> list[int]:
    """The netuids of all subnets."""
    item = "SubtensorModule.NetworksAdded"
    keys = snapshot.keys(snapshot.codec.key(item))
    return sorted(cast("int", snapshot.codec.map_key(item, key, fixed=0)[0]) for key in keys)


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
    """Lowest emission, then oldest registration, then lowest uid; DispatchError when nobody may be replaced.

    As `get_neuron_to_prune` of subtensor: the owner's first hotkeys are never replaced, neurons inside their immunity
    period only when `MinNonImmuneUids` or fewer are outside of theirs.
    """
    immunity = ctx.state.number("SubtensorModule.ImmunityPeriod", netuid)
    emission = ctx.state.numbers("SubtensorModule.Emission", netuid)
    keys = hotkeys(ctx.state, netuid)
    registered = [ctx.state.number("SubtensorModule.BlockAtRegistration", netuid, uid) for uid in range(len(keys))]
    kept = _owner_immune(ctx, netuid, keys, registered)
    free: list[tuple[int, int, int]] = []  # (emission, registration, uid)
    immune: list[tuple[int, int, int]] = []
    for uid in range(len(keys)):
        if uid not in kept:
            group = immune if ctx.number - registered[uid] < immunity else free
            group.append((emission[uid], registered[uid], uid))
    candidates = free if len(free) > ctx.state.number("SubtensorModule.MinNonImmuneUids", netuid) else immune
    if not candidates:
        raise DispatchError("NoNeuronIdAvailable")
    return min(candidates)[2]


def _owner_immune(ctx: Context, netuid: int, keys: list[str], registered: list[int]) -> list[int]:
    """The uids of the owner's declared hotkey and of the coldkey's oldest ones, `ImmuneOwnerUidsLimit` in all."""
    owner = ctx.state.account("SubtensorModule.SubnetOwner", netuid)
    declared = ctx.state.account("SubtensorModule.SubnetOwnerHotkey", netuid)
    owned = [uid for uid, key in enumerate(keys) if ctx.state.account("SubtensorModule.Owner", key) == owner]
    owned.sort(key=lambda uid: (keys[uid] != declared, registered[uid], uid))
    return owned[: ctx.state.number("SubtensorModule.ImmuneOwnerUidsLimit", netuid)]


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
