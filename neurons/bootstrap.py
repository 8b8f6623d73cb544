"""How a newcomer learns the roster: from any peer, if most of the permitted stake commits to it on chain.

Nobody has to be trusted: a snapshot is known by its digest. A sceptic who does not believe the stake either replays
history (`neurons.history.replay`) and compares.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping

import torch

from neurons.history import History, StateAt, lag
from subnet.manifest import LoadedManifest
from subnet.messages import RosterRequest, RosterSnapshot
from subnet.metagraph import ChainState
from subnet.swarm.roster import Roster, records_of
from subnet.swarm.snapshot import KEPT, SNAPSHOT_LIMIT, SnapshotError, agreed_digest, parse
from subnet.transport.axon import Axon, Reply
from subnet.transport.dendrite import NO_SPECS, Dendrite
from subnet.transport.errors import Dropped, TransportError, UnknownRun
from subnet.transport.synapse import HEADER_LIMIT, tensor_bytes

log = logging.getLogger("orion.neurons.bootstrap")

PEER_DEADLINE = 10.0


class BootstrapError(Exception):
    """No roster can be had from peers: one line with the remedy."""


class RosterDesk:
    """Serves the last rosters by their digest."""

    def __init__(self, run_id: bytes) -> None:
        self._run = run_id.hex()
        self._held: OrderedDict[str, bytes] = OrderedDict()

    def open(self, axon: Axon) -> None:
        axon.serve(RosterRequest, self.roster, specs=NO_SPECS)

    def keep(self, roster: Roster) -> None:
        self._held[roster.digest.hex()] = roster.encoded
        while len(self._held) > KEPT:
            self._held.popitem(last=False)

    async def roster(self, _caller: str, request: RosterRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        if request.run != self._run:
            raise UnknownRun(f"run {request.run} is not {self._run}", "start with the manifest that is on chain")
        raw = self._held.get(request.digest)
        if raw is None:
            raise Dropped(f"roster {request.digest} is not kept here", "ask for the one that the stake commits to")
        return RosterSnapshot(size=len(raw)), {
            "roster": torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(1, -1)
        }


async def fetch_roster(
    dendrite: Dendrite, loaded: LoadedManifest, state: ChainState, *, asker: str, digest: bytes | None = None
) -> Roster:
    """The roster that more than two thirds of the permitted stake carry at `state`, or the one with `digest`.

    Every peer is asked once, those who carry the digest first, in an order of the asker's own. Raises `BootstrapError`.
    """
    wanted = agreed_digest(state, loaded.run_id) if digest is None else digest
    if wanted is None:
        raise BootstrapError(
            f"no roster has more than two thirds of the permitted stake at block {state.head.number}: "
            "wait for a block in the middle of a round, or replay from round 0"
        )
    records = records_of(state)

    def turn(hotkey: str) -> tuple[bool, bytes]:
        record = records.get(hotkey)
        carries = record is not None and record.roster == wanted
        return not carries, hashlib.sha256(f"{asker}/{hotkey}".encode()).digest()

    endpoints = {n.hotkey: n.endpoint.url for n in state.neurons if n.endpoint is not None and n.hotkey != asker}
    for hotkey in sorted(endpoints, key=turn):
        try:
            _, tensors = await dendrite.call(
                endpoints[hotkey],
                hotkey,
                RosterRequest(run=loaded.run_id.hex(), digest=wanted.hex()),
                reply=RosterSnapshot,
                reply_specs=RosterSnapshot.specs,
                max_reply_bytes=HEADER_LIMIT + SNAPSHOT_LIMIT,
                deadline=PEER_DEADLINE,
            )
            roster = parse(bytes(tensor_bytes(tensors["roster"])))
        except (TransportError, SnapshotError) as error:
            log.debug("roster from %s: %s", hotkey, error)
            continue
        if roster.digest == wanted and len(roster.anchors) == loaded.manifest.swarm.stages:
            return roster
        log.warning("%s serves roster %s, asked for %s", hotkey, roster.digest.hex(), wanted.hex())
    raise BootstrapError(
        f"none of {len(endpoints)} peers serves roster {wanted.hex()}: "
        "try again in the next round, or replay from round 0"
    )


async def join_history(
    dendrite: Dendrite, loaded: LoadedManifest, state: ChainState, state_at: StateAt, *, asker: str
) -> History:
    """The run's history from the roster in force at `state` on. Raises `BootstrapError`."""
    newest = await fetch_roster(dendrite, loaded, state, asker=asker)
    known = [newest]
    if lag(loaded.manifest.round) > 1 and newest.round > 0:
        known.insert(0, await fetch_roster(dendrite, loaded, state, asker=asker, digest=newest.parent))
    return History(loaded, state_at, known=known)
