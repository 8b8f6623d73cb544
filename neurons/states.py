"""Finding a stage's public state among its replicas: who says on chain to hold which, and who serves it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from neurons.download import Download, DownloadError, download
from neurons.node import Node
from neurons.progress import Meter, Standing, followed
from neurons.telemetry import Downloading
from subnet.swarm.codec import codec_of
from subnet.swarm.merge import Merged
from subnet.swarm.public import VALUE_BYTES, counts_of
from subnet.swarm.record import Record
from subnet.swarm.roster import NO_WEIGHTS, Roster, records_of

log = logging.getLogger("orion.neurons.states")


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
    """What the stage's other replicas say at the newest finalized block, as far as it can be believed, newest first:
    what most of those say who say anything, and the state that the roster counts, whoever has it."""
    records = records_of(await node.state((await node.chain.finalized()).number))
    me, run, anchor = node.identity.hotkey, node.loaded.run_id, roster.anchors[stage]
    replicas = [hotkey for hotkey in roster.stages[stage] if hotkey != me]
    said = claims(records, replicas, run=run, at_most=at_most)
    voices = sum(len(claim.holders) for claim in said)
    others = [hotkey for hotkey in (*replicas, *roster.joining(stage)) if hotkey != me]
    anchored = [
        claim
        for claim in claims(records, others, run=run, at_most=at_most)
        if (claim.held, claim.weights) == (anchor.held, anchor.weights)
    ]
    most = [claim for claim in said if 2 * len(claim.holders) > voices]
    return sorted({*most, *anchored}, key=lambda claim: (-claim.held, -len(claim.holders), claim.weights))


async def said_beyond(node: Node, roster: Roster, stage: int) -> bool:
    """Whether any other replica of the stage says to hold more than the rounds before `roster`'s merged."""
    records = records_of(await node.state((await node.chain.finalized()).number))
    said = (records.get(hotkey) for hotkey in roster.stages[stage] if hotkey != node.identity.hotkey)
    return any(
        record is not None
        and record.run == node.loaded.run_id
        and record.weights != NO_WEIGHTS
        and record.held > roster.round
        for record in said
    )


async def take(node: Node, stage: int, claim: Claim, *, folder: Path | None = None) -> Download | None:
    """The claimed state from its holders, proven by its digest; None if nobody serves it.

    With a folder, what arrived before a kill is not fetched again.
    """
    counts = counts_of(node.parameters[stage], codec_of(node.loaded.manifest.merge.codec))
    total, meter = VALUE_BYTES * sum(counts.values()), Meter()

    def tell(standing: Standing) -> None:
        log.info("stage %d, state after %d rounds: %s", stage, claim.held, standing.text())
        if standing.done < total:
            node.telemetry.emit(
                Downloading(
                    held=claim.held,
                    stage=stage,
                    bytes=int(standing.done),
                    total=total,
                    rate=round(standing.rate or 0.0),
                )
            )

    try:
        async with followed(meter, tell):
            return await download(
                node.dendrite,
                node.neighbours.endpoint,
                sources=claim.holders,
                run=node.loaded.run_id,
                held=claim.held,
                agreed=claim.weights,
                counts=counts,
                folder=folder,
                progress=lambda here, pieces: meter.at(total * here // pieces, total),
            )
    except DownloadError as error:
        log.warning("stage %d: %s", stage, error)
        return None


async def after_merge(node: Node, roster: Roster, stage: int, *, until: int) -> Merged | None:
    """The state after the merge of `roster`'s round, as most of the stage's replicas say; None up to block `until`."""
    replicas = roster.stages[stage]
    block = (await node.chain.finalized()).number
    while block <= until:
        records = records_of(await node.state(block))
        for claim in claims(records, replicas, run=node.loaded.run_id, at_most=roster.round + 1):
            agreed = 2 * len(claim.holders) > len(replicas) or len(replicas) <= 2
            if claim.held == roster.round + 1 and agreed:
                found = await take(node, stage, claim)
                if found is not None:
                    return found.state
        block = max(block + 1, (await node.chain.finalized()).number)
    return None
