"""The run manifest: everything a coordinator would decide, fixed in one TOML file.

The manifest's identity is the SHA-256 of its bytes (`sha256sum manifest.toml` is the check anyone can do). The
authority, a registered hotkey, publishes that hash on chain; a node refuses a manifest whose hash is another one.
All that differs between two runs stands here, resolved to plain numbers, so that two nodes with equal bytes compute
the same roster, the same data assignment, the same merge and the same scores.

The authority's commitment is one fixed layout of 76 bytes: magic(4) activation_block(8) manifest(32) previous(32).
"""

from __future__ import annotations

import hashlib
import struct
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.optimizer import Kind, OptimizerConfig, OuterConfig, Schedule
from subnet.space import FIELD_LIMIT, charge
from subnet.swarm.butterfly import MOST_REPLICAS
from subnet.swarm.record import MAX_HAVE

Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class ManifestError(Exception):
    """The manifest cannot be used: one line with the value, the limit and the remedy."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RunSection(_Section):
    """Which run this is, where, and who may change it."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    netuid: Annotated[int, Field(ge=0, le=65535)]
    authority: str
    """ss58 hotkey whose commitment names this manifest."""
    activation_block: Annotated[int, Field(ge=0)]
    """First block at which the run may gather its roster."""
    seed: int
    """Seeds weights and data order. Everything judged by chance takes a block hash instead."""


_FORMS: dict[BoundaryForm, Literal["none", "a", "b", "t"]] = {
    BoundaryForm.NONE: "none",
    BoundaryForm.A: "a",
    BoundaryForm.B: "b",
    BoundaryForm.T: "t",
}


class ModelSection(_Section):
    vocab: Positive
    hidden: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    ffn: Positive
    context: Positive
    rope_base: float
    norm_eps: float
    boundary_form: Literal["none", "a", "b", "t"]
    boundary_width: Annotated[int, Field(ge=0)]
    boundary_rank: Annotated[int, Field(ge=0)]
    wire_dtype: Literal["float32", "bfloat16"]
    """Element type of what crosses a boundary; the stages themselves compute in float32 on a CPU."""

    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab=self.vocab,
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            ffn=self.ffn,
            context=self.context,
            rope_base=self.rope_base,
            norm_eps=self.norm_eps,
            boundary=BoundaryConfig(
                form=BoundaryForm(self.boundary_form),
                width=self.boundary_width,
                rank=self.boundary_rank,
            ),
        )

    @classmethod
    def of(cls, config: ModelConfig, *, wire_dtype: Literal["float32", "bfloat16"]) -> Self:
        """Raises `ManifestError` for a boundary that only comparisons use."""
        boundary = config.boundary
        if boundary.form not in _FORMS or boundary.pairs:
            raise ManifestError(
                f"boundary form '{boundary.form}' with {boundary.pairs} rows of pairs is there for comparisons: take "
                f"one of {', '.join(_FORMS.values())} without pairs"
            )
        return cls(
            vocab=config.vocab,
            hidden=config.hidden,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            ffn=config.ffn,
            context=config.context,
            rope_base=config.rope_base,
            norm_eps=config.norm_eps,
            boundary_form=_FORMS[boundary.form],
            boundary_width=boundary.width,
            boundary_rank=boundary.rank,
            wire_dtype=wire_dtype,
        )


class SwarmSection(_Section):
    stages: Positive
    replicas: Annotated[int, Field(gt=0, le=64)]
    """Replicas per stage that must be there before round 0 begins; 64 is what the have-bitmap holds."""
    gather_blocks: Positive
    """While gathering, the roster is tried at every block `activation_block + k * gather_blocks`."""
    lane: Positive
    """Microbatches of a head that take the same replicas before these are drawn anew: few mix pathways soon, many keep
    pipelines evenly filled (`subnet.swarm.routing`)."""


class ShardSection(_Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=128)]
    sha256: Sha256Hex
    dtype: Literal["uint16", "uint32"]


