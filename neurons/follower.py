"""The public states of all stages, as a validator follows them: by watching every merge, as a replica computes it.

A merge's payloads are small, so watching them costs less than fetching the states they lead to, and proves the merge on
the way. A state that could not be followed is fetched from a replica, checked against the digest that most of the stage
have on chain.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from model.stage import assign_flat, flatten
from neurons.bench import Bench
from neurons.exchange import Desk
from neurons.merging import judge_shard, merge
from neurons.node import Node
from neurons.rounds import ChainBoard, merge_terms
from neurons.states import after_merge
from neurons.telemetry import Validated
from neurons.terms import Outcome
from neurons.wire import DendriteExchange
from subnet.chain import ChainError
from subnet.swarm.codec import Codec, PayloadError, codec_of
from subnet.swarm.merge import Merged
from subnet.swarm.roster import Roster

log = logging.getLogger("orion.neurons.follower")


@dataclass(frozen=True, slots=True)
class RoundStart:
    """The weights that replicas begin a round with, as far as they follow from public state: θ, less what a replica had
    sent to a merge that was still going on then."""

    roster: Roster
    public: Mapping[int, torch.Tensor]
    """θ by stage with all rounds before this one merged: what deltas of weights are taken against."""
    base: Mapping[int, torch.Tensor]
    """θ by stage that weights were re-based on at the cut before; of codecs with error feedback."""
    sent: Mapping[str, bytes]
    """Payloads by hotkey."""
    known: frozenset[str]
    """Replicas of whom it is known whether they had sent anything."""
    codec: Codec

    def weights(self, hotkey: str) -> Iterator[torch.Tensor]:
        """What the replica's first window of the round may have, fp32 (n,) each; nothing if not known here.

        Either it starts from what it was re-based on, or, if it computed nothing before the merge was through, from the
        public state after it.
        """
        stage = self.roster.stage_of(hotkey)
        if stage is None or stage not in self.base or hotkey not in self.known:
            return
        theta = self.base[stage]
        if hotkey in self.sent:
            try:
                theta = theta - self.codec.decode(self.sent[hotkey], theta.numel())
            except PayloadError:
                return
        yield theta
        if self.public[stage] is not theta:
            yield self.public[stage]


@dataclass(frozen=True, slots=True)
class Fault:
    """What watching a merge found wrong with a replica."""

    hotkey: str
    stage: int
    kind: Literal["refused", "forged", "liar"]
    reason: str
    shards: tuple[int, ...] = ()
    """Of a liar."""


class PublicStates:
    """Weights and outer momentum of every stage, and what replicas had sent but not merged when a round began."""

    def __init__(self, node: Node, bench: Bench) -> None:
        manifest = node.loaded.manifest
        self._node = node
        self._bench = bench
        self._codec = codec_of(manifest.merge.codec)
        thetas = [flatten(stage) for stage in bench.stages]
        empty = self._codec.error_feedback
        self._public = [Merged(theta, torch.empty(0) if empty else torch.zeros_like(theta)) for theta in thetas]
        self._before: list[Merged | None] = list(self._public)
        """By stage: the state one merge earlier, None where it is not known."""
        self.held = [0] * len(node.plans)
        self._payloads: dict[str, bytes] = {}
        """Payloads of the last merge that was followed, by source; all-gather only."""
        self._round = -1
        """The round whose merge that was."""
        self._members: frozenset[str] = frozenset()
        """Replicas of that round."""
        self._seen: set[str] = set()
        """Replicas whose part in that merge is known: its payload, or that it was not in that round."""

    async def follow(self, roster: Roster, secret: bytes) -> tuple[Fault, ...]:
        """Watch the merges of `roster`'s round at all stages; what was found wrong with whom.

        `secret` chooses the shards that are computed again here.
        """
        self._payloads, self._seen, self._round, self._members = {}, set(), roster.round, roster.members
        outcomes = await asyncio.gather(
            *(self._follow(roster, stage, secret) for stage in range(len(self._public))), return_exceptions=True
        )
        faults: list[Fault] = []
        for stage, outcome in enumerate(outcomes):
            if isinstance(outcome, ChainError):
                log.warning("round %d: the merge of stage %d could not be followed: %s", roster.round, stage, outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                faults += outcome
        return tuple(faults)

    async def _follow(self, roster: Roster, stage: int, secret: bytes) -> list[Fault]:
        node, marks = self._node, self._node.loaded.manifest.round
        if self.held[stage] != roster.round:
            await self._fetch(roster, stage)
            return []
        exchange = DendriteExchange(
            node.dendrite, node.neighbours.endpoint, run=node.loaded.run_id, number=roster.round
        )
        terms = merge_terms(node, roster, stage, secret=secret)
        desk = Desk(node.identity.hotkey)
        before = self._public[stage]
        outcome = await merge(terms, None, before, desk, board=ChainBoard(node), exchange=exchange)
        after: Merged | None = outcome.public
        if outcome.incomplete:
            after = await after_merge(node, roster, stage, until=roster.block + marks.length + marks.close)
        faults = _faults(stage, outcome)
        if after is None:
            log.warning("round %d: the merge of stage %d could not be followed", roster.round, stage)
            return faults
        self._before[stage], self._public[stage] = before, after
        self.held[stage] = roster.round + 1
        if terms.gathers:
            for hotkey in roster.stages[stage]:
                held = [desk.piece_of(hotkey, index) for index in range(len(terms.layout().sizes))]
                if hotkey not in outcome.refused and all(piece is not None for piece in held):
                    self._payloads[hotkey] = b"".join(piece for piece in held if piece is not None)
                    self._seen.add(hotkey)
        return faults

    async def recheck(self, roster: Roster, stage: int, shard: int) -> tuple[str, ...]:
        """Who published another digest of a merged shard of `roster`'s round than the one computed here; nobody where
        the state before that merge is not known any more."""
        before = {self.held[stage]: self._public[stage], self.held[stage] - 1: self._before[stage]}.get(roster.round)
        if before is None:
            return ()
        node = self._node
        exchange = DendriteExchange(
            node.dendrite, node.neighbours.endpoint, run=node.loaded.run_id, number=roster.round
        )
        terms = merge_terms(node, roster, stage, secret=b"")
        return await judge_shard(terms, before, shard, board=ChainBoard(node), exchange=exchange)

    async def _fetch(self, roster: Roster, stage: int) -> None:
        """A state that this validator did not see come about."""
        node, marks = self._node, self._node.loaded.manifest.round
        await node.wait(roster.block + marks.merge)
        found = await after_merge(node, roster, stage, until=roster.block + marks.length + marks.close)
        if found is None:
            log.warning("nobody served the state of stage %d after round %d", stage, roster.round)
            return
        self._public[stage], self._before[stage] = found, None
        self.held[stage] = roster.round + 1

    def round_start(self, roster: Roster) -> RoundStart:
        """What is known here of the weights that `roster`'s round began with."""
        public: dict[int, torch.Tensor] = {}
        base: dict[int, torch.Tensor] = {}
        known = set(roster.members)
        overlapped = self._node.loaded.manifest.round.overlapped and roster.round > 0
        for stage, held in enumerate(self.held):
            if held != roster.round:
                continue
            public[stage] = self._public[stage].theta
            cut_from = self._before[stage] if overlapped else self._public[stage]
            if cut_from is not None and self._codec.error_feedback:
                base[stage] = cut_from.theta
        if overlapped and self._round == roster.round - 1:
            # Who was not in the round before has sent nothing; of who was and is no source here, nothing is known.
            newcomers = known - self._members
            known &= self._seen | newcomers
        elif overlapped:
            known = set()
        sent = dict(self._payloads) if overlapped else {}
        return RoundStart(roster, public, base, sent, frozenset(known), self._codec)

    async def validate(self, number: int) -> None:
        """Validation loss of the public weights at the start of round `number`, one stage at a time."""
        manifest = self._node.loaded.manifest
        if any(held != number for held in self.held):
            log.warning("no validation loss at the start of round %d: some stage's weights are not known", number)
            return
        loss = await self._bench.compute(self._validation_loss)
        tokens = manifest.data.validation_batches * manifest.tokens_per_microbatch
        self._node.telemetry.emit(Validated(round=number, loss=round(loss, 5), tokens=tokens))

    @torch.no_grad()
    def _validation_loss(self) -> float:
        batches = [
            self._node.corpus.validation_sample(index)
            for index in range(self._node.loaded.manifest.data.validation_batches)
        ]
        inputs = [tokens[:, :-1] for tokens in batches]
        held: Sequence[torch.Tensor] = inputs
        for stage, public in zip(self._bench.stages, self._public, strict=True):
            assign_flat(stage, public.theta)
            if stage.plan.is_last:
                losses = [stage.loss(x, b[:, 1:], t) for x, b, t in zip(held, batches, inputs, strict=True)]
                return float(torch.stack(losses).mean())
            wire = self._node.shapes.boundary.dtype
            held = [stage(x, t).to(wire).to(torch.float32) for x, t in zip(held, inputs, strict=True)]
        raise AssertionError("a split always ends with a last stage")


def _faults(stage: int, outcome: Outcome) -> list[Fault]:
    faults = [Fault(hotkey, stage, "refused", reason) for hotkey, reason in outcome.refused.items()]
    faults += [Fault(hotkey, stage, "forged", reason) for hotkey, reason in outcome.forged.items()]
    for hotkey, shards in outcome.liars.items():
        reason = f"published another digest than the recomputed one for shards {', '.join(map(str, shards))}"
        faults.append(Fault(hotkey, stage, "liar", reason, shards))
    return faults
