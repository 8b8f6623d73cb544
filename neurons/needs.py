"""What a node needs of its machine at least, as arithmetic over the manifest: below this it cannot work.

Whether a miner can use more is the operator's affair (`--ring`, `--evidence-disk`); `orion doctor` says what it would
gain. Sizes are bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from model.accounting import stage_moments, stage_parameters
from model.devices import Device
from model.layout import Layout
from model.memory import RESERVE, StageMemory, Units, least_recompute, mean_open
from model.split import StagePlan
from neurons.drive import DEPTH_LIMIT_PER_STAGE
from neurons.machine import Card, Room
from neurons.ring import least_ring, picked_bytes
from subnet.manifest import Manifest
from subnet.messages import Shapes
from subnet.quantities import written
from subnet.transport.dendrite import STREAMS
from subnet.trust.quota import MOST_VALIDATORS, ROUNDS_KEPT, Sizes

VALUE = 4
"""Bytes of a value: nodes compute in fp32, on a card too."""
PROCESS = 500_000_000
"""Of a node that holds nothing yet: interpreter, torch, SDK."""
CHECKPOINTS = 3
"""Rounds that are kept of a stage's public state, and of what a replica alone has."""
FILES_ALONE = 128
"""Open files of a node without neighbours: libraries, shards, logs, the chain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Of one stage's miner."""

    stage: int
    card: StageMemory | None
    """On a GPU; None where there is none and the stage lies in host memory too."""
    weights: int
    """Host memory of the stage itself, where it computes there."""
    ring: int
    """Host memory of what audits may ask for, at least."""
    evidence: int
    """Disk of what seeds pick, at least."""
    checkpoints: int
    """Disk."""
    files: int

    @property
    def host(self) -> int:
        return PROCESS + self.weights + self.ring

    @property
    def disk(self) -> int:
        return self.evidence + self.checkpoints


def miner_needs(manifest: Manifest, plan: StagePlan, layout: Layout, card: Card | None) -> Needs:
    """Of a miner of stage `plan`, with this card or without one."""
    sizes = Sizes.of(plan, layout, Shapes.of(manifest))
    slots = -(-manifest.round.length // manifest.audit.slot)
    picked = math.ceil(manifest.audit.windows * slots) * picked_bytes(manifest, plan, layout, sizes)
    cut = 3 * sizes.flat
    public, own = 2 * sizes.flat, sizes.state + 2 * sizes.flat
    memory = stage_on(manifest, plan, card) if card is not None else None
    return Needs(
        stage=plan.index,
        card=memory,
        weights=on_host(manifest, plan) if memory is None else 0,
        ring=least_ring(manifest, plan, layout),
        evidence=ROUNDS_KEPT * (cut + picked),
        checkpoints=CHECKPOINTS * (public + own),
        files=least_files(manifest),
    )


def stage_on(manifest: Manifest, plan: StagePlan, card: Card) -> StageMemory:
    """The stage on a card with what is free of its memory, with the least recompute that fits."""
    return _least(manifest, plan, _device(card.name, card.free))


def on_host(manifest: Manifest, plan: StagePlan) -> int:
    """The stage in host memory, recomputing all it can."""
    return _in_memory(manifest, plan, 0).total


def fitted(manifest: Manifest, plan: StagePlan, layout: Layout, *, memory: int, card: Card | None) -> StageMemory:
    """How the stage is held with what is free now: on the card, or in host memory beside what evidence takes at least.

    Args:
        memory: free in the host.
    """
    if card is not None:
        return stage_on(manifest, plan, card)
    return _in_memory(manifest, plan, max(0, memory - PROCESS - least_ring(manifest, plan, layout)))


def _in_memory(manifest: Manifest, plan: StagePlan, free: int) -> StageMemory:
    """In host memory, where nothing of what is reserved on a card is needed."""
    found = _least(manifest, plan, _device("host", free + int(RESERVE)))
    return replace(found, reserve=0, card=free)


def _least(manifest: Manifest, plan: StagePlan, card: Device) -> StageMemory:
    return least_recompute(
        manifest.model.config(),
        plan,
        card,
        _units(manifest),
        open_units=_open_units(manifest, plan),
        most_graphs=manifest.optimizer.accumulation,
    )


def validator_host(manifest: Manifest, plans: tuple[StagePlan, ...]) -> int:
    """Host memory of a validator: all stages' weights, a copy of the largest stage that it replays, and its moments."""
    config = manifest.model.config()
    parameters = [stage_parameters(config, plan) for plan in plans]
    moments = max(stage_moments(config, plan, manifest.optimizer.kind) for plan in plans)
    return PROCESS + VALUE * (sum(parameters) + 2 * max(parameters) + moments)


def least_files(manifest: Manifest) -> int:
    """Open files of a node that talks to the stages beside its own, to siblings and to every validator there can be."""
    return FILES_ALONE + 2 * STREAMS * 3 * manifest.swarm.replicas + 2 * MOST_VALIDATORS


def smaller_batch(manifest: Manifest, plan: StagePlan, card: Card) -> int | None:
    """Sequences of a microbatch with which the stage would fit the card; None if no number does."""
    batch = manifest.data.batch // 2
    while batch:
        data = manifest.data.model_copy(update={"batch": batch})
        if stage_on(manifest.model_copy(update={"data": data}), plan, card).free >= 0:
            return batch
        batch //= 2
    return None


def shortfall(needs: Needs, found: Room, *, out: str, checkpoints_here: bool) -> str | None:
    """What keeps this machine from holding the stage: one line with the value, the limit and the remedy; None if
    nothing does."""
    memory = needs.card
    if memory is not None and memory.free < 0:
        return (
            f"stage {needs.stage} needs {written(memory.total)} of the card's memory with full recompute, and "
            f"{written(memory.card)} are free: stop other programs on it, take a card with more, or join a run with "
            "more stages"
        )
    if needs.host > found.memory:
        return (
            f"stage {needs.stage} needs {written(needs.host)} of host memory ({written(needs.ring)} of it for --ring), "
            f"and {written(found.memory)} are free: stop other programs, or take a machine with more"
        )
    disk = needs.evidence + (needs.checkpoints if checkpoints_here else 0)
    if disk > found.disk:
        return (
            f"stage {needs.stage} needs {written(disk)} of disk for evidence and checkpoints, and "
            f"{written(found.disk)} are free under {out}: make room, give --out another disk, or --checkpoints a store"
        )
    return None


def _units(manifest: Manifest) -> Units:
    return Units(
        batch=manifest.data.batch,
        sequence=manifest.data.sequence,
        value_bytes=VALUE,
        moment_bytes=VALUE,
        optimizer=manifest.optimizer.kind,
    )


def _open_units(manifest: Manifest, plan: StagePlan) -> int:
    stages = manifest.swarm.stages
    return max(1, math.ceil(mean_open(DEPTH_LIMIT_PER_STAGE * stages, stages, plan.index)))


def _device(name: str, memory: int) -> Device:
    """A card of which only the memory matters."""
    return replace(_NONE, name=name, memory=float(memory))


_NONE = Device(name="none", peak=0.0, memory=0.0, bandwidth=0.0, efficiency=0.0, host=0.0)
