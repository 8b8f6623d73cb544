"""The Commitments pallet: one record of up to three fields per hotkey and subnet, replaced by each call.

Limits are the chain's: a registered hotkey, `MaxFields` fields, 128 bytes in a Raw field (that one is in the
type), and `MaxSpace` bytes per hotkey and epoch, where a call counts as at least 100 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from subnet.localchain import neurons
from subnet.localchain.dispatch import Args, Context, Function
from subnet.localchain.errors import DispatchError

MAX_FIELDS = 3
MIN_CHARGE = 100
_HASH_BYTES = 32


def _field_bytes(field: object) -> int:
    """What a field counts against the quota: its payload's bytes."""
    if not isinstance(field, Mapping):  # a variant without payload: None, ResetBondsFlag
        return 0
    (name, value), *_ = field.items()
    if str(name).startswith("Raw"):
        return int(str(name).removeprefix("Raw"))
    if name == "TimelockEncrypted":
        encrypted = str(cast("Mapping[str, object]", value)["encrypted"])
        return (len(encrypted) - 2) // 2
    if name == "TimelockRevealFailed":
        raise DispatchError("TimelockRevealFailedNotAllowed", pallet="Commitments")
    return _HASH_BYTES


def _set_commitment(ctx: Context, hotkey: str, args: Args) -> None:
    netuid, info = args.number("netuid"), args.struct("info")
    fields = cast("list[object]", info["fields"])
    if neurons.uid_of(ctx.state, netuid, hotkey) is None:
        raise DispatchError("AccountNotAllowedCommit", pallet="Commitments")
    if len(fields) > MAX_FIELDS:
        raise DispatchError("TooManyFieldsInCommitmentInfo", pallet="Commitments")
    epoch = ctx.state.number("SubtensorModule.SubnetEpochIndex", netuid)
    usage = ctx.state.struct("Commitments.UsedSpaceOf", netuid, hotkey)
    used = cast("int", usage["used_space"]) if usage is not None and usage["last_epoch"] == epoch else 0
    used += max(MIN_CHARGE, sum(_field_bytes(field) for field in fields))
    if used > ctx.state.number("Commitments.MaxSpace"):
        raise DispatchError("SpaceLimitExceeded", pallet="Commitments")
    ctx.state.put("Commitments.UsedSpaceOf", (netuid, hotkey), {"last_epoch": epoch, "used_space": used})
    registration = {"deposit": 0, "block": ctx.number, "info": info}
    ctx.state.put("Commitments.CommitmentOf", (netuid, hotkey), registration)
    ctx.state.put("Commitments.LastCommitment", (netuid, hotkey), ctx.number)
    ctx.emit("Commitments", "Commitment", {"netuid": netuid, "who": hotkey})


CALLS: Mapping[str, Function] = {"set_commitment": _set_commitment}
