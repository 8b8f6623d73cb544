"""The manifest of a local run: presets turned into the plain numbers that a manifest fixes."""

from __future__ import annotations

from model.config import preset
from model.corpus import CorpusFiles
from subnet.manifest import (
    AuditSection,
    DataSection,
    Manifest,
    ModelSection,
    OptimizerSection,
    RoundSection,
    RunSection,
    ScoreSection,
    ShardSection,
    SwarmSection,
)


LINGER_BLOCKS = 32


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
    corpus: CorpusFiles,
) -> Manifest:
    """A manifest for a swarm on one machine. `round_blocks` is the length of a round in blocks."""
    config = preset(model)
    return Manifest(
        version=1,
        run=RunSection(
            name=f"localnet-{model}", netuid=netuid, authority=authority, activation_block=activation_block, seed=seed
        ),
        model=ModelSection.of(config, wire_dtype="bfloat16"),
        swarm=SwarmSection(stages=stages, replicas=replicas, gather_blocks=4),
        data=DataSection(
            batch=8,
            sequence=config.context,
            samples_per_round=2048,
            held_out=0.05,
            validation_batches=8,
            shards=[ShardSection(name=entry.name, sha256=entry.sha256, dtype=entry.dtype) for entry in corpus.entries],
        ),
        optimizer=OptimizerSection(
            kind="adamw",
            lr=4e-3,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            warmup_steps=10,
            clip=1.0,
            accumulation=2,
            outer_lr=1.0,
            outer_momentum=0.0,
        ),
        round=RoundSection(
            count=rounds,
            close=round_blocks - 24,
            cut=round_blocks - 16,
            have=round_blocks - 8,
            length=round_blocks,
            linger=LINGER_BLOCKS,
        ),
        audit=AuditSection(seed_delay=2, windows=1, units=4, tolerance=0.02),
        score=ScoreSection(rounds=3),
    )
