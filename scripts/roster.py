"""`orion roster`: the sceptic's view. Every roster of a run recomputed from the chain alone, the last one printed.

Nothing is taken from a node: round 0 is gathered again, every later roster follows from the one before and the chain's
states. The digest printed is what the records of that round must carry.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from neurons.history import StateAt, replay
from scripts.options import TEMPO
from scripts.resume import CHAIN_FILE, FILE, RunFile
from subnet.chain import BittensorChain, ChainError
from subnet.commandline import UsageError, status_of
from subnet.manifest import LoadedManifest, ManifestError, load_manifest
from subnet.metagraph import ChainState
from subnet.swarm.roster import NO_WEIGHTS, Anchor, Member, Roster, Standing

TIMEOUT = 30.0


class RosterError(Exception):
    """There is no roster to print: one line with the remedy."""


class RosterOptionError(RosterError, UsageError):
    """Options that say of no run, or of two."""


@dataclass(frozen=True, slots=True)
class Explained:
    """A roster, the state it began at, and the newest reason of every neuron with the round it was given in."""

    roster: Roster
    state: ChainState
    reasons: dict[str, tuple[int, str]]


async def explain(loaded: LoadedManifest, state_at: StateAt, *, until: int) -> Explained | None:
    """Replay up to block `until`; None if round 0 had not gathered by then."""
    roster: Roster | None = None
    reasons: dict[str, tuple[int, str]] = {}
    async for refreshed in replay(loaded, state_at, until=until):
        roster = refreshed.roster
        reasons.update({hotkey: (roster.round, why) for hotkey, why in refreshed.reasons.items()})
    return Explained(roster, await state_at(roster.block), reasons) if roster is not None else None


def show_roster(
    *,
    at: int | None,
    run: Path | None,
    network: str | None,
    manifest: Path | None,
    netuid: int | None,
    archive: str | None,
) -> int:
    """Print the roster in force at block `at`; 0 done, 1 refused, 2 for options that cannot be."""
    try:
        loaded, endpoint = _source(run, network, manifest)
        explained = asyncio.run(_explain(loaded, endpoint, netuid, archive, at))
    except (ManifestError, ChainError, RosterError) as error:
        hint = _restart(run) if run is not None and isinstance(error, ChainError) else ""
        print(f"orion roster: {error}{hint}", file=sys.stderr)
        return status_of(error)
    _print(explained)
    return 0


def _restart(run: Path) -> str:
    """How to bring an ended run's chain back, to read it."""
    try:
        kept = RunFile.model_validate_json((run / FILE).read_bytes())
    except (OSError, ValidationError):
        return ""
    netuid = load_manifest(run / "manifest.toml").manifest.run.netuid
    return (
        f"; if the run has ended, bring its chain back: orion chain --state {(run / CHAIN_FILE).parent} --ready-file "
        f"{run / 'chain.url'} --port 0 --netuid {netuid} --tempo {TEMPO} --block-time {kept.block_time}"
    )


def _source(run: Path | None, network: str | None, manifest: Path | None) -> tuple[LoadedManifest, str]:
    if run is not None and network is None and manifest is None:
        url = run / "chain.url"
        if not url.is_file():
            raise RosterError(f"{run} has no chain.url: give the folder of a local run, or --network and --manifest")
        return load_manifest(run / "manifest.toml"), url.read_text().strip()
    if run is None and network is not None and manifest is not None:
        return load_manifest(manifest), network
    raise RosterOptionError("give either --run, or --network together with --manifest")


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
        explained = await explain(loaded, chain.state_at, until=until)
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
    print(f"round {roster.round} from block {roster.block}, roster {roster.digest.hex()}")
    for stage, (replicas, anchor) in enumerate(zip(roster.stages, roster.anchors, strict=True)):
        print(f"stage {stage}: {len(replicas)} active, {len(roster.joining(stage))} joining, {_state(anchor)}")
    print(f"{'uid':>5}  {'hotkey':<48}  {'where':<14}  {'since':>5}  why")
    for neuron in explained.state.neurons:  # nobody else is ever in a roster
        number, why = explained.reasons[neuron.hotkey]
        member = roster.member(neuron.hotkey)
        since = number if member is None else member.since
        struck = f" ({member.strikes} strikes)" if member is not None and member.strikes else ""
        print(f"{neuron.uid:>5}  {neuron.hotkey:<48}  {_where(member):<14}  {since:>5}  {why}{struck}")


def _state(anchor: Anchor) -> str:
    return f"state {anchor.held} {anchor.weights.hex()[:16]}" if anchor.weights != NO_WEIGHTS else "state from the seed"


def _where(member: Member | None) -> str:
    if member is None:
        return "out"
    where = member.standing.value
    if member.stage is not None:
        where = f"{where} {member.stage}"
    if member.moving is not None:
        where = f"{where} → {member.moving}"
    return f"{where} until {member.until}" if member.standing is Standing.BENCH else where
