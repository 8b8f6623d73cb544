"""Finding a stage's public state among its replicas: who says on chain to hold which, and who serves it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neurons.library import digest_of, fetch_public
from neurons.node import Node
from subnet.swarm.merge import Merged
from subnet.swarm.record import Record
from subnet.swarm.roster import NO_WEIGHTS, Roster, records_of
from subnet.transport.errors import TransportError

log = logging.getLogger("orion.neurons.states")

PAUSE = 0.2
TURNS = 3
"""Rounds of all holders before a claim is let go."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A public state that replicas of a stage say to hold: `held` rounds merged, the digest, and who says so."""

    held: int
    weights: bytes
    holders: tuple[str, ...]


def claims(records: Mapping[str, Record | None], hotkeys: Sequence[str], *, run: bytes, at_most: int) -> list[Claim]:
    """What `hotkeys` say to hold, of at most `at_most` rounds: newest first, among equals what most say."""
    groups: dict[tuple[int, bytes], list[str]] = {}
    for hotkey in hotkeys:
        record = records.get(hotkey)
        if record is not None and record.run == run and record.weights != NO_WEIGHTS and record.held <= at_most:
            groups.setdefault((record.held, record.weights), []).append(hotkey)
    found = [Claim(held, weights, tuple(holders)) for (held, weights), holders in groups.items()]
    return sorted(found, key=lambda claim: (-claim.held, -len(claim.holders), claim.weights))


async def newest_claims(node: Node, roster: Roster, stage: int, *, at_most: int) -> list[Claim]:
    """The claims of the stage's other replicas and joiners at the newest finalized block."""
    state = await node.state((await node.chain.finalized()).number)
    others = [hotkey for hotkey in (*roster.stages[stage], *roster.joining(stage)) if hotkey != node.identity.hotkey]
    return claims(records_of(state), others, run=node.loaded.run_id, at_most=at_most)


async def take(node: Node, stage: int, claim: Claim, *, momentum: bool) -> Merged | None:
    """The claimed state from one of its holders, proven by its digest; None if nobody serves it."""
    count = node.parameters[stage]
    for turn in range(TURNS * len(claim.holders)):
        holder = claim.holders[turn % len(claim.holders)]
        try:
            found = await fetch_public(node, holder, claim.held, parameters=count, momentum=count if momentum else 0)
        except TransportError as error:
            log.debug("state %d of stage %d from %s: %s", claim.held, stage, holder, error)
            await asyncio.sleep(PAUSE)
            continue
        if await asyncio.to_thread(digest_of, found) == claim.weights:
            return found
        log.warning("state %d of stage %d from %s is not what the chain says", claim.held, stage, holder)
    return None


async def after_merge(node: Node, roster: Roster, stage: int, *, until: int, momentum: bool) -> Merged | None:
    """The state after the merge of `roster`'s round, as most of the stage's replicas say; None up to block `until`."""
    replicas = roster.stages[stage]
    block = (await node.chain.finalized()).number
    while block <= until:
        records = records_of(await node.state(block))
        for claim in claims(records, replicas, run=node.loaded.run_id, at_most=roster.round + 1):
            agreed = 2 * len(claim.holders) > len(replicas) or len(replicas) <= 2
            if claim.held == roster.round + 1 and agreed:
                found = await take(node, stage, claim, momentum=momentum)
                if found is not None:
                    return found
        block = max(block + 1, (await node.chain.finalized()).number)
    return None