class DataSection(_Section):
    batch: Positive
    """Sequences in one microbatch."""
    sequence: Positive
    """Tokens in one sequence."""
    samples_per_round: Positive
    """Sample ids set aside for each round, shared by its heads; a head that used its part waits for the next round."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)]
    """Share of the tokens kept for validation."""
    validation_batches: Positive
    shards: Annotated[list[ShardSection], Field(min_length=1)]


class OptimizerSection(_Section):
    kind: Kind
    lr: Annotated[float, Field(gt=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    eps: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    schedule: Schedule
    steps: Annotated[int, Field(ge=0)]
    """Local steps of one replica after which the rate has come down; not used by schedule `constant`."""
    cooldown: Fraction
    """Share of them in which `wsd` and `wsd-sqrt` come down."""
    floor: Annotated[float, Field(ge=0, le=1)]
    """Share of `lr` to which the rate comes down."""
    clip: Annotated[float, Field(ge=0)]
    accumulation: Positive
    """Microbatches in one local step of one replica."""
    outer_lr: Annotated[float, Field(gt=0)]
    outer_momentum: Annotated[float, Field(ge=0, lt=1)]

    def inner(self) -> OptimizerConfig:
        return OptimizerConfig(
            kind=self.kind,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            steps=self.steps,
            cooldown=self.cooldown,
            floor=self.floor,
            clip=self.clip,
        )

    @classmethod
    def of(cls, inner: OptimizerConfig, *, accumulation: int, outer: OuterConfig) -> Self:
        return cls(
            kind=inner.kind,
            lr=inner.lr,
            beta1=inner.betas[0],
            beta2=inner.betas[1],
            eps=inner.eps,
            weight_decay=inner.weight_decay,
            warmup_steps=inner.warmup_steps,
            schedule=inner.schedule,
            steps=inner.steps,
            cooldown=inner.cooldown,
            floor=inner.floor,
            clip=inner.clip,
            accumulation=accumulation,
            outer_lr=outer.lr,
            outer_momentum=outer.momentum,
        )

    def outer(self) -> OuterConfig:
        return OuterConfig(lr=self.outer_lr, momentum=self.outer_momentum)


class MergeSection(_Section):
    """What a merge sends and how."""

    codec: Literal["topk2bit", "int8", "bf16"]
    """`topk2bit` goes to everybody (all-gather) with error feedback; the others through the pair-shard butterfly."""
    decay: Annotated[float, Field(gt=0, le=1)]
    """What is left per round of a contribution that error feedback holds back."""
    clip: Annotated[float, Field(ge=1)]
    """Times the lower median of a stage's norms that a contribution may have; what is larger is scaled down to it."""


class RoundSection(_Section):
    """Deadlines of a round, in blocks after its first block (design: §8, the chain is the coordinator).

    With `merge` beyond `length` a round's merge goes on while the next round trains.
    """

    count: Annotated[int, Field(ge=0)]
    """Rounds in the run; 0 means without end."""
    close: Positive
    """Stages compute nothing more of this round after this block. Heads stop starting microbatches early enough, by
    their own measure, that what is in flight is back by then; what is not is reported lost."""
    cut: Positive
    """Payload and evidence roots must be on chain."""
    have: Positive
    """Bitmaps of the payloads each replica holds must be on chain."""
    merge: Positive
    """Digests of merged shards must be on chain; the new public state is taken over from here on."""
    length: Positive
    """The next round begins."""
    linger: Positive
    """After the last round miners still serve evidence for this many blocks."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        marks = (self.close, self.cut, self.have, self.merge)
        if any(a >= b for a, b in pairwise(marks)):
            raise ValueError(f"round deadlines must rise: close < cut < have < merge, got {marks}")
        if not self.close <= self.length:
            raise ValueError(f"round.close {self.close} is after round.length {self.length}: lower it")
        if not self.merge < self.length + self.close:
            raise ValueError(
                f"round.merge {self.merge} is not before the next round's close, {self.length + self.close}: "
                "lower it or lengthen the round"
            )
        return self

    @property
    def overlapped(self) -> bool:
        """Whether a round's merge goes on while the next round trains."""
        return self.merge > self.length


class AuditSection(_Section):
    """What is audited and how hard (design: §9)."""

    slot: Positive
    """Blocks in a slot: windows whose heads were acknowledged in one are picked by one seed."""
    grace: Positive
    """Blocks before a slot's end from which windows are given to the next one: what a push and finality take."""
    seed_delay: Positive
    """Blocks after a slot's end whose hash is its seed: nobody knows it when the heads are acknowledged."""
    windows: Annotated[float, Field(gt=0)]
    """Windows picked per miner and slot, on average: 0.1 is one window in one slot of ten."""
    readers: Annotated[float, Field(gt=0)]
    """Validators that look into a picked window, on average: each into its stake's part of this, by its secret. Of a
    round's first window all do, because nobody has to fetch its weights."""
    share: Fraction
    """Units replayed, in sum over validators, as a share of a miner's units of the round; each validator replays its
    stake's part of that, and at least one per miner and round."""
    steps: Fraction
    """Of a miner's picked windows, those whose whole gradient is replayed, in sum over validators."""
    tolerance: Fraction
    """Largest accepted error of a token's increment, relative to the increment (99th percentile over tokens), and of a
    step's gradient."""
    report: Positive
    """Blocks after CUT by which validators serve their reports of the round."""
    false_convictions: Fraction
    """Bound on the probability that an honest miner is convicted in a year, over all validators."""


