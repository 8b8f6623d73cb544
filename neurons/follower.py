"""The public states of all stages, as a validator follows them: by watching every merge, as a replica computes it.

A merge's payloads are small, so watching them costs less than fetching the states they lead to, and proves the merge on
the way. A state that could not be followed is fetched from a replica, checked against the digest that most of the stage
have on chain.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model.stage import Stage, assign_flat, build_stage, flatten
from neurons.exchange import Desk
from neurons.merging import merge
from neurons.node import Node
from neurons.rounds import ChainBoard, merge_terms
from neurons.states import after_merge
from neurons.telemetry import Validated
from neurons.wire import DendriteExchange
from subnet.chain import ChainError
from subnet.swarm.codec import Codec, PayloadError, codec_of
from subnet.swarm.merge import Merged
from subnet.swarm.roster import Roster
from subnet.trust.ledger import Evidence

log = logging.getLogger("orion.neurons.follower")


@dataclass(frozen=True, slots=True)
class RoundStart:
    """The weights that replicas begin a round with, as far as they follow from public state: θ, less what a replica had
    sent to a merge that was still going on then."""

    roster: Roster
    base: Mapping[int, torch.Tensor]
    """θ by stage."""
    after: Mapping[int, torch.Tensor]
    """θ by stage after the merge that was still going on: what a replica starts from that computes nothing before."""
    sent: Mapping[str, bytes]
    """Payloads by hotkey."""
    known: frozenset[str]
    """Replicas of whom it is known whether they had sent anything."""
    codec: Codec

    def weights(self, hotkey: str, evidence: Evidence) -> dict[int, tuple[torch.Tensor, ...]]:
        """What the replica's first window of the round may have, by version; empty if not known here."""
        stage = self.roster.stage_of(hotkey)
        if stage is None or stage not in self.base or hotkey not in self.known or not evidence.heads:
            return {}
        theta = self.base[stage]
        if hotkey in self.sent:
            try:
                theta = theta - self.codec.decode(self.sent[hotkey], theta.numel())
            except PayloadError:
                return {}
        return {min(head.version for head in evidence.heads): (theta, self.after[stage])}


