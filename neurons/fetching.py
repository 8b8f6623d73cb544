"""What a miner shows to one reader, asked for with patience and checked against what it committed to.

Everything has a size known beforehand, so a giant reply is cut off at its header. Who is busy is asked again; who is
slow has a budget of seconds for a whole round, which grows with what it shows at the rate that every miner owes the
reader, so nobody's slowness costs a reader more than that. What does not come, or is not what the leaf or the root
says, raises `Withheld`: it cannot be shown to anybody else, so it counts in the reader's own judgement only. Nor does a
reader ask for more than its part: that raises `Spent`, and nothing is held against the miner.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from model.layout import Layout
from model.split import StagePlan
from neurons.node import Node
from neurons.windows import root_of
from subnet.messages import (
    ACKS_LIMIT,
    STATE_PIECES,
    EvidenceRequest,
    EvidenceTables,
    Shapes,
    StatePart,
    StatePieces,
    StateRequest,
    Tensors,
    UnitRequest,
    WeightsDelta,
    WindowRequest,
    evidence_specs,
)
from subnet.swarm.content import LEAF_BYTES as HASH_BYTES
from subnet.swarm.record import Record, bind_roots
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import (
    Busy,
    OverQuota,
    Refused,
    ReplayedRequest,
    Silent,
    TransportError,
    Unavailable,
    Unreachable,
)
from subnet.transport.synapse import HEADER_LIMIT, S, Specs, Synapse, tensor_bytes, wire_bytes
from subnet.trust import delta
from subnet.trust.audit import UnitTensors
from subnet.trust.heads import ACK_BYTES, HEAD_BYTES, WindowHead
from subnet.trust.ledger import (
    CLOSING_BYTES,
    LEAF_BYTES,
    NO_DIGEST,
    TABLES,
    Direction,
    Evidence,
    Leaf,
    LedgerError,
    Tables,
    digest,
)
from subnet.trust.quota import RETRIES, Sizes, joiners_part, least_rate, validators_part
from subnet.trust.tree import PIECE_BYTES, PIECE_VALUES, longest_proof, pieces_in, pieces_of, proven

log = logging.getLogger("orion.neurons.fetching")

PATIENCE = 20.0
"""Seconds that a miner may take in sum for what one reader asks of it in a round, besides the transfers."""
CALL_DEADLINE = 10.0
"""Seconds for one call, besides the transfer. A call that gets no answer is tried again within `PATIENCE`."""
PAUSE = 0.2
LONGEST_PAUSE = 5.0
TRY_AGAIN = (Busy, Unavailable, Unreachable, ReplayedRequest)
ABSENT = (Unreachable, ReplayedRequest)
"""What tells nothing of the miner: the last says that somebody on the way was there first with the same request."""


class Withheld(Exception):  # noqa: N818 - what happened, as the transport's errors say it
    """A miner did not show what it must, or showed something else: one line."""


class Absent(Withheld):
    """Nobody answered where it should be: it is gone, it is silent, or the reader's own line is down."""


class Spent(Exception):  # noqa: N818
    """This reader has had its part of what the miner shows of the round: one line."""


class Unsound(Exception):  # noqa: N818
    """What a miner showed is what its root on chain fixes, and no honest one can have written it: one line."""


@dataclass(frozen=True, slots=True)
class NamedState:
    """A flat fp32 vector of so many values that a head or the closing names by its root."""

    part: StatePart
    root: bytes
    values: int

    def size(self, index: int) -> int:
        """Bytes of piece `index`."""
        return min(PIECE_BYTES, 4 * self.values - index * PIECE_BYTES)


