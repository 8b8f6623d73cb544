"""What nodes say to each other: every message, what tensors travel beside it, and how large they may be.

A push carries one boundary tensor; its answer is the consumer's receipt. Everything else is a fetch of something
whose hash already stands on chain or in a closed ledger, so a wrong answer is found by the reader, not trusted.
Shapes are functions of the manifest (`Shapes`), so a receiver knows them before it reads a byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from model.config import ModelConfig
from model.split import StagePlan
from subnet.manifest import Manifest
from subnet.swarm.content import LEAF_BYTES as HASH_BYTES
from subnet.swarm.public import PARTS, Part, pieces_of, span_of
from subnet.swarm.snapshot import SNAPSHOT_LIMIT
from subnet.transport.knock import Outcome
from subnet.transport.synapse import Synapse, TensorSpec
from subnet.trust.heads import ACK_BYTES, HEAD_BYTES
from subnet.trust.ledger import CLOSING_BYTES, LEAF_BYTES, MAX_LOSS
from subnet.trust.tree import PIECE_BYTES, PROOF_LIMIT

RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
DigestHex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Round = Annotated[int, Field(ge=0, lt=2**32)]
Sample = Annotated[int, Field(ge=0, lt=2**63)]
Hotkey = Annotated[str, Field(min_length=40, max_length=60)]


class RunSynapse(Synapse):
    """Every message names its run and round."""

    run: RunId
    round: Round


class Push(RunSynapse):
    """One microbatch crossing one boundary. `version` is the sender's weight version it was computed with."""

    sample: Sample
    head: Hotkey
    index: Annotated[int, Field(ge=0, lt=2**32)]
    """The microbatch's number within its head's round: with `head`, what routing is a function of."""
    version: Annotated[int, Field(ge=0, lt=2**32)]


class Forward(Push):
    """Tensor `y`: the boundary activation, (B, T, b)."""

    route: ClassVar[str] = "forward"
    again: bool = False
    """It was sent before, by another way: somebody at the next stages may have computed it already."""


class Backward(Push):
    """Tensor `g`: the gradient of the receiver's forward output, (B, T, b). `loss` is the tail's, passed along."""

    route: ClassVar[str] = "backward"
    loss: Annotated[float, Field(ge=0, le=MAX_LOSS, allow_inf_nan=False)]

    @classmethod
    def of(cls, push: Push, *, version: int, loss: float) -> Self:
        """What answers `push`, computed with weights of `version`."""
        return cls(
            run=push.run,
            round=push.round,
            sample=push.sample,
            head=push.head,
            index=push.index,
            version=version,
            loss=loss,
        )


class Accepted(Synapse):
    """The push counts as delivered. `receipt` is the consumer's signature (ledger.receipt_message), or None if it has
    this microbatch from somebody else and does not use what was sent."""

    receipt: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")] | None


class HolderRequest(RunSynapse):
    """Whether the answering replica has a sample's forward, asked by the stage before that one."""

    route: ClassVar[str] = "holder"
    sample: Sample


class Holder(Synapse):
    """The answer."""

    holds: bool


class InputRequest(RunSynapse):
    """The activation sent forward for a sample, asked for by a replica that takes over a sibling's backward."""

    route: ClassVar[str] = "input"
    sample: Sample


OPEN_LIMIT = 1024
"""Microbatches that a notice may list: more than a head has in flight."""


class Notice(RunSynapse):
    """A head tells a sibling head how far it is, so that the sibling can go on for it when it is gone."""

    route: ClassVar[str] = "notice"
    started: Annotated[int, Field(ge=0, lt=2**32)]
    """It starts no index from this one on before it has said so; announced ahead, so that nothing waits for it."""
    open: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(max_length=OPEN_LIMIT)]
    """Its indices below `started` that are not back."""
    taken: Annotated[list[Sample], Field(max_length=OPEN_LIMIT)]
    """Samples of other heads whose gradient it has."""


class Noted(Synapse):
    """The answer to a notice: which of the caller's samples the answering head has the gradient of."""

    taken: Annotated[list[Sample], Field(max_length=OPEN_LIMIT)]


class LeavesRequest(RunSynapse):
    """The hashes of the pieces of `source`'s payload, from whoever holds them."""

    route: ClassVar[str] = "leaves"
    source: Hotkey


class PayloadLeaves(Synapse):
    """Tensor `leaves`, uint8 (pieces, 32). With `evidence` it hashes to the source's root on chain."""

    evidence: DigestHex


class PayloadRequest(RunSynapse):
    """One piece of `source`'s payload, from whoever holds it; the answer is tensor `data`, uint8 (bytes,)."""

    route: ClassVar[str] = "payload"
    source: Hotkey
    piece: Annotated[int, Field(ge=0, lt=2**32)]