class PublicStates:
    """Weights and outer momentum of every stage, and what replicas had sent but not merged when a round began."""

    def __init__(self, node: Node) -> None:
        manifest = node.loaded.manifest
        self._node = node
        self._codec = codec_of(manifest.merge.codec)
        config = manifest.model.config()
        self.stages: list[Stage] = [build_stage(config, plan, manifest.run.seed) for plan in node.plans]
        thetas = [flatten(stage) for stage in self.stages]
        empty = self._codec.error_feedback
        self._public = [Merged(theta, torch.empty(0) if empty else torch.zeros_like(theta)) for theta in thetas]
        self._before = list(self._public)
        """By stage: the state one merge earlier."""
        self.held = [0] * len(node.plans)
        self._payloads: dict[str, bytes] = {}
        """Payloads of the last merge that was followed, by source; all-gather only."""
        self._round = -1
        """The round whose merge that was."""
        self._members: frozenset[str] = frozenset()
        """Replicas of that round."""
        self._seen: set[str] = set()
        """Replicas whose part in that merge is known: its payload, or that it was not in that round."""

    async def follow(self, roster: Roster) -> None:
        """Watch the merges of `roster`'s round at all stages."""
        self._payloads, self._seen, self._round, self._members = {}, set(), roster.round, roster.members
        outcomes = await asyncio.gather(
            *(self._follow(roster, stage) for stage in range(len(self.stages))), return_exceptions=True
        )
        for stage, outcome in enumerate(outcomes):
            if isinstance(outcome, ChainError):
                log.warning("round %d: the merge of stage %d could not be followed: %s", roster.round, stage, outcome)
            elif outcome is not None:
                raise outcome

    async def _follow(self, roster: Roster, stage: int) -> None:
        node, marks = self._node, self._node.loaded.manifest.round
        if self.held[stage] != roster.round:
            await self._fetch(roster, stage)
            return
        exchange = DendriteExchange(
            node.dendrite, node.neighbours.endpoint, run=node.loaded.run_id, number=roster.round
        )
        terms = merge_terms(node, roster, stage, secret=b"")
        desk = Desk(node.identity.hotkey)
        before = self._public[stage]
        outcome = await merge(terms, None, before, desk, board=ChainBoard(node), exchange=exchange)
        after: Merged | None = outcome.public
        if outcome.incomplete:
            after = await after_merge(node, roster, stage, until=roster.block + marks.length + marks.close)
        if after is None:
            log.warning("round %d: the merge of stage %d could not be followed", roster.round, stage)
            return
        self._before[stage], self._public[stage] = before, after
        self.held[stage] = roster.round + 1
        if terms.gathers:
            for hotkey in roster.stages[stage]:
                held = [desk.piece_of(hotkey, index) for index in range(len(terms.layout().sizes))]
                if hotkey not in outcome.refused and all(piece is not None for piece in held):
                    self._payloads[hotkey] = b"".join(piece for piece in held if piece is not None)
                    self._seen.add(hotkey)

    async def _fetch(self, roster: Roster, stage: int) -> None:
        """A state that this validator did not see come about."""
        node, marks = self._node, self._node.loaded.manifest.round
        await node.wait(roster.block + marks.merge)
        found = await after_merge(node, roster, stage, until=roster.block + marks.length + marks.close)
        if found is None:
            log.warning("nobody served the state of stage %d after round %d", stage, roster.round)
            return
        self._public[stage] = self._before[stage] = found
        self.held[stage] = roster.round + 1

    def round_start(self, roster: Roster) -> RoundStart:
        """What is known here of the weights that `roster`'s round began with."""
        base: dict[int, torch.Tensor] = {}
        known = set(roster.members)
        overlapped = self._node.loaded.manifest.round.overlapped and roster.round > 0
        for stage, held in enumerate(self.held):
            if held == roster.round and self._codec.error_feedback:
                base[stage] = self._before[stage].theta if overlapped else self._public[stage].theta
        after = {stage: self._public[stage].theta for stage in base}
        if overlapped and self._round == roster.round - 1:
            # Who was not in the round before has sent nothing; of who was and is no source here, nothing is known.
            newcomers = known - self._members
            known &= self._seen | newcomers
        elif overlapped:
            known = set()
        sent = dict(self._payloads) if overlapped else {}
        return RoundStart(roster, base, after, sent, frozenset(known), self._codec)

    async def validate(self, number: int) -> None:
        """Validation loss of the public weights at the start of round `number`, one stage at a time."""
        manifest = self._node.loaded.manifest
        if any(held != number for held in self.held):
            log.warning("no validation loss at the start of round %d: some stage's weights are not known", number)
            return
        loss = await asyncio.to_thread(self._validation_loss)
        tokens = manifest.data.validation_batches * manifest.tokens_per_microbatch
        self._node.telemetry.emit(Validated(round=number, loss=round(loss, 5), tokens=tokens))

    @torch.no_grad()
    def _validation_loss(self) -> float:
        batches = [
            self._node.corpus.validation_sample(index)
            for index in range(self._node.loaded.manifest.data.validation_batches)
        ]
        held: Sequence[torch.Tensor] = [tokens[:, :-1] for tokens in batches]
        for stage, public in zip(self.stages, self._public, strict=True):
            assign_flat(stage, public.theta)
            if stage.plan.is_last:
                losses = [stage.loss(x, tokens[:, 1:]) for x, tokens in zip(held, batches, strict=True)]
                return float(torch.stack(losses).mean())
            wire = self._node.shapes.boundary.dtype
            held = [stage(x).to(wire).to(torch.float32) for x in held]
        raise AssertionError("a split always ends with a last stage")
