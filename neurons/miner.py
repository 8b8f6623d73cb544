"""The miner: holds one stage, trains it with its neighbours, merges with its siblings, answers for its work.

    python -m neurons.miner --network ws://127.0.0.1:9944 --wallet w --hotkey miner-0 \\
        --manifest manifest.toml --data shards/ --port 8091

It announces itself (axon and record) and then does in every round what the roster says of it: wait, catch up with a
stage's public state, or train. It may come late, be killed and started again (same --out), or leave: SIGUSR1 makes it
hand its stage over at the end of the round and exit by itself. SIGTERM stops it at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

import torch

from model.relief import release
from neurons.archive import Archive
from neurons.desks import EvidenceDesk, PushDesk
from neurons.joining import Joiner
from neurons.keeper import Keeper, KeptCut
from neurons.library import Library
from neurons.machine import room
from neurons.needs import miner_needs, shortfall
from neurons.node import Node, NodeError, main
from neurons.quota import Uplink
from neurons.ring import least_ring
from neurons.rounds import BehindError, RoundMachine, traffic
from neurons.shelf import Shelf
from neurons.stores import StoreError
from neurons.telemetry import EvidenceLost, NodeFinished, StateChanged, WindowGivenUp
from neurons.vault import Vault
from subnet.quantities import written
from subnet.swarm.record import DEVICE_SHIFT, Flags, Phase, Record
from subnet.swarm.roster import NO_WEIGHTS, Roster, Standing
from subnet.trust.quota import LEAST_UPLINK, ROUNDS_KEPT
from subnet.trust.tolerance import Device

log = logging.getLogger("orion.neurons.miner")

STATES = {Standing.WAIT: "waiting", Standing.JOIN: "joining", Standing.ACTIVE: "active", Standing.BENCH: "benched"}


class Miner:
    """A miner's whole life in one run. It answers for its work through a `desk` and plays rounds with a `machine`."""

    def __init__(
        self,
        node: Node,
        keeper: Keeper,
        *,
        desk: type[EvidenceDesk] = EvidenceDesk,
        machine: type[RoundMachine] = RoundMachine,
    ) -> None:
        self._node = node
        self._desk_type, self._machine_type = desk, machine
        self._keeper = keeper
        config = node.config
        shelf = Shelf(config.out, config.name, manifest_hash=node.loaded.digest.hex(), limit=config.evidence_disk)
        self._archive = Archive(limit=config.ring, shelf=shelf, given_up=self._give_up, lost=self._lose)
        self._library = Library(node.loaded.run_id)
        self._pushes = PushDesk()
        self._machine: RoundMachine | None = None
        self._joiner: Joiner | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._state = ""

    async def run(self) -> None:
        """From the first roster to the last, or until it has left."""
        node = self._node
        node.flags |= (Device.CUDA if node.device.type == "cuda" else Device.CPU) << DEVICE_SHIFT
        torch.set_float32_matmul_precision("highest")  # no TF32 on a card: its class is fp32
        uplink = node.config.uplink
        if uplink < LEAST_UPLINK:
            raise NodeError(
                f"--uplink {uplink / 1e6:g}mbit is less than the {LEAST_UPLINK / 1e6:g}mbit that validators count on: "
                "give what the machine can send, or use another line"
            )
        self._desk_type(node.loaded.run_id, self._archive, self._library, Uplink(uplink)).open(node.axon)
        self._library.open(node.axon)
        self._pushes.open(node)
        await node.listen()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._leave)
        try:
            cut = await self._keeper.last_cut()
            if cut is not None:
                await self._take_stage(cut.stage)
            await self._recall(None if cut is None else cut.round)
            kept = self._machine.kept_round if self._machine is not None else None
            announced = await node.publish(self._record()) if kept is None else None
            roster = await node.enter()
            # Who was not there when the round began sits the rest of it out: its siblings have its work already.
            late = announced is None or announced > roster.block
            if cut is not None and (kept is not None or roster.round < cut.round + ROUNDS_KEPT):
                await self._resume(cut)
            while not self._over(roster):
                await self._live(roster, late=late)
                late = False
                roster = await node.next_roster()
            await self._finish(roster)
        finally:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR1)
            if self._machine is not None:
                await self._machine.shut_down()

    def _leave(self) -> None:
        """Say at once that this miner wants out; the next roster is without it."""
        if not self._node.flags & Flags.LEAVING:
            log.info("leaving at the end of the round")
            self._node.flags |= Flags.LEAVING
            self._leaving = asyncio.create_task(self._node.say_again())

    def _record(self) -> Record:
        if self._machine is not None:
            return self._machine.state_record
        return Record(run=self._node.loaded.run_id, round=0, phase=Phase.READY)

    def _over(self, roster: Roster) -> bool:
        count = self._node.loaded.manifest.round.count
        at_work = roster.state_of(self._node.identity.hotkey) in (Standing.JOIN, Standing.ACTIVE)
        left = bool(self._node.flags & Flags.LEAVING) and not at_work
        return left or (count > 0 and roster.round >= count)

    # -- one round ------------------------------------------------------------------------------------------------

    async def _live(self, roster: Roster, *, late: bool) -> None:
        """Do what the roster says of this node; returns when nothing is left to do before the next one."""
        me = self._node.identity.hotkey
        self._announce(roster)
        active, target = roster.stage_of(me), roster.target_of(me)
        stage = active if active is not None else target
        if stage is None:
            await self._stand_by(roster)
            return
        machine, joiner = await self._take_stage(stage)
        if active is None or late or not machine.ready_for(roster):
            await joiner.catch_up(roster, counts=active is not None)
            return
        try:
            await machine.play(roster)
        except BehindError as error:
            log.warning("%s", error)
            await joiner.catch_up(roster, counts=True)

    async def _recall(self, number: int | None) -> None:
        """Find the evidence of the round that was cut before a restart."""
        try:
            await self._archive.recall(number)
        except StoreError as error:
            raise NodeError(str(error)) from error

    async def _resume(self, cut: KeptCut) -> None:
        """Go on with the merge that was under way at a kill, and answer for its round. Its records stay on chain: no
        other is published first."""
        machine, roster = self._machine, self._node.history.roster(cut.round)
        if machine is None or roster is None or roster.stage_of(self._node.identity.hotkey) != machine.stage:
            return
        if machine.kept_round is None:
            machine.answer_for(roster, cut)
        else:
            machine.resume_merge(roster, (await self._node.chain.finalized()).number)

    async def _stand_by(self, roster: Roster) -> None:
        """Show a sign of life, and what state is here: a stage that lost its replicas may restart from it."""
        if self._machine is not None and self._joiner is not None:
            await self._machine.settle_all()  # first: another record would take its vote in a merge from the chain
            if not roster.stages[self._machine.stage]:
                await self._joiner.match(roster.anchors[self._machine.stage])
        await self._node.publish(self._record())

    def _announce(self, roster: Roster) -> None:
        member = roster.member(self._node.identity.hotkey)
        state = STATES[member.standing] if member is not None else "out"
        stage = member.stage if member is not None else None
        if f"{state} {stage}" != self._state:
            self._state = f"{state} {stage}"
            reason = self._node.reasons.get(self._node.identity.hotkey, "no roster has seen it yet")
            self._node.telemetry.emit(StateChanged(round=roster.round, state=state, stage=stage, reason=reason))

    async def _take_stage(self, stage: int) -> tuple[RoundMachine, Joiner]:
        """The machine of a stage; another one's is given up first."""
        if self._machine is None or self._joiner is None or self._machine.stage != stage:
            self._require_ring(stage)
            if self._machine is None:  # else the other stage's evidence is missing in what is free
                await asyncio.to_thread(self._require_room, stage)
            await self._give_up_stage()
            self._machine = self._machine_type(
                self._node, stage, archive=self._archive, library=self._library, keeper=self._keeper
            )
            self._joiner = Joiner(self._node, self._machine, self._keeper)
            await self._joiner.restore()
            if self._machine.digest == NO_WEIGHTS:  # built from the seed: nobody needs it, but deltas are taken from it
                await self._library.put(self._machine.replica.held, self._machine.replica.public)
            self._pushes.worker = self._machine.worker
        return self._machine, self._joiner

    async def _give_up_stage(self) -> None:
        """Before another is built, for which the memory is chosen that is free then."""
        if self._machine is None:
            return
        await self._machine.settle_all()
        await self._machine.shut_down()
        self._library.clear()
        self._machine = self._joiner = self._pushes.worker = None
        release(self._node.device)

    def _require_ring(self, stage: int) -> None:
        node, ring = self._node, self._node.config.ring
        least = least_ring(node.loaded.manifest, node.plans[stage], node.layouts[stage])
        if ring < least:
            raise NodeError(
                f"--ring {written(ring)} is too small to answer for the work of stage {stage}, which takes "
                f"{written(least)} at least: raise it"
            )

    def _require_room(self, stage: int) -> None:
        """Of memory and disk, before anything of the stage is built."""
        node, out = self._node, self._node.config.out
        try:
            found = room(out, node.device)
        except OSError as error:
            raise NodeError(f"--out {out} cannot be used ({error.strerror}): give another folder") from error
        needs = miner_needs(node.loaded.manifest, node.plans[stage], node.layouts[stage], card=found.card)
        lacks = shortfall(needs, found, out=str(out), checkpoints_here="://" not in node.config.checkpoints)
        if lacks is not None:
            raise NodeError(lacks)

    def _give_up(self, number: int, version: int) -> None:
        self._node.telemetry.emit(WindowGivenUp(round=number, version=version, ring=self._node.config.ring))
        log.warning(
            "round %d: the ring is full before the seed is known: window %d cannot be shown, raise --ring from %s",
            number,
            version,
            written(self._node.config.ring),
        )

    def _lose(self, number: int, version: int | None, reason: str) -> None:
        self._node.telemetry.emit(EvidenceLost(round=number, version=version, reason=reason))
        what = "what its cut was taken from" if version is None else f"window {version}"
        log.error("round %d: %s cannot be shown: %s", number, what, reason)

    # -- the end --------------------------------------------------------------------------------------------------

    async def _finish(self, roster: Roster) -> None:
        """See the last merge through, and stay for the audits of the last round."""
        node = self._node
        marks = node.loaded.manifest.round
        if self._machine is not None:
            await self._machine.settle_all()
        await node.wait(roster.block + max(0, marks.merge - marks.length) + marks.linger)
        await self._archive.close()
        node.telemetry.emit(traffic(node))
        if node.flags & Flags.LEAVING:
            node.telemetry.emit(StateChanged(round=roster.round, state="left", stage=None, reason="as asked"))
        node.telemetry.emit(NodeFinished(rounds=roster.round))


async def mine(
    node: Node, *, desk: type[EvidenceDesk] = EvidenceDesk, machine: type[RoundMachine] = RoundMachine
) -> None:
    """A miner's whole life in one run."""
    vault = await Vault.open(node.config.checkpoints, manifest_hash=node.loaded.digest.hex())
    await Miner(node, Keeper(node, vault), desk=desk, machine=machine).run()


def run(argv: list[str]) -> int:
    """The program: flags in, exit status out."""
    return main(argv, role="miner", description="Hold one stage and train it.", body=mine)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