class ScoreSection(_Section):
    rounds: Positive
    """Scores are means over this many closed rounds; a conviction costs as many."""
    burn: Annotated[float, Field(ge=0, lt=1)]
    """Share of the weight that goes to the burn uid, the subnet owner's."""
    scarcity: Annotated[float, Field(ge=1, le=1.25)]
    """Largest premium of the stages that have fewer replicas than others."""


class Manifest(_Section):
    """A whole run. Build it with `Manifest.load(path)`; `digest` is its identity."""

    version: Literal[1]
    run: RunSection
    model: ModelSection
    swarm: SwarmSection
    data: DataSection
    optimizer: OptimizerSection
    merge: MergeSection
    round: RoundSection
    audit: AuditSection
    score: ScoreSection

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.model.config()
        self.optimizer.inner()
        if self.merge.codec == "topk2bit" and self.optimizer.outer_momentum != 0:
            raise ValueError(
                f"optimizer.outer_momentum is {self.optimizer.outer_momentum}, but codec topk2bit has error feedback "
                "in its place: set it to 0 or choose codec int8 or bf16"
            )
        if self.swarm.replicas > self.most_replicas:
            raise ValueError(
                f"swarm.replicas is {self.swarm.replicas}, a merge with codec {self.merge.codec} takes "
                f"{self.most_replicas} per stage: lower it or choose codec topk2bit"
            )
        if self.data.sequence > self.model.context:
            raise ValueError(
                f"data.sequence {self.data.sequence} is longer than model.context {self.model.context}: lower it"
            )
        if self.swarm.stages > self.model.layers:
            raise ValueError(
                f"swarm.stages {self.swarm.stages} is more than model.layers {self.model.layers}: lower swarm.stages"
            )
        return self

    @property
    def most_replicas(self) -> int:
        """What a stage may have: as many as a have-bitmap has bits, or a record has room for the shards of."""
        return MAX_HAVE if self.merge.codec == "topk2bit" else MOST_REPLICAS

    @property
    def tokens_per_microbatch(self) -> int:
        return self.data.batch * self.data.sequence

    def samples(self, number: int) -> range:
        """The sample ids that round `number`'s heads share."""
        quota = self.data.samples_per_round
        return range(number * quota, (number + 1) * quota)

    def round_start(self, first_block: int, number: int) -> int:
        """First block of round `number`, given the first block of round 0."""
        return first_block + number * self.round.length

    def to_bytes(self) -> bytes:
        return tomli_w.dumps(self.model_dump(mode="json")).encode()

    def write(self, path: Path) -> LoadedManifest:
        """Write the file that others load. Its bytes, not its content, are what the hash is taken of."""
        raw = self.to_bytes()
        path.write_bytes(raw)
        return LoadedManifest(self, hashlib.sha256(raw).digest())


@dataclass(frozen=True, slots=True)
class LoadedManifest:
    """A manifest with the digest of the bytes it was read from (32 bytes)."""

    manifest: Manifest
    digest: bytes

    @property
    def run_id(self) -> bytes:
        """The first 8 bytes of the digest: what records and messages carry."""
        return self.digest[:8]