class ShardRequest(RunSynapse):
    """One piece of the encoded mean change of a merged shard, from who has it; the answer is tensor `data`."""

    route: ClassVar[str] = "shard"
    shard: Annotated[int, Field(ge=0, lt=2**32)]
    piece: Annotated[int, Field(ge=0, lt=2**32)]


HEADS_LIMIT = 256
"""Window heads in one push."""
ACKS_LIMIT = 4096
"""Acknowledgements in a closed ledger: of 64 validators in 64 slots."""

SignatureHex = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Heads(RunSynapse):
    """A miner pushes heads of its windows to a validator: tensor `heads`, uint8 (n, HEAD_BYTES), the chain's windows
    number `first` and on. `signature` is its statement over the chain after them (`heads.statement_message`)."""

    route: ClassVar[str] = "heads"
    stage: Annotated[int, Field(ge=0, lt=2**16)]
    first: Annotated[int, Field(ge=0, lt=2**20)]
    count: Annotated[int, Field(gt=0, le=HEADS_LIMIT)]
    digest: DigestHex
    """Of the chain after them."""
    signature: SignatureHex

    def specs(self) -> dict[str, TensorSpec]:
        return {"heads": table(self.count, HEAD_BYTES)}


class Acknowledged(Synapse):
    """The validator's word for all heads so far (`heads.ack_message`); `slot` is the one that is open for it."""

    count: Annotated[int, Field(ge=0, lt=2**20)]
    slot: Annotated[int, Field(ge=0, lt=2**16)]
    signature: SignatureHex


class EvidenceRequest(RunSynapse):
    """The closed ledger of the round."""

    route: ClassVar[str] = "evidence"


class EvidenceTables(Synapse):
    """Tensors `leaves` uint8 (work, LEAF_BYTES), `heads` uint8 (heads, HEAD_BYTES), `acks` uint8 (acks, ACK_BYTES) and
    `closing` uint8 (1, CLOSING_BYTES)."""

    payload: DigestHex
    heads: Annotated[int, Field(ge=0, lt=2**20)]
    acks: Annotated[int, Field(ge=0, le=ACKS_LIMIT)]


class WindowRequest(RunSynapse):
    """The weights at the start of one window, as what they differ by (`subnet.trust.delta`) from the public state that
    `held` rounds are merged into."""

    route: ClassVar[str] = "window"
    version: Annotated[int, Field(ge=0, lt=2**32)]
    held: Round


class WeightsDelta(Synapse):
    """Tensor `delta`, uint8 (1, size)."""

    size: Annotated[int, Field(gt=0, lt=2**40)]

    def specs(self) -> dict[str, TensorSpec]:
        return {"delta": table(1, self.size)}


StatePart = Literal[
    "weights", "optimizer", "next_weights", "next_optimizer", "previous_weights", "closing", "owed", "still_owed"
]
"""The states of a window that its head names, those that the window before ended with where a merge was taken over in
between, and those of the cut that the closing names."""


STATE_PIECES = 64
"""In one request: 4 MiB, so that an answer takes longer than the way there and back."""


class StateRequest(RunSynapse):
    """Pieces of a window's states, with their proofs: `pieces[i]` of `parts[i]`. `version` is the window's, any for the
    states of the cut."""

    route: ClassVar[str] = "state"
    version: Annotated[int, Field(ge=0, lt=2**32)]
    parts: Annotated[list[StatePart], Field(min_length=1, max_length=STATE_PIECES)]
    pieces: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1, max_length=STATE_PIECES)]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.parts) != len(self.pieces):
            raise ValueError(f"{len(self.pieces)} pieces of {len(self.parts)} parts: name one for each")
        return self


class StatePieces(Synapse):
    """In the order asked for, one after the other: tensors `data`, uint8 (1, sum of sizes), and `proof`, uint8 (sum of
    hashes, 32)."""

    sizes: Annotated[list[Annotated[int, Field(gt=0, le=PIECE_BYTES)]], Field(max_length=STATE_PIECES)]
    hashes: Annotated[list[Annotated[int, Field(ge=0, le=PROOF_LIMIT)]], Field(max_length=STATE_PIECES)]

    def specs(self) -> dict[str, TensorSpec]:
        return {"data": table(1, sum(self.sizes)), "proof": table(sum(self.hashes), HASH_BYTES)}


REPORT_LIMIT = 4 << 20
"""Bytes of a validator's report of a round."""


class ReportRequest(RunSynapse):
    """A validator's report of the round: what it audited and found."""

    route: ClassVar[str] = "report"


class ReportReply(Synapse):
    """Tensor `report`, uint8 (1, size): the canonical JSON of `subnet.trust.report.Report`."""

    size: Annotated[int, Field(gt=0, le=REPORT_LIMIT)]
    signature: SignatureHex

    def specs(self) -> dict[str, TensorSpec]:
        return {"report": table(1, self.size)}


class UnitRequest(RunSynapse):
    """The tensors of one unit as they crossed the wire."""

    route: ClassVar[str] = "unit"
    sample: Sample
    backward: bool


