"""Miners that show their tables and no unit, and miners that repeat what others showed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from neurons.desks import EvidenceDesk
from neurons.fetching import Source, Unsound, Withheld
from neurons.node import Node
from neurons.slots import slot_seeds
from subnet.chain import ChainError
from subnet.messages import UnitRequest
from subnet.swarm.roster import Roster, records_of
from subnet.transport.axon import Reply
from subnet.transport.errors import Dropped
from subnet.trust.audit import pick_windows
from subnet.trust.ledger import Direction
from tests.adversaries.engine import Memory

log = logging.getLogger("orion.adversaries.evidence")


class SilentDesk(EvidenceDesk):
    """Serves everything, but no units while it is silent."""

    silent: Callable[[], bool]
    """Whether this replica shows none."""

    async def unit(self, caller: str, request: UnitRequest, tensors: Mapping[str, torch.Tensor]) -> Reply:
        if not self.silent():
            return await super().unit(caller, request, tensors)
        raise Dropped(f"sample {request.sample} of round {request.round} is not shown", "ask somebody else")


async def copy_sibling(node: Node, memory: Callable[[], Memory | None]) -> None:
    """After each round's CUT take one unit of each direction of a sibling into the memory of who copies. Until
    cancelled."""
    while True:
        roster = node.history.newest
        if roster is None:
            await node.wait((await node.chain.finalized()).number + 1)
            continue
        await node.wait(roster.block + node.loaded.manifest.round.cut + 1)
        seeds = await slot_seeds(node, roster)
        own = memory()
        try:
            if own is not None:
                await _take(node, roster, seeds, own)
        except (Withheld, Unsound, ChainError) as error:
            log.warning("round %d: nothing to copy: %s", roster.round, error)
        await node.wait(roster.block + node.loaded.manifest.round.length)
        while node.history.newest is roster:
            await node.wait((await node.chain.finalized()).number + 1)


async def _take(node: Node, roster: Roster, seeds: Sequence[bytes], memory: Memory) -> None:
    me, manifest = node.identity.hotkey, node.loaded.manifest
    stage = roster.stage_of(me)
    if stage is None:
        return
    records = records_of(await node.state(roster.block + manifest.round.cut))
    for sibling in roster.stages[stage]:
        record = records.get(sibling)
        if sibling == me or record is None:
            continue
        source = Source.of(node, sibling, stage=stage, number=roster.round)
        evidence = await source.tables(record, samples=manifest.samples(roster.round))
        picked = pick_windows(evidence.heads, seeds=seeds, hotkey=sibling, count=manifest.audit.windows)
        shown = [leaf for head, _ in picked for leaf in evidence.window(head.version)]
        for direction in Direction:
            leaf = next((leaf for leaf in shown if leaf.direction is direction), None)
            if leaf is not None:
                unit = await source.unit(leaf)
                output = None if unit.output is None else unit.output.to(torch.float32)
                memory.siblings[direction] = (output, leaf.loss)
        return
