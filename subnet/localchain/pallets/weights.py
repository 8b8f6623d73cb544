"""Weights: what a validator says each uid deserves, with the chain's checks in the chain's order."""

from __future__ import annotations

from collections.abc import Mapping

from subnet.localchain import neurons
from subnet.localchain.dispatch import Args, Context, Function
from subnet.localchain.errors import DispatchError

U16_MAX = 65_535


def _set(ctx: Context, hotkey: str, args: Args) -> None:
    state, netuid = ctx.state, args.number("netuid")
    dests, values = args.numbers("dests"), args.numbers("weights")
    if not neurons.subnet_exists(state, netuid):
        raise DispatchError("SubnetNotExists")
    if state.flag("SubtensorModule.CommitRevealWeightsEnabled", netuid):
        raise DispatchError("CommitRevealEnabled")
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
    if args.number("version_key") < state.number("SubtensorModule.WeightsVersionKey", netuid):
        raise DispatchError("IncorrectWeightVersionKey")
    last_update = state.numbers("SubtensorModule.LastUpdate", netuid)
    since = ctx.number - last_update[uid]
    if last_update[uid] and since < state.number("SubtensorModule.WeightsSetRateLimit", netuid):
        raise DispatchError("SettingWeightsTooFast")
    only_self = dests == [uid]
    if not only_self and not state.flags("SubtensorModule.ValidatorPermit", netuid)[uid]:
        raise DispatchError("NeuronNoValidatorPermit")
    _check_vector(ctx, netuid, dests, values, count, only_self=only_self)
    top = max(values, default=0)
    scaled = [(dest, value * U16_MAX // top) for dest, value in zip(dests, values, strict=True) if value]
    state.put("SubtensorModule.Weights", (netuid, uid), scaled)
    last_update[uid] = ctx.number
    state.put("SubtensorModule.LastUpdate", (netuid,), last_update)
    ctx.emit("SubtensorModule", "WeightsSet", (netuid, uid))


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


def _set_mechanism(ctx: Context, hotkey: str, args: Args) -> None:
    if args.number("mecid") >= ctx.state.number("SubtensorModule.MechanismCountCurrent", args.number("netuid")):
        raise DispatchError("MechanismDoesNotExist")
    _set(ctx, hotkey, args)


CALLS: Mapping[str, Function] = {"set_weights": _set, "set_mechanism_weights": _set_mechanism}
