"""The round machine of a miner: train, cut, merge with the chain as coordinator, and train on meanwhile.

Blocks of a round are deadlines (manifest `[round]`). At `close` every stage takes its last step and cuts: its payload
is fixed and its weights are re-based on public state. Then CUT (roots on chain), HAVE (bitmaps on chain) and MERGE.
With `merge` beyond `length` these lie in the next round, which trains meanwhile; the merged state is taken over at a
step boundary. What happens to those who miss a deadline is defined: no root at CUT, no part in the merge; a payload
that too few hold is left out and its replica owes it again; a replica that lacks what was merged takes the public
state from a sibling, checked against the digest on chain.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from model.accounting import total_parameters
from model.engine import Recompute, StageEngine
from model.stage import build_stage, flatten, unflatten
from neurons.archive import Archive
from neurons.exchange import Desk
from neurons.merging import Marks, Outcome, Terms, merge
from neurons.node import CHAIN_STALL, Node
from neurons.pipeline import DEPTH_LIMIT_PER_STAGE, StageWorker
from neurons.replica import Replica
from neurons.telemetry import CheckpointWritten, MergeFault, RoundStarted, Traffic
from neurons.telemetry import Merged as MergedEvent
from neurons.vault import Vault, stage_file
from neurons.wire import DendriteExchange
from subnet.swarm.codec import DeltaError, codec_of, no_residual, reach
from subnet.swarm.merge import Merged
from subnet.swarm.record import Phase, Record
from subnet.swarm.roster import NO_WEIGHTS, Roster, records_of
from subnet.trust.ledger import Evidence

log = logging.getLogger("orion.neurons.rounds")

PACE_BLOCKS = 10
STEP_BOUND = 8.0
"""An Adam-like step moves a weight by about its rate; a payload that claims this many times more is refused."""
MARGIN = 3
"""Blocks before a mark at which its record is handed to the chain: inclusion and finality take two or three."""


class BehindError(Exception):
    """This replica lacks the public state it would have to train from: one line that says which."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What a replica put into a round's merge."""

    desk: Desk
    evidence: Evidence


class ChainBoard:
    """`Board` of a merge over the node's chain."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def publish(self, record: Record, *, until: int) -> None:
        await self._node.publish(record, until=until)

    async def records_at(self, block: int) -> Mapping[str, Record | None]:
        return records_of(await self._node.state(block))

    async def wait(self, block: int) -> None:
        await self._node.wait(block)

    async def seed(self, block: int) -> bytes:
        return await self._node.seed(block, "orion/pairs/1")


class RoundMachine:
    """One replica of one stage, round after round. `replica` is what it holds, `worker` what trains."""

    def __init__(self, node: Node, stage: int, *, archive: Archive, library: Library, vault: Vault) -> None:
        self._node = node
        self._manifest = node.loaded.manifest
        self._archive = archive
        self._library = library
        self._vault = vault
        self._codec = codec_of(self._manifest.merge.codec)
        self.stage = stage
        self.worker = build_worker(node, stage)
        theta = flatten(self._stage)
        momentum = torch.empty(0) if self._codec.error_feedback else torch.zeros_like(theta)
        self.replica = Replica(
            Merged(theta, momentum), 0, no_residual(self._codec, theta.numel(), self._manifest.merge.decay)
        )
        self.digest = NO_WEIGHTS
        """Of the public state held; zero before `hold` has been called."""
        self._merges: dict[int, asyncio.Task[None]] = {}
        self._secret = secrets.token_bytes(32)

    @property
    def _stage(self) -> torch.nn.Module:
        return self.worker.engine.stage
