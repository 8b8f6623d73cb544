"""`orion roster`: the sceptic's view. Every roster of a run recomputed from the chain alone, the last one printed.

Nothing is taken from a node: round 0 is gathered again, every later roster follows from the one before and the chain's
states. The digest printed is what the records of that round must carry.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from neurons.history import replay
from subnet.chain import BittensorChain, Chain, ChainError
from subnet.manifest import LoadedManifest, ManifestError, load_manifest
from subnet.metagraph import ChainState
from subnet.swarm.roster import NO_WEIGHTS, Anchor, Member, Roster, Standing

TIMEOUT = 30.0


class RosterError(Exception):
    """There is no roster to print: one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Explained:
    """A roster, the state it began at, and the newest reason of every neuron with the round it was given in."""

    roster: Roster
    state: ChainState
    reasons: dict[str, tuple[int, str]]


async def explain(loaded: LoadedManifest, chain: Chain, *, until: int) -> Explained | None:
    """Replay up to block `until`; None if round 0 had not gathered by then."""
    roster: Roster | None = None
    reasons: dict[str, tuple[int, str]] = {}
    async for refreshed in replay(loaded, chain.state_at, until=until):
        roster = refreshed.roster
        reasons.update({hotkey: (roster.round, why) for hotkey, why in refreshed.reasons.items()})
    return Explained(roster, await chain.state_at(roster.block), reasons) if roster is not None else None


def show_roster(
    *,
    at: int | None,
    run: Path | None,
    network: str | None,
    manifest: Path | None,
    netuid: int | None,
    archive: str | None,
) -> int:
    """Print the roster in force at block `at`; 0 done, 1 refused."""
    try:
        loaded, endpoint = _source(run, network, manifest)
        explained = asyncio.run(_explain(loaded, endpoint, netuid, archive, at))
    except (ManifestError, ChainError, RosterError) as error:
        print(f"orion roster: {error}", file=sys.stderr)
        return 1
    _print(explained)
    return 0


def _source(run: Path | None, network: str | None, manifest: Path | None) -> tuple[LoadedManifest, str]:
    if run is not None and network is None and manifest is None:
        url = run / "chain.url"
        if not url.is_file():
            raise RosterError(f"{run} has no chain.url: give the folder of a local run, or --network and --manifest")
        return load_manifest(run / "manifest.toml"), url.read_text().strip()
    if run is None and network is not None and manifest is not None:
        return load_manifest(manifest), network
    raise RosterError("give either --run, or --network together with --manifest")


async def _explain(
    loaded: LoadedManifest, endpoint: str, netuid: int | None, archive: str | None, at: int | None
) -> Explained:
    subnet = loaded.manifest.run.netuid if netuid is None else netuid
    chain = await BittensorChain.connect(endpoint, subnet, None, timeout=TIMEOUT, archive=archive)
    try:
        newest = (await chain.finalized()).number
        until = newest if at is None else at
        if until > newest:
            raise RosterError(f"block {until} is not final, the last one is {newest}: give an earlier --at")
        explained = await explain(loaded, chain, until=until)
    finally:
        await chain.close()
    if explained is None:
        raise RosterError(
            f"round 0 had not gathered by block {until}: {loaded.manifest.swarm.stages} stages wait for "
            f"{loaded.manifest.swarm.replicas} replicas each"
        )
    return explained


def _print(explained: Explained) -> None:
    roster = explained.roster
    console = Console()
    console.print(f"round {roster.round} from block {roster.block}, roster {roster.digest.hex()}", highlight=False)
    for stage, (replicas, anchor) in enumerate(zip(roster.stages, roster.anchors, strict=True)):
        joining = len(roster.joining(stage))
        console.print(f"stage {stage}: {len(replicas)} active, {joining} joining, {_state(anchor)}", highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("uid", "hotkey", "standing", "stage", "since round", "strikes", "why"):
        table.add_column(column, overflow="fold" if column == "why" else "ellipsis")
    present = {neuron.hotkey for neuron in explained.state.neurons}
    rows = [(str(neuron.uid), neuron.hotkey) for neuron in explained.state.neurons]
    rows += [("-", member.hotkey) for member in roster.table if member.hotkey not in present]
    for uid, hotkey in rows:
        number, why = explained.reasons.get(hotkey, (roster.round, "never valid"))
        table.add_row(uid, hotkey, *_row(roster.member(hotkey), number), why)
    console.print(table)


def _state(anchor: Anchor) -> str:
    return f"state {anchor.held} {anchor.weights.hex()[:16]}" if anchor.weights != NO_WEIGHTS else "state from the seed"


def _row(member: Member | None, number: int) -> tuple[str, str, str, str]:
    """Standing, stage, since and strikes as text."""
    if member is None:
        return "out", "-", str(number), "-"
    stage = "-" if member.stage is None else str(member.stage)
    if member.moving is not None:
        stage = f"{stage} → {member.moving}"
    standing = member.standing.value
    if member.standing is Standing.BENCH:
        standing = f"{standing} until {member.until}"
    return standing, stage, str(member.since), str(member.strikes)
