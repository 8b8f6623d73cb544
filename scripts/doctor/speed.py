"""How fast the way to peers is, each way: a few megabytes to and from nodes that run, and what a stage needs of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model.accounting import boundary_bytes
from model.devices import DEVICES
from neurons.machine import Card
from neurons.speed import TRIES
from scripts.doctor.machine import CPU_FLOPS, Work
from scripts.doctor.options import DoctorOptions
from scripts.doctor.report import Finding, ok, skipped, warn
from subnet.identity import Identity
from subnet.manifest import Manifest
from subnet.messages import SPEED_BYTES, WIRE_DTYPES, Sped, Speed
from subnet.metagraph import Neuron
from subnet.quantities import duration, size
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import TransportError, UnknownRoute
from subnet.transport.synapse import HEADER_LIMIT

PEERS = 2
"""Measured with, so that one whose own line is slow does not speak for this one."""
DEADLINE = 40.0
"""Seconds for a transfer: what an axon needs at its minimum rate, 1 Mbit/s."""
WARM = 5.0
"""A transfer that took longer says enough: no second one over the warm connection."""
ENOUGH = 0.8
"""Of what is declared: so short a transfer understates a line."""
LEAST = 1e-4
"""Seconds below which nothing is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """With one peer, bits per second; or why not."""

    uid: int
    up: float = 0.0
    down: float = 0.0
    problem: str = ""


async def measure(
    identity: Identity, peers: Sequence[tuple[Neuron, float]], *, now_ns: Callable[[], int]
) -> tuple[Measured, ...]:
    """One peer after the other until `PEERS` have answered. Each comes with the seconds of a round trip to it."""
    found: list[Measured] = []
    async with Dendrite(identity, now_ns=now_ns) as dendrite:
        for neuron, round_trip in peers:
            found.append(await _with(dendrite, neuron, round_trip))
            if sum(not one.problem for one in found) == PEERS:
                break
    return tuple(found)


async def _with(dendrite: Dendrite, neuron: Neuron, round_trip: float) -> Measured:
    clock, times = asyncio.get_running_loop().time, {}
    try:
        for up, down in ((SPEED_BYTES, 0), (0, SPEED_BYTES)):
            seconds = DEADLINE
            for _ in range(TRIES // 2):  # the first opens the connection and its window
                began = clock()
                await _carry(dendrite, neuron, up, down)
                seconds = min(seconds, clock() - began)
                if seconds > WARM:
                    break
            times[up] = max(LEAST, seconds - round_trip)
    except UnknownRoute:
        return Measured(uid=neuron.uid, problem="its version cannot measure")
    except TransportError as error:
        return Measured(uid=neuron.uid, problem=str(error))
    return Measured(uid=neuron.uid, up=8 * SPEED_BYTES / times[SPEED_BYTES], down=8 * SPEED_BYTES / times[0])


async def _carry(dendrite: Dendrite, neuron: Neuron, up: int, down: int) -> None:
    if neuron.endpoint is None:
        raise ValueError(f"uid {neuron.uid} serves no axon")
    noise = torch.randint(256, (1, up), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    await dendrite.call(
        neuron.endpoint.url,
        neuron.hotkey,
        Speed(up=up, down=down),
        {"data": noise},
        reply=Sped,
        reply_specs=Sped.specs,
        max_reply_bytes=HEADER_LIMIT + down,
        deadline=DEADLINE,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """What a stage sends, and takes in, of every microbatch, at the pace at which this machine computes."""

    bytes: int
    seconds: float
    """Between two microbatches."""

    @property
    def rate(self) -> float:
        """Bits per second."""
        return 8 * self.bytes / self.seconds

    @classmethod
    def of(cls, manifest: Manifest, work: Work, card: Card | None, cores: float) -> Crossing | None:
        """None of a card whose speed is not known, and where nothing crosses."""
        flops = CPU_FLOPS * cores if card is None else _flops(card)
        if flops is None or manifest.swarm.stages == 1:
            return None
        boundary = boundary_bytes(
            manifest.model.config(),
            tokens=manifest.tokens_per_microbatch,
            itemsize=WIRE_DTYPES[manifest.model.wire_dtype].itemsize,
        )
        between = manifest.swarm.stages > 2  # forward to one side, backward to the other
        return cls(bytes=(1 + between) * boundary, seconds=work.unit_flops / flops)


def _flops(card: Card) -> float | None:
    called = card.name.lower().replace(" ", "")
    return next((device.flops for device in DEVICES.values() if device.name.split("-")[0] in called), None)


def check_bandwidth(
    measured: Sequence[Measured], why: str, crossing: Crossing | None, options: DoctorOptions
) -> Finding:
    """`why` nothing was measured, empty if it was tried."""
    sound = [one for one in measured if not one.problem]
    if not sound:
        said = "; ".join(f"uid {one.uid}: {one.problem}" for one in measured[:3])
        return skipped(
            "bandwidth", why or f"no peer measured ({said})", "any speed test, and give --uplink what it says"
        )
    up, down = max(one.up for one in sound), max(one.down for one in sound)
    uids = ", ".join(str(one.uid) for one in sound)
    found = f"{up / 1e6:,.1f} Mbit/s up and {down / 1e6:,.1f} down, with uid {uids} in {size(SPEED_BYTES)} each way"
    if crossing is not None:
        found += (
            f"; a stage here moves {size(crossing.bytes)} each way per microbatch of {duration(crossing.seconds)}: "
            f"{crossing.rate / 1e6:,.1f} Mbit/s"
        )
        if min(up, down) < crossing.rate:
            line = f"a line with {crossing.rate / 1e6:,.0f} Mbit/s each way or more, or a run with a narrower boundary"
            return warn("bandwidth", f"{found}, so the line would hold it up", line)
    if up < ENOUGH * options.uplink:
        return warn("bandwidth", f"{found}; --uplink says {options.uplink / 1e6:g}", f"--uplink {int(up / 1e6)}mbit")
    return ok("bandwidth", found)