class StateTreeRequest(RunSynapse):
    """The leaf hashes of the stage's public state with `round` rounds merged into it.

    Answer: tensors `theta` and `momentum`, uint8 (pieces, 32) each.
    """

    route: ClassVar[str] = "tree"


class StatePieceRequest(RunSynapse):
    """One piece of that state. Answer: tensor `data`, uint8 (n,)."""

    route: ClassVar[str] = "piece"
    part: Part
    piece: Annotated[int, Field(ge=0, lt=2**32)]


class RosterRequest(Synapse):
    """The roster with this digest. Most of the permitted stake says on chain which one is in force."""

    route: ClassVar[str] = "roster"
    run: RunId
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{30}$")]


class RosterSnapshot(Synapse):
    """Tensor `roster`, uint8 (1, size): the encoded roster."""

    size: Annotated[int, Field(gt=0, le=SNAPSHOT_LIMIT)]

    def specs(self) -> dict[str, TensorSpec]:
        return {"roster": table(1, self.size)}


class CallBack(Synapse):
    """Asks to be called back: does an axon of the caller answer at `port` of the address this request comes from?

    The address is not the caller's to name, so nobody can be made to call a third party.
    """

    route: ClassVar[str] = "callback"
    port: Annotated[int, Field(gt=0, lt=2**16)]


class CalledBack(Synapse):
    """What came of it."""

    source: Annotated[str, Field(pattern=r"^[0-9a-f.:]{2,45}$")]
    """IP address that the request came from."""
    outcome: Outcome | None
    """None where nobody was called, because the address is one of the peer's own network."""
    seconds: Annotated[float, Field(ge=0, lt=3600)]
    """Until it came to that."""


SPEED_BYTES = 4 << 20
"""Each way at most: half a second at 80 Mbit/s."""


class Speed(Synapse):
    """A transfer that is only to be timed: tensor `data`, uint8 (1, up), and as much as `down` back."""

    route: ClassVar[str] = "speed"
    up: Annotated[int, Field(ge=0, le=SPEED_BYTES)]
    down: Annotated[int, Field(ge=0, le=SPEED_BYTES)]

    def specs(self) -> dict[str, TensorSpec]:
        return {"data": table(1, self.up)}


class Sped(Synapse):
    """Tensor `data`, uint8 (1, down)."""

    down: Annotated[int, Field(ge=0, le=SPEED_BYTES)]

    def specs(self) -> dict[str, TensorSpec]:
        return {"data": table(1, self.down)}


class Tensors(Synapse):
    """The answer to a fetch of tensors."""


WIRE_LIMIT = 1e4
"""Largest magnitude that may cross a boundary. Beyond it bf16's rounding alone exceeds what a block adds."""

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Shapes:
    """The tensors of every message of one run, by stage."""

    boundary: TensorSpec
    tokens: TensorSpec

    @classmethod
    def of(cls, manifest: Manifest) -> Shapes:
        config: ModelConfig = manifest.model.config()
        batch, sequence = manifest.data.batch, manifest.data.sequence
        return cls(
            boundary=TensorSpec(WIRE_DTYPES[manifest.model.wire_dtype], (batch, sequence, config.boundary_width)),
            tokens=TensorSpec(torch.int64, (batch, sequence)),
        )

    def unit(self, plan: StagePlan, *, backward: bool, sent: bool = True) -> dict[str, TensorSpec]:
        """Tensors served for one unit of a stage: `input`, and `gradient` and `output` where the unit has them; one
        whose gradient could not be `sent` on has no output."""
        specs = {"input": self.tokens if plan.is_first else self.boundary}
        if backward and not plan.is_last:
            specs["gradient"] = self.boundary
        if sent and not (backward and plan.is_first) and not (plan.is_last and not backward):
            specs["output"] = self.boundary
        return specs


def flat(count: int) -> TensorSpec:
    """A stage's weights, one after the other in name order, fp32."""
    return TensorSpec(torch.float32, (count,))


def table(rows: int, row_bytes: int) -> TensorSpec:
    return TensorSpec(torch.uint8, (rows, row_bytes))


def evidence_specs(work: int, heads: int, acks: int) -> dict[str, TensorSpec]:
    return {
        "leaves": table(work, LEAF_BYTES),
        "heads": table(heads, HEAD_BYTES),
        "acks": table(acks, ACK_BYTES),
        "closing": table(1, CLOSING_BYTES),
    }


def tree_specs(counts: Mapping[Part, int]) -> dict[str, TensorSpec]:
    """Of the leaf hashes of a public state, by the values of each part."""
    return {part: table(pieces_of(counts[part]), HASH_BYTES) for part in PARTS}


def piece_specs(count: int, piece: int) -> dict[str, TensorSpec]:
    """Of one piece of a part with `count` values."""
    start, end = span_of(count, piece)
    return {"data": TensorSpec(torch.uint8, (end - start,))}