class Source:
    """One miner's round, as one reader asks for it. `received` counts bytes of tensors."""

    def __init__(
        self,
        *,
        dendrite: Dendrite,
        endpoint: Callable[[str], str | None],
        run: bytes,
        number: int,
        hotkey: str,
        plan: StagePlan,
        layout: Layout,
        shapes: Shapes,
        patience: float = PATIENCE,
        share: float = 1.0,
    ) -> None:
        """`share` is the reader's part of the stake at work."""
        self.hotkey = hotkey
        self.received = 0
        self._dendrite = dendrite
        self._endpoint = endpoint
        self._run = run.hex()
        self._number = number
        self._plan = plan
        self._layout = layout
        self._shapes = shapes
        self._left = patience
        self._patience = patience
        self._rate = least_rate(share)
        self._share = share
        self._asked = 0
        """Bytes that the miner may have sent, whether or not they arrived."""
        self._part = math.inf

    @classmethod
    def of(cls, node: Node, hotkey: str, *, stage: int, number: int) -> Self:
        """What a running node asks of the replica `hotkey` of a stage, of round `number`."""
        return cls(
            dendrite=node.dendrite,
            endpoint=node.neighbours.endpoint,
            run=node.loaded.run_id,
            number=number,
            hotkey=hotkey,
            plan=node.plans[stage],
            layout=node.layouts[stage],
            shapes=node.shapes,
        )

    async def tables(self, record: Record, *, samples: range) -> Evidence:
        """The closed ledger behind the record's root. Raises `Withheld`, and `Unsound` for one that contradicts itself.

        samples: the round's ids.
        """
        if record.work > 2 * len(samples):
            raise Unsound(f"its record claims {record.work} units, a round has {2 * len(samples)}")
        limit = record.work * (LEAF_BYTES + HEAD_BYTES) + ACKS_LIMIT * ACK_BYTES + CLOSING_BYTES
        reply, tensors = await self._call(
            EvidenceRequest(run=self._run, round=self._number),
            EvidenceTables,
            lambda fields: evidence_specs(record.work, min(fields.heads, record.work), fields.acks),
            limit,
        )
        tables = Tables(*(bytes(tensor_bytes(tensors[name])) for name in TABLES))
        if bind_roots(bytes.fromhex(reply.payload), tables.root) != record.root:
            raise Withheld("its evidence does not hash to its root on chain")
        try:
            evidence = Evidence.parse(tables)
            evidence.check(stage=self._plan.index, samples=samples)
        except LedgerError as error:
            raise Unsound(str(error)) from error
        return evidence

    def ask_again(self) -> None:
        """Have patience with it anew: it could not be reached."""
        self._left = self._patience

    def limit(self, evidence: Evidence, picked: Iterable[WindowHead]) -> None:
        """From here on ask for no more than this reader's part of the picked windows; without stake at work it is one
        of those who only compare."""
        sizes = Sizes.of(self._plan, self._layout, self._shapes)
        if self._share > 0:
            self._part = validators_part(sizes, list(picked), tables=evidence.size, share=self._share)
        else:
            self._part = joiners_part(sizes, tables=evidence.size)

    async def weights(self, head: WindowHead, base: torch.Tensor, *, held: int) -> tuple[bytes, torch.Tensor]:
        """A window's weights, fp32 (n,), and before them what they differ by from the public state `base`, as
        `subnet.trust.delta` writes it."""
        _, tensors = await self._call(
            WindowRequest(run=self._run, round=self._number, version=head.version, held=held),
            WeightsDelta,
            lambda fields: fields.specs(),
            delta.limit_of(self._layout.values),
        )
        data = bytes(tensor_bytes(tensors["delta"]))
        theta = await asyncio.to_thread(open_delta, data, base, head.weights)
        if theta is None:
            raise Withheld(f"the weights of window {head.version} do not hash to its head")
        return data, theta

    async def unit(self, leaf: Leaf) -> UnitTensors:
        """A unit's tensors, each checked against its leaf."""
        backward = leaf.direction is Direction.BACKWARD
        specs = self._shapes.unit(self._plan, backward=backward, sent=leaf.output != NO_DIGEST)
        _, tensors = await self._call(
            UnitRequest(run=self._run, round=self._number, sample=leaf.sample, backward=backward),
            Tensors,
            specs,
            wire_bytes(specs),
        )
        for name, tensor in tensors.items():
            if digest(tensor_bytes(tensor)) != getattr(leaf, name):
                raise Withheld(f"the {name} of sample {leaf.sample} does not hash to its leaf")
        return UnitTensors(tensors["input"], tensors.get("gradient"), tensors.get("output"))

    async def pieces(self, version: int, wanted: Sequence[tuple[NamedState, int]]) -> list[bytes]:
        """Pieces of a window's states, or of the cut's, by number, each proven by its root; in one call."""
        message = StateRequest(
            run=self._run,
            round=self._number,
            version=version,
            parts=[state.part for state, _ in wanted],
            pieces=[index for _, index in wanted],
        )
        sizes = [state.size(index) for state, index in wanted]
        proofs = sum(longest_proof(pieces_of(4 * state.values)) for state, _ in wanted)
        limit = sum(sizes) + proofs * HASH_BYTES
        fields, tensors = await self._call(message, StatePieces, lambda reply: reply.specs(), limit)
        if fields.sizes != sizes or len(fields.hashes) != len(wanted):
            raise Withheld(f"pieces of window {version} have other sizes than they must")
        data, hashes = bytes(tensor_bytes(tensors["data"])), bytes(tensor_bytes(tensors["proof"]))
        found, start, used = [], 0, 0
        for (state, index), size, count in zip(wanted, sizes, fields.hashes, strict=True):
            proof = [hashes[HASH_BYTES * at : HASH_BYTES * (at + 1)] for at in range(used, used + count)]
            found.append(data[start : start + size])
            if not proven(state.root, count=pieces_of(4 * state.values), index=index, piece=found[-1], proof=proof):
                raise Withheld(f"piece {index} of {state.part} of window {version} does not lead to its root")
            start, used = start + size, used + count
        return found

    async def values(self, version: int, wanted: Sequence[tuple[NamedState, range]]) -> list[torch.Tensor]:
        """Stretches of a window's states, or of the cut's, fp32 (k,) each, proven like their pieces; in as few calls as
        may be."""
        places = [(state, span, pieces_in(span)) for state, span in wanted]
        named = [(state, index) for state, _, pieces in places for index in pieces]
        flat = [
            piece
            for start in range(0, len(named), STATE_PIECES)
            for piece in await self.pieces(version, named[start : start + STATE_PIECES])
        ]
        data, found = iter(flat), []
        for _, span, pieces in places:
            if not pieces:
                found.append(torch.empty(0))
                continue
            joined = torch.frombuffer(bytearray(b"".join(next(data) for _ in pieces)), dtype=torch.float32)
            start = span.start - pieces.start * PIECE_VALUES
            found.append(joined[start : start + len(span)])
        return found

    async def _call(
        self, message: Synapse, reply: type[S], specs: Specs | Callable[[S], Specs], limit: int
    ) -> tuple[S, dict[str, torch.Tensor]]:
        """Ask until there is an answer or the miner's seconds are used up."""
        loop, turn = asyncio.get_running_loop(), 0
        if self._asked + limit > self._part:
            raise Spent(f"{limit} bytes after {self._asked} are more than this reader's part, {self._part}")
        self._left += limit / self._rate
        while True:
            start = loop.time()
            deadline = min(self._left, CALL_DEADLINE + limit / self._rate)
            endpoint = self._endpoint(self.hotkey)
            try:
                if endpoint is None:
                    raise Unreachable(f"{self.hotkey} serves no axon")
                if deadline <= 0:
                    raise Silent(f"it has used up its {self._patience:g} seconds of the round")
                fields, tensors = await self._dendrite.call(
                    endpoint,
                    self.hotkey,
                    message,
                    reply=reply,
                    reply_specs=specs,
                    max_reply_bytes=HEADER_LIMIT + limit,
                    deadline=deadline,
                )
            except TRY_AGAIN as error:
                asked = error.retry_after if isinstance(error, Refused) else None
                pause = min(LONGEST_PAUSE, asked or PAUSE * 2.0**turn)
                self._left -= loop.time() - start + pause
                self._asked += limit if isinstance(error, ABSENT) else 0
                if self._left <= 0:
                    kind = Absent if isinstance(error, ABSENT) else Withheld
                    raise kind(f"{message.route}: {error}") from error
                turn += 1
                await asyncio.sleep(pause)
            except TransportError as error:
                if isinstance(error, OverQuota) and self._asked + limit > RETRIES * self._part:
                    raise Spent(f"{self._asked} bytes were asked for, of this reader's {self._part}") from error
                self._left -= loop.time() - start + limit / self._rate
                self._asked += limit
                raise Withheld(f"{message.route}: {error}") from error
            else:  # a reply that came faster earns the miner time: its link sends at once what its quota pays later
                size = sum(tensor.nbytes for tensor in tensors.values())
                self._left -= loop.time() - start + (limit - size) / self._rate
                self._asked += size
                self.received += size
                return fields, tensors


def open_delta(data: bytes, base: torch.Tensor, root: bytes) -> torch.Tensor | None:
    """The weights (fp32 (n,)) that a delta leads to, None if they are not those under `root`."""
    try:
        theta = delta.decode(data, base, delta.limit_of(base.numel()))
    except delta.DeltaFormatError as error:
        log.info("a delta that does not open: %s", error)
        return None
    return theta if root_of(theta) == root else None
