"""Several calls in one extrinsic:

`batch_all` (all or nothing), `batch` (up to the first failure), `force_batch`.
"""

from __future__ import annotations

from collections.abc import Mapping

from subnet.localchain.dispatch import Args, Context, Function
from subnet.localchain.errors import DispatchError

MAX_CALLS = 1_000


def _calls_checked(args: Args) -> None:
    if len(args.calls("calls")) > MAX_CALLS:
        raise DispatchError("TooManyCalls", pallet="Utility")


def _batch_all(ctx: Context, origin: str, args: Args) -> None:
    _calls_checked(args)
    for call in args.calls("calls"):
        ctx.dispatch(origin, call)
        ctx.emit("Utility", "ItemCompleted")
    ctx.emit("Utility", "BatchCompleted")


def _batch(ctx: Context, origin: str, args: Args) -> None:
    _calls_checked(args)
    for index, call in enumerate(args.calls("calls")):
        try:
            ctx.dispatch(origin, call)
        except DispatchError as error:
            failure = {"index": index, "error": ctx.error_value(error)}
            ctx.emit("Utility", "BatchInterrupted", failure)
            return
        ctx.emit("Utility", "ItemCompleted")
    ctx.emit("Utility", "BatchCompleted")


def _force_batch(ctx: Context, origin: str, args: Args) -> None:
    _calls_checked(args)
    failed = False
    for call in args.calls("calls"):
        try:
            ctx.dispatch(origin, call)
        except DispatchError as error:
            failed = True
            ctx.emit("Utility", "ItemFailed", {"error": ctx.error_value(error)})
        else:
            ctx.emit("Utility", "ItemCompleted")
    ctx.emit("Utility", "BatchCompletedWithErrors" if failed else "BatchCompleted")


CALLS: Mapping[str, Function] = {"batch": _batch, "batch_all": _batch_all, "force_batch": _force_batch}
