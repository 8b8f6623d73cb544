"""Weights: what a validator says each uid deserves, with the chain's checks in the chain's order."""

from __future__ import annotations

from collections.abc import Mapping

from subnet.localchain import neurons
from subnet.localchain.dispatch import Args, Context, Function
from subnet.localchain.errors import DispatchError

U16_MAX = 65_535


def _set(ctx: Context, hotkey: str, args: Args) -> None:
    netuid = args.number("netuid")
    if not neurons.subnet_exists(ctx.state, netuid):
        raise DispatchError("SubnetNotExists")
    if ctx.state.flag("SubtensorModule.CommitRevealWeightsEnabled", netuid):
        raise DispatchError("CommitRevealEnabled")
    dests, values = args.numbers("dests"), args.numbers("weights")
    apply(ctx, hotkey, netuid=netuid, dests=dests, values=values, version_key=args.number("version_key"))


def apply(ctx: Context, hotkey: str, *, netuid: int, dests: list[int], values: list[int], version_key: int) -> None:
    """Set a hotkey's weights: by its own call, or revealed, when the commit has been what the rate limit counts."""
    state = ctx.state
    if len(dests) != len(values):
        raise DispatchError("WeightVecNotEqualSize")
    count = state.number("SubtensorModule.SubnetworkN", netuid)
    if len(dests) > count:
        raise DispatchError("UidsLengthExceedUidsInSubNet")
    uid = neurons.uid_of(state, netuid, hotkey)
    if uid is None:
        raise DispatchError("HotKeyNotRegisteredInSubNet")
    owner = state.account("SubtensorModule.SubnetOwnerHotkey", netuid)
    threshold = state.number("SubtensorModule.StakeThreshold")
    if hotkey != owner and neurons.stake_of(state, netuid, hotkey) < threshold:
        raise DispatchError("NotEnoughStakeToSetWeights")
    if version_key < state.number("SubtensorModule.WeightsVersionKey", netuid):
        raise DispatchError("IncorrectWeightVersionKey")
    revealed = state.flag("SubtensorModule.CommitRevealWeightsEnabled", netuid)
    if not revealed and too_soon(ctx, netuid, uid):
        raise DispatchError("SettingWeightsTooFast")
    only_self = dests == [uid]
    if not only_self and hotkey != owner and not state.flags("SubtensorModule.ValidatorPermit", netuid)[uid]:
        raise DispatchError("NeuronNoValidatorPermit")
    _check_vector(ctx, netuid, dests, values, count, only_self=only_self)
    top = max(values, default=0)
    # The greatest becomes 65535; the others are rounded, as the runtime does.
    scaled = [
        (dest, (2 * value * U16_MAX + top) // (2 * top)) for dest, value in zip(dests, values, strict=True) if value
    ]
    state.put("SubtensorModule.Weights", (netuid, uid), scaled)
    if not revealed:
        touch(ctx, netuid, uid)
    ctx.emit("SubtensorModule", "WeightsSet", (netuid, uid))


def too_soon(ctx: Context, netuid: int, uid: int) -> bool:
    """Whether the weights rate limit forbids `uid` to set or commit now."""
    last = ctx.state.numbers("SubtensorModule.LastUpdate", netuid)[uid]
    return bool(last) and ctx.number - last < ctx.state.number("SubtensorModule.WeightsSetRateLimit", netuid)


def touch(ctx: Context, netuid: int, uid: int) -> None:
    """Note that `uid` has set or committed weights in this block."""
    last_update = ctx.state.numbers("SubtensorModule.LastUpdate", netuid)
    last_update[uid] = ctx.number
    ctx.state.put("SubtensorModule.LastUpdate", (netuid,), last_update)


def _check_vector(
    ctx: Context, netuid: int, dests: list[int], values: list[int], count: int, *, only_self: bool
) -> None:
    if len(set(dests)) != len(dests):
        raise DispatchError("DuplicateUids")
    if any(dest >= count for dest in dests):
        raise DispatchError("UidVecContainInvalidOne")
    if only_self:
        return
    if len(dests) < ctx.state.number("SubtensorModule.MinAllowedWeights", netuid):
        raise DispatchError("WeightVecLengthIsLow")
    limit = ctx.state.number("SubtensorModule.MaxWeightsLimit", netuid)
    if limit < U16_MAX and max(values, default=0) * U16_MAX > limit * sum(values):
        raise DispatchError("MaxWeightExceeded")


def check_mechanism(ctx: Context, args: Args) -> None:
    """MechanismDoesNotExist unless the call's `mecid` is one of the subnet's."""
    if args.number("mecid") >= ctx.state.number("SubtensorModule.MechanismCountCurrent", args.number("netuid")):
        raise DispatchError("MechanismDoesNotExist")


def _set_mechanism(ctx: Context, hotkey: str, args: Args) -> None:
    check_mechanism(ctx, args)
    _set(ctx, hotkey, args)


CALLS: Mapping[str, Function] = {"set_weights": _set, "set_mechanism_weights": _set_mechanism}
