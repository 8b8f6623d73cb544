"""Endpoints: `serve_axon` publishes where a neuron listens.

One rule of the real chain is left out on purpose: it refuses 127.0.0.1, and on a development chain that is
where every neuron lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from subnet.localchain import neurons
from subnet.localchain.dispatch import Args, Context, Function
from subnet.localchain.errors import DispatchError

_HIGHEST = {4: (1 << 32) - 1, 6: (1 << 128) - 1}  # the broadcast address of each, refused


def _serve_axon(ctx: Context, hotkey: str, args: Args) -> None:
    netuid = args.number("netuid")
    if neurons.uid_of(ctx.state, netuid, hotkey) is None:
        raise DispatchError("HotKeyNotRegisteredInNetwork")
    ip, ip_type = args.number("ip"), args.number("ip_type")
    if ip_type not in _HIGHEST:
        raise DispatchError("InvalidIpType")
    if ip >= _HIGHEST[ip_type]:
        raise DispatchError("InvalidIpAddress")
    previous = ctx.state.struct("SubtensorModule.Axons", netuid, hotkey)
    limit = ctx.state.number("SubtensorModule.ServingRateLimit", netuid)
    if previous is not None and limit and ctx.number - cast("int", previous["block"]) < limit:
        raise DispatchError("ServingRateLimitExceeded")
    if args.number("port") == 0:
        raise DispatchError("InvalidPort")
    fields = ("version", "ip", "port", "ip_type", "protocol", "placeholder1", "placeholder2")
    axon = {"block": ctx.number, **{name: args.number(name) for name in fields}}
    ctx.state.put("SubtensorModule.Axons", (netuid, hotkey), axon)
    ctx.emit("SubtensorModule", "AxonServed", (netuid, hotkey))


CALLS: Mapping[str, Function] = {"serve_axon": _serve_axon}
