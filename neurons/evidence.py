"""Fetching what miners must show: closed ledgers, window weights and units, each proven against its root or leaf.

Validators audit with it; a joiner takes units of its siblings from it, to compute them again before it counts.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model.data import Corpus
from model.stage import Stage, assign_flat
from neurons.node import Node
from neurons.windows import root_of
from subnet.messages import (
    ACKS_LIMIT,
    EvidenceRequest,
    EvidenceTables,
    Tensors,
    UnitRequest,
    WindowRequest,
    evidence_specs,
    flat,
)
from subnet.swarm.record import Phase, Record, bind_roots
from subnet.swarm.roster import Roster
from subnet.transport.errors import TransportError
from subnet.transport.synapse import HEADER_LIMIT, tensor_bytes
from subnet.trust.audit import Tolerance, UnitTensors, replay
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.heads import ACK_BYTES, HEAD_BYTES, WindowHead
from subnet.trust.ledger import (
    LEAF_BYTES,
    Direction,
    Evidence,
    Leaf,
    LedgerError,
    Tables,
    digest,
)

log = logging.getLogger("orion.neurons.evidence")

FETCH_DEADLINE = 30.0
AUDIT_DEADLINE = 20.0
"""Seconds a miner has to serve everything that one reader asks of it in a round."""


@dataclass(frozen=True, slots=True)
class Case:
    """One unit to replay: what its miner served, or why it did not."""

    leaf: Leaf
    theta: torch.Tensor | None
    tensors: UnitTensors | None
    problem: str


class EvidenceReader:
    """Reads the evidence of one round's miners over the axon."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def tables(self, hotkey: str, roster: Roster, record: Record | None) -> Evidence | None:
        """A miner's closed ledger, if it is what its root on chain says; None otherwise, with the reason logged."""
        if record is None or record.round != roster.round or record.phase < Phase.CUT:
            log.warning("round %d: %s fixed no evidence on chain in time", roster.round, hotkey)
            return None
        node = self._node
        quota = node.loaded.manifest.data.samples_per_round
        if record.work > 2 * quota:
            log.warning("round %d: %s claims %d units, a round has %d", roster.round, hotkey, record.work, 2 * quota)
            return None
        try:
            reply, tensors = await node.dendrite.call(
                node.neighbours.endpoints.get(hotkey, ""),
                hotkey,
                EvidenceRequest(run=node.loaded.run_id.hex(), round=roster.round),
                reply=EvidenceTables,
                reply_specs=lambda fields: evidence_specs(record.work, min(fields.heads, record.work), fields.acks),
                max_reply_bytes=HEADER_LIMIT + record.work * (LEAF_BYTES + HEAD_BYTES) + ACKS_LIMIT * ACK_BYTES,
                deadline=FETCH_DEADLINE,
            )
            tables = Tables(*(bytes(tensor_bytes(tensors[name])) for name in ("leaves", "heads", "acks", "closing")))
            if bind_roots(bytes.fromhex(reply.payload), tables.root) != record.root:
                raise LedgerError("its evidence does not hash to its root on chain")
            evidence = Evidence.parse(tables)
            first = roster.round * quota
            evidence.check(stage=roster.stage_of(hotkey) or 0, samples=range(first, first + quota))
        except (TransportError, LedgerError) as error:
            log.warning("round %d: no evidence from %s: %s", roster.round, hotkey, error)
            return None
        return evidence

    async def cases(
        self,
        hotkey: str,
        roster: Roster,
        picks: Sequence[tuple[WindowHead, Sequence[Leaf]]],
        *,
        public: Mapping[int, tuple[torch.Tensor, ...]],
    ) -> list[Case]:
        """Weights and tensors of picked units, within one deadline for the whole miner.

        `public` holds the weights (fp32 (n,)) that windows may have which follow from public state, by version.
        """
        index = roster.stage_of(hotkey) or 0
        found: list[Case] = []
        deadline = asyncio.get_running_loop().time() + AUDIT_DEADLINE
        for window, units in picks:
            try:
                async with asyncio.timeout_at(deadline):
                    theta = await self._weights(hotkey, roster, window, public.get(window.version, ()))
                    served = [await self._unit(hotkey, roster, leaf, index) for leaf in units]
            except (TransportError, LedgerError, TimeoutError) as error:
                why = str(error) or f"nothing complete within {AUDIT_DEADLINE:g} s"
                found.extend(Case(leaf, None, None, f"evidence withheld or wrong: {why}") for leaf in units)
            else:
                found.extend(Case(leaf, theta, tensors, "") for leaf, tensors in zip(units, served, strict=True))
        return found

    async def _weights(
        self, hotkey: str, roster: Roster, window: WindowHead, public: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """The window's weights: one of `public` where they follow from public state, else as served."""
        for weights in public:
            if window.weights == root_of(weights):
                return weights
        if public:
            raise LedgerError(f"its first window of round {roster.round} does not start from the public weights")
        node = self._node
        _, tensors = await node.dendrite.call(
            node.neighbours.endpoints.get(hotkey, ""),
            hotkey,
            WindowRequest(run=node.loaded.run_id.hex(), round=roster.round, version=window.version),
            reply=Tensors,
            reply_specs={"weights": flat(node.parameters[roster.stage_of(hotkey) or 0])},
            deadline=FETCH_DEADLINE,
        )
        if root_of(tensors["weights"]) != window.weights:
            raise LedgerError(f"the weights of window {window.version} do not hash to its head")
        return tensors["weights"]

    async def _unit(self, hotkey: str, roster: Roster, leaf: Leaf, index: int) -> UnitTensors:
        """A unit's tensors, each checked against its leaf; the head's input against the sample itself."""
        node = self._node
        backward = leaf.direction is Direction.BACKWARD
        _, tensors = await node.dendrite.call(
            node.neighbours.endpoints.get(hotkey, ""),
            hotkey,
            UnitRequest(run=node.loaded.run_id.hex(), round=roster.round, sample=leaf.sample, backward=backward),
            reply=Tensors,
            reply_specs=node.shapes.unit(node.plans[index], backward=backward),
            deadline=FETCH_DEADLINE,
        )
        for name in ("input", "gradient", "output"):
            if name in tensors and digest(tensor_bytes(tensors[name])) != getattr(leaf, name):
                raise LedgerError(f"the {name} of sample {leaf.sample} does not hash to its leaf")
        if index == 0 and not torch.equal(tensors["input"], node.corpus.sample(leaf.sample)[:, :-1]):
            raise LedgerError(f"sample {leaf.sample} was trained on other tokens than its own")
        return UnitTensors(tensors["input"], tensors.get("gradient"), tensors.get("output"))


def replay_cases(
    stage: Stage,
    cases: Sequence[Case],
    corpus: Corpus,
    *,
    accumulation: int,
    tolerance: Tolerance,
    hotkey: str,
    number: int,
) -> list[Finding]:
    """What comes of units of `hotkey`'s round `number`. What was not served counts as failed, in this reader's own
    judgement."""
    findings: list[Finding] = []
    loaded: torch.Tensor | None = None
    for case in cases:
        if case.theta is None or case.tensors is None:
            findings.append(
                Finding(
                    hotkey=hotkey,
                    round=number,
                    stage=stage.plan.index,
                    check=Check.WITHHELD,
                    grade=Grade.WITHHELD,
                    passed=False,
                    error=math.inf,
                    version=case.leaf.version,
                    sample=case.leaf.sample,
                    reason=case.problem,
                )
            )
            continue
        if case.theta is not loaded:  # units of one window share its weights
            assign_flat(stage, case.theta)
            loaded = case.theta
        targets = corpus.sample(case.leaf.sample)[:, 1:] if stage.plan.is_last else None
        findings.extend(
            replay(
                stage,
                case.leaf,
                case.tensors,
                targets=targets,
                accumulation=accumulation,
                tolerance=tolerance,
                hotkey=hotkey,
                number=number,
            )
        )
    return findings
