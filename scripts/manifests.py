"""The manifest of a local run: presets turned into the plain numbers that a manifest fixes."""

from __future__ import annotations

from model.config import preset
from model.optimizer import BETAS, Kind, OptimizerConfig, OuterConfig, nano_optimizer
from scripts.data.local import RunData
from scripts.options import Codec
from subnet.manifest import (
    AuditSection,
    DataSection,
    Manifest,
    MergeSection,
    ModelSection,
    OptimizerSection,
    RoundSection,
    RunSection,
    ScoreSection,
    ShardSection,
    SwarmSection,
)

DECAY = 0.95
CLIP = 2.0
"""A replica may work twice as much as the median of its stage, or bring what a void round left over."""
LAST_STEP_BLOCKS = 2
"""With overlap training ends so many blocks before the round: a unit and a step in flight have to end somewhere."""

RECORD_BLOCKS = 4
"""Without overlap the record of the new state still has to be final before the next round."""

SLOTS = 2
"""In a round."""

LANE = 4
"""Microbatches: a short round has a few dozen per head, and still shall mix them."""
BATCH = 8
"""Sequences in a microbatch."""
VALIDATION_BATCHES = 8
ACCUMULATION = 2
MEAN = OuterConfig(lr=1.0, momentum=0.0)
"""The outer step takes over the mean of what replicas have become."""
TOLERANCE = 0.02
"""Widest tolerance: 0.02 separates a bf16 boundary's rounding from work in a coarser arithmetic."""

SMALL = ("pico", "nano")


def inner_of(model: str, kind: Kind | None = None) -> OptimizerConfig:
    """What trains a preset: Muon the small ones, NAdam the others, or what `kind` says."""
    if model in SMALL:
        return nano_optimizer(kind or "muon")
    kind = kind or "nadam"
    return OptimizerConfig(kind=kind, lr=2e-4, betas=BETAS[kind], weight_decay=0.1, warmup_steps=200, clip=1.0)


def local_manifest(
    *,
    model: str,
    stages: int,
    replicas: int,
    rounds: int,
    round_blocks: int,
    seed: int,
    authority: str,
    netuid: int,
    activation_block: int,
    phase_blocks: int,
    data: RunData,
    overlap: bool,
    codec: Codec,
    optimizer: Kind | None = None,
    accumulation: int = ACCUMULATION,
) -> Manifest:
    """A manifest for a swarm on one machine.

    A round begins every `round_blocks` blocks; the phases of its merge (CUT, HAVE, MERGE) have `phase_blocks` each.
    With `overlap` they lie in the next round, without it at the end of the round itself, but for
    what the record of the new state takes. `optimizer` is by default the preset's.
    """
    config = preset(model)
    inner = inner_of(model, optimizer)
    marks = marks_of(rounds, round_blocks, phase_blocks, overlap=overlap)
    return Manifest(
        version=1,
        run=RunSection(
            name=f"localnet-{model}", netuid=netuid, authority=authority, activation_block=activation_block, seed=seed
        ),
        model=ModelSection.of(config, wire_dtype="bfloat16"),
        swarm=SwarmSection(stages=stages, replicas=replicas, gather_blocks=4, lane=LANE),
        data=DataSection(
            batch=BATCH,
            sequence=config.context,
            samples_per_round=2048,
            held_out=data.held_out,
            validation_batches=VALIDATION_BATCHES,
            shards=[ShardSection(name=entry.name, sha256=entry.sha256, dtype=entry.dtype) for entry in data.entries],
        ),
        optimizer=OptimizerSection.of(inner, accumulation=accumulation, outer=MEAN),
        merge=MergeSection(codec=codec, decay=DECAY, clip=CLIP),
        round=marks,
        audit=AuditSection(
            slot=(marks.close + phase_blocks) // SLOTS + 1,
            grace=phase_blocks,
            seed_delay=4,
            windows=1.0,
            readers=2.0,
            share=0.03,
            steps=0.5,
            tolerance=TOLERANCE,
            report=2 * phase_blocks,
            false_convictions=1e-3,
        ),
        score=ScoreSection(rounds=3, burn=0.0, scarcity=1.1),
    )


def marks_of(count: int, length: int, phase: int, *, overlap: bool) -> RoundSection:
    """Deadlines of `count` rounds of `length` blocks whose merges have phases of `phase` blocks."""
    merge = length + 3 * phase if overlap else length - RECORD_BLOCKS
    return RoundSection(
        count=count,
        close=length - LAST_STEP_BLOCKS if overlap else merge - 3 * phase,
        cut=merge - 2 * phase,
        have=merge - phase,
        merge=merge,
        length=length,
        linger=4 * phase,
    )
