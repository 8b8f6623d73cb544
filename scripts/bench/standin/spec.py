"""What a stand-in swarm is: its stages and their times, where its nodes are, how long it runs, what dies meanwhile.

A node's number is `stage * replicas + replica`. All processes of a swarm read the same file, so they agree on every
hotkey, the roster and the manifest without a chain.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.data import Corpus, ShardEntry, TokenShard
from scripts.manifests import CLIP, DECAY, MEAN, TOLERANCE, inner_of
from subnet.manifest import (
    AuditSection,
    DataSection,
    LoadedManifest,
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
from subnet.swarm.routing import LANE
from subnet.transport.shaping import Link

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]

SAMPLES = 1 << 20
"""In the one round that a stand-in swarm plays: nobody uses them up."""
VOCAB = 256
WINDOWS = 64
"""Sequences of the corpus, per row of a microbatch."""


class SpecError(Exception):
    """The file is no stand-in swarm: one line with the field, its value and what it must be."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Boundary(_Section):
    """What crosses a boundary for one microbatch: (batch, sequence, width) in bf16."""

    batch: Count
    sequence: Count
    width: Count

    @property
    def bytes(self) -> int:
        return 2 * self.batch * self.sequence * self.width


class Place(_Section):
    """Where a node listens, and the link it has to all others (None: none is emulated)."""

    host: str
    port: Annotated[int, Field(gt=0, le=65535)]
    link: Link | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"


class Kill(_Section):
    """A node ends as SIGKILL ends one, `at` seconds after the start; a fresh one takes its place after a while."""

    node: Annotated[int, Field(ge=0)]
    at: Seconds
    back_after: Seconds


class Steady(_Section):
    """Heads drive without end; what is done between `warm_up` and `warm_up + seconds` counts."""

    warm_up: Seconds
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Steps(_Section):
    """Each head starts `microbatches` and waits for all; of such steps `warm_up` do not count, then `count` do."""

    warm_up: Count
    microbatches: Count
    count: Count


class Spec(_Section):
    """One swarm and one run of it."""

    stages: Annotated[int, Field(ge=2)]
    replicas: Count
    forward: list[Seconds]
    """Per stage: how long a forward holds the compute thread; at the tail its part of the unit."""
    backward: list[Seconds]
    step: Seconds = 0.0
    """How long an optimizer step holds it."""
    accumulation: Count
    boundary: Boundary
    nodes: list[Place]
    seed: int = 0
    kills: list[Kill] = []
    steady: Steady | None = None
    steps: Steps | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, wanted in (
            ("forward", self.stages),
            ("backward", self.stages),
            ("nodes", self.stages * self.replicas),
        ):
            found = len(getattr(self, name))
            if found != wanted:
                raise ValueError(f"{name} has {found} entries, {wanted} are needed: one each")
        if (self.steady is None) == (self.steps is None):
            raise ValueError("give exactly one of steady and steps")
        if self.kills and self.steady is None:
            raise ValueError("kills need steady: a step that lost its head would not end")
        for kill in self.kills:
            if kill.node >= len(self.nodes):
                raise ValueError(f"kills names node {kill.node} of {len(self.nodes)}: name one that is there")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a file. Raises `SpecError`."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise SpecError(f"{path} cannot be read ({error.strerror}): check SPEC") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "spec"
            raise SpecError(f"{path}: {where}: {first['msg']} (got {first['input']!r:.80})") from error

    # -- what follows from it -------------------------------------------------------------------------------------

    @property
    def model(self) -> ModelConfig:
        """The smallest model with these stages and this boundary, as the manifest names it."""
        return ModelConfig(
            vocab=VOCAB,
            hidden=2 * self.boundary.width,
            layers=self.stages,
            heads=1,
            kv_heads=1,
            ffn=1,
            context=self.boundary.sequence,
            boundary=BoundaryConfig(form=BoundaryForm.A, width=self.boundary.width),
        )

    def manifest(self) -> LoadedManifest:
        """The same bytes in every process."""
        tokens = self._tokens().tobytes()
        manifest = Manifest(
            version=1,
            run=RunSection(name="stand-in", netuid=9, authority="5" + "C" * 47, activation_block=0, seed=self.seed),
            model=ModelSection.of(self.model, wire_dtype="bfloat16"),
            swarm=SwarmSection(stages=self.stages, replicas=self.replicas, gather_blocks=1, lane=LANE),
            data=DataSection(
                batch=self.boundary.batch,
                sequence=self.boundary.sequence,
                samples_per_round=SAMPLES,
                held_out=0.1,
                validation_batches=1,
                shards=[ShardSection(name="tokens.bin", sha256=hashlib.sha256(tokens).hexdigest(), dtype="uint16")],
            ),
            optimizer=OptimizerSection.of(inner_of("100b"), accumulation=self.accumulation, outer=MEAN),
            merge=MergeSection(codec="topk2bit", decay=DECAY, clip=CLIP),
            round=RoundSection(count=1, close=11, cut=12, have=13, merge=14, length=14, linger=1),
            audit=AuditSection(
                slot=8,
                grace=1,
                seed_delay=1,
                windows=1.0,
                readers=2.0,
                share=0.03,
                steps=0.5,
                tolerance=TOLERANCE,
                report=4,
                false_convictions=1e-3,
            ),
            score=ScoreSection(rounds=3, burn=0.0, scarcity=1.1),
        )
        return LoadedManifest(manifest, hashlib.sha256(manifest.to_bytes()).digest())

    def corpus(self) -> Corpus:
        entry = self.manifest().manifest.data.shards[0]
        shard = TokenShard(ShardEntry(name=entry.name, sha256=entry.sha256, dtype=entry.dtype), self._tokens())
        return Corpus([shard], seed=self.seed, batch=self.boundary.batch, tokens=self.boundary.sequence, held_out=0.1)

    def _tokens(self) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
        count = WINDOWS * self.boundary.batch * self.boundary.sequence + 1
        return np.random.default_rng(self.seed).integers(VOCAB, size=count, dtype=np.uint16)
