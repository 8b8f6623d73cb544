"""Catching up: how a replica without its stage's newest public state gets there, off the live path.

A joiner, a replica that fell behind and one that was restarted do the same: take the newest state that siblings hold
(or their own checkpoint, if that is it), follow the merges since, and say on chain what they hold; the roster does the
rest. Who never held the stage first computes units of a sibling again and compares, as an auditor would: a machine
that computes something else must not reach the live path. Nobody waits for any of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from neurons.bench import replay_units
from neurons.fetching import Source, Unsound, Withheld
from neurons.keeper import Keeper
from neurons.node import Node
from neurons.rounds import MARGIN, RoundMachine
from neurons.slots import slot_seeds
from neurons.states import newest_claims, take
from neurons.telemetry import Downloaded, ShadowChecked
from subnet.swarm.merge import Merged
from subnet.swarm.record import Record
from subnet.swarm.roster import NO_WEIGHTS, Anchor, Roster, records_of
from subnet.trust.audit import pick_windows, select_units
from subnet.trust.finding import Finding

log = logging.getLogger("orion.neurons.joining")

SHADOW_UNITS = 4
LOOK_BLOCKS = 4


class Joiner:
    """Brings one machine to the state that the next roster asks for."""

    def __init__(self, node: Node, machine: RoundMachine, keeper: Keeper) -> None:
        self._node = node
        self._machine = machine
        self._keeper = keeper
        self._checked = False
        """Whether this machine has computed a sibling's units like the sibling."""

    async def restore(self) -> None:
        """Go on from this node's own checkpoints of the stage, if there are any."""
        machine = self._machine
        found = await self._keeper.stage_state(machine.stage)
        if found is None:
            return
        held, tensors = found
        machine.adopt(self._public(tensors), held)
        cut = await self._keeper.last_cut()
        if cut is not None and cut.stage == machine.stage:
            machine.restore(cut)
        await machine.serve()
        self._checked = True
        log.info("stage %d goes on from its checkpoint after %d rounds", machine.stage, held)

    async def match(self, anchor: Anchor) -> None:
        """Go back to the checkpoint that a stage without replicas restarts from, if it is here."""
        machine = self._machine
        if anchor.weights in (NO_WEIGHTS, machine.digest):
            return
        found = await self._keeper.stage_state(machine.stage, at_most=anchor.held)
        if found is None or found[0] != anchor.held:
            return
        machine.adopt(self._public(found[1]), anchor.held)
        await machine.serve()

    def _public(self, tensors: Mapping[str, torch.Tensor]) -> Merged:
        theta = torch.cat([tensors[name].reshape(-1) for name in self._machine.parameter_names])
        return Merged(theta, tensors["outer.momentum"])

    async def catch_up(self, roster: Roster, *, counts: bool) -> None:
        """Until the state is held that a replica of the next round needs, or that round begins.

        `counts`: the roster has this replica as active already.
        """
        node, machine = self._node, self._machine
        if not set(roster.stages[machine.stage]) - {node.identity.hotkey}:
            await self.match(roster.anchors[machine.stage])
        goal = roster.round + (0 if machine.overlapped else 1)
        ends = roster.block + node.loaded.manifest.round.length - MARGIN
        # A merge with an own contribution goes on from before a restart: its outcome comes first.
        await machine.settle(machine.replica.held)
        # A sign of life first: what follows may take longer than the round. Unchecked, nothing is claimed yet.
        ready = counts or self._checked
        await node.publish(machine.state_record if ready else replace(machine.state_record, weights=NO_WEIGHTS))
        while machine.replica.held < goal and (block := (await node.chain.finalized()).number) < ends:
            newer = await self._newer(roster, counts=counts)
            if newer or await self._follow(roster, block) or await self._carry(roster):
                continue
            await node.wait(min(ends, block + LOOK_BLOCKS))
        if not counts and not self._checked and not await self._shadow(roster):
            log.error("this machine computes other values than stage %d's replicas: it does not join", machine.stage)
            return
        await node.publish(machine.state_record)

    async def _newer(self, roster: Roster, *, counts: bool) -> bool:
        """Take a newer state than the one held from whoever says to have one."""
        node, machine = self._node, self._machine
        start = asyncio.get_running_loop().time()
        for claim in await newest_claims(node, roster, machine.stage, at_most=roster.round + 1):
            if claim.held < machine.replica.held:
                return False
            if claim.weights == machine.digest:
                if claim.held == machine.replica.held:
                    return False
                await machine.renumber(claim.held)
                return True
            if claim.held == machine.replica.held and (counts or not set(claim.holders) & roster.members):
                continue
            found = await take(node, machine.stage, claim, folder=node.downloads)
            if found is None:
                continue
            machine.adopt(found.state, claim.held)
            await machine.serve()
            seconds = round(asyncio.get_running_loop().time() - start, 3)
            node.telemetry.emit(
                Downloaded(
                    held=claim.held,
                    stage=machine.stage,
                    bytes=found.received,
                    seconds=seconds,
                    sources=len(found.sources),
                )
            )
            return True
        return False

    async def _carry(self, roster: Roster) -> bool:
        """Where nobody says to have a newer state than the one that counts, and the rounds since are beyond what can
        be followed, they were void: the state held is the newest there is."""
        machine = self._machine
        anchor, base = roster.anchors[machine.stage], machine.base_of(roster)
        known = self._node.history.roster(machine.replica.held) is not None
        counts = machine.digest == anchor.weights or (machine.replica.held == 0 == anchor.held)
        if known or not counts or machine.replica.held >= base:
            return False
        log.info("stage %d: nothing was merged since round %d", machine.stage, machine.replica.held)
        await machine.renumber(base)
        return True

    async def _follow(self, roster: Roster, block: int) -> bool:
        """Follow the merge that leads from the state held to the next; False if it is not due or not known."""
        node, machine = self._node, self._machine
        known = node.history.roster(machine.replica.held)
        marks = node.loaded.manifest.round
        if known is None or known.round > roster.round or known.block + marks.close > block:
            return False
        before = machine.replica.held
        machine.watch(known, end=block + (marks.merge - marks.have))
        await machine.settle(known.round)
        machine.forget(known.round)
        return machine.replica.held > before

    async def _shadow(self, roster: Roster) -> bool:
        """Compute units of siblings again with their weights until one agrees; False if none of those compared did.

        One that differs may itself be what is wrong, so the next is asked.
        """
        node, machine = self._node, self._machine
        closed = node.history.roster(roster.round - 1)
        if closed is None:
            return True
        records = records_of(await node.state(closed.block + node.loaded.manifest.round.cut))
        seeds = await slot_seeds(node, closed)
        compared = False
        for sibling in closed.stages[machine.stage]:
            findings = await self._compare(sibling, closed, records.get(sibling), seeds)
            if not findings:
                continue
            compared, passed = True, all(finding.passed for finding in findings)
            node.telemetry.emit(
                ShadowChecked(
                    stage=machine.stage,
                    sibling=sibling,
                    units=len({(finding.sample, finding.check) for finding in findings}),
                    passed=passed,
                    error=round(max(finding.error for finding in findings), 6),
                )
            )
            if passed:
                self._checked = True
                return True
        return not compared

    async def _compare(self, sibling: str, closed: Roster, record: Record | None, seeds: list[bytes]) -> list[Finding]:
        """What comes of units of one sibling's closed round; nothing if it serves none."""
        node, machine, stage = self._node, self._machine, self._machine.stage
        if record is None or not record.fixes(closed.round):
            return []
        manifest, me = node.loaded.manifest, node.identity.hotkey
        source = Source.of(node, sibling, stage=stage, number=closed.round)
        try:
            evidence = await source.tables(record, samples=manifest.samples(closed.round))
            picked = pick_windows(evidence.heads, seeds=seeds, hotkey=sibling, count=manifest.audit.windows)
            if not picked:
                return []
            head, seed = picked[-1]
            leaves = select_units(evidence, head, secret=me.encode(), seed=seed, hotkey=sibling, count=SHADOW_UNITS)
            public = machine.replica.public.theta
            _, theta = await source.weights(head, public, held=machine.replica.held)
            units = [(leaf, await source.unit(leaf)) for leaf in leaves]
        except (Withheld, Unsound) as error:
            log.info("nothing of %s is compared: %s", sibling, error)
            return []
        findings = await asyncio.to_thread(
            machine.engine.with_room,
            lambda: replay_units(
                machine.engine.stage,
                theta,
                units,
                node.corpus,
                accumulation=manifest.optimizer.accumulation,
                tolerance=lambda _: manifest.audit.tolerance,
                hotkey=sibling,
                number=closed.round,
            ),
        )
        machine.engine.replace_weights(machine.replica.base)
        return findings