def load_manifest(path: Path) -> LoadedManifest:
    """Read, parse and check a manifest. Raises `ManifestError` with the first problem in one line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"manifest {path} cannot be read ({error.strerror}): check --manifest") from error
    try:
        manifest = Manifest.model_validate(tomllib.loads(raw.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"manifest {path} is not TOML ({error}): take it again from its publisher") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ManifestError(f"manifest {path}: {where}: {first['msg']} (got {first['input']!r:.80})") from error
    return LoadedManifest(manifest, hashlib.sha256(raw).digest())


_ANNOUNCEMENT = struct.Struct("<4sQ32s32s")
_MAGIC = b"ORM1"


@dataclass(frozen=True, slots=True)
class Announcement:
    """What the authority commits on chain: which manifest is in force, from which block, and what it replaces."""

    activation_block: int
    manifest: bytes
    previous: bytes = bytes(32)

    def encode(self) -> bytes:
        return _ANNOUNCEMENT.pack(_MAGIC, self.activation_block, self.manifest, self.previous)

    @classmethod
    def decode(cls, raw: bytes) -> Announcement | None:
        """The announcement in `raw`, or None when these bytes are something else."""
        if len(raw) != _ANNOUNCEMENT.size or not raw.startswith(_MAGIC):
            return None
        _, block, manifest, previous = _ANNOUNCEMENT.unpack(raw)
        return cls(block, manifest, previous)


def check_announced(loaded: LoadedManifest, committed: bytes | None) -> None:
    """Refuse a manifest that is not the one its authority has on chain. Raises `ManifestError`."""
    announcement = Announcement.decode(committed) if committed is not None else None
    authority = loaded.manifest.run.authority
    if announcement is None:
        raise ManifestError(f"authority {authority} has published no manifest on chain: check --netuid and --network")
    if announcement.manifest != loaded.digest:
        raise ManifestError(
            f"manifest {loaded.digest.hex()[:16]} is not the one on chain ({announcement.manifest.hex()[:16]}): "
            "take the current manifest from its publisher and pass it with --manifest"
        )


RECORD_BYTES = 108
"""Size of a record (`subnet.swarm.record`)."""


def space_per_epoch(manifest: Manifest, tempo: int) -> int:
    """The most bytes that the records of one miner can count as in an epoch of `tempo` blocks.

    At most five a round, each of 108 bytes and counted as such (the chain's least is 100): READY until `close`, the
    roots until `cut`, the bitmap until `have`, with the butterfly the shard digests until `merge`, in a second field of
    at most 128 bytes, and DONE before the next record. That is 108 * 4 = 432 bytes a round with the all-gather and
    108 * 5 + 128 = 668 with the butterfly. An epoch of 360 blocks holds 4 rounds of 90 blocks, 3.6 of 100 or 3 of 120,
    and as a record may come at any time until its mark, one more at the edge: 4 * 668 + 236 = 2,908 bytes for rounds of
    90 blocks, of the 3,100 that the chain allows. Where the merge overlaps the next round, that round's READY may come
    at the same edge: 3,016 bytes.

    The value is exact: the largest sum over all offsets of the epoch's first block within a round, where a record
    counts if some block in which it may land is in the epoch.
    """
    return _largest_sum(_landings(manifest), manifest.round.length, tempo)


def check_space(manifest: Manifest, tempo: int, limit: int) -> None:
    """Refuse a manifest whose records the chain would not take. Raises `ManifestError`.

    tempo: blocks between the subnet's epochs. limit: bytes per hotkey and epoch, as the chain has it
    (`BittensorChain.space`).
    """
    needed = space_per_epoch(manifest, tempo)
    if needed <= limit:
        return
    landings, length = _landings(manifest), manifest.round.length
    if sum(landing.charge for landing in landings) > limit:
        remedy = "no round is long enough, choose another subnet or codec topk2bit"
    else:
        while _largest_sum(landings, length, tempo) > limit:
            length += 1
        remedy = f"raise round.length to {length}"
    raise ManifestError(
        f"records of rounds of {manifest.round.length} blocks count as up to {needed} bytes in an epoch of {tempo} "
        f"blocks, more than the {limit} that the chain takes from a hotkey: {remedy}"
    )


@dataclass(frozen=True, slots=True)
class _Landing:
    """When a record of a round may land, in blocks after the round's first, and what it counts as."""

    first: int
    last: int
    charge: int


def _landings(manifest: Manifest) -> list[_Landing]:
    marks = manifest.round
    landings = [
        _Landing(0, marks.close, charge(RECORD_BYTES)),
        _Landing(marks.close + 1, marks.cut, charge(RECORD_BYTES)),
        _Landing(marks.cut + 1, marks.have, charge(RECORD_BYTES)),
    ]
    if manifest.merge.codec == "topk2bit":
        return [*landings, _Landing(marks.have + 1, max(marks.merge, marks.length), charge(RECORD_BYTES))]
    shards = _Landing(marks.have + 1, marks.merge, charge(RECORD_BYTES, FIELD_LIMIT))
    return [*landings, shards, _Landing(marks.merge + 1, marks.length + marks.close, charge(RECORD_BYTES))]


def _largest_sum(landings: list[_Landing], length: int, tempo: int) -> int:
    """The largest sum of what can land within `tempo` blocks, over their offsets in a round of `length` blocks."""

    def rounds(landing: _Landing, first: int) -> int:
        """How many rounds have a block of `landing` among the blocks first .. first + tempo - 1."""
        return (first + tempo - 1 - landing.first) // length - (first - 1 - landing.last) // length

    return max(sum(landing.charge * rounds(landing, first) for landing in landings) for first in range(length))
