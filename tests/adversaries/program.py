"""An adversary as a program: the real miner (or validator) with one part replaced.

    python -m tests.adversaries sign-flip [--share 0.1] [--packed] [--strength 2] --network … --wallet … (as a miner)

It cheats if its stage is one that its kind fits; with --first only if it is the one that `places.choose` names, so that
a whole swarm can be started so before anybody knows who will hold what.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

from model.engine import StageEngine
from neurons.miner import mine
from neurons.node import Node, main
from neurons.pipeline import StageWorker
from neurons.rounds import RoundMachine, build_worker
from neurons.telemetry import Intervention
from neurons.terms import Terms
from subnet.identity import Identity
from subnet.swarm.roster import Roster
from subnet.wallets import load_wallet
from tests.adversaries.copier import copy_weights
from tests.adversaries.engine import CheatingEngine, Memory, SharedEngine
from tests.adversaries.evidence import SilentDesk, copy_sibling
from tests.adversaries.forging import ForgingWorker
from tests.adversaries.holders import lying
from tests.adversaries.kinds import PROFILES, AdversaryError, Kind, Plan, Role
from tests.adversaries.places import accomplice, choose, fits

log = logging.getLogger("orion.adversaries")

OTHER_TOKENS = 0
"""The sample whose tokens a head trains on in place of all others."""


class Part:
    """What one process plays, once it knows its place in a roster."""

    def __init__(self, node: Node, plans: Sequence[Plan], *, first: bool) -> None:
        self.node = node
        self.memory: Memory | None = None
        """Of the engine that cheats now."""
        self._plans = {plan.kind: plan for plan in plans}
        self._first = first
        self._decided = False
        self._plan: Plan | None = None

    def plan(self) -> Plan | None:
        """How this node cheats, None if it is honest: fixed by the first roster that gives it a stage."""
        roster, telemetry = self.node.history.newest, self.node.telemetry
        if not self._decided and roster is not None and self.node.identity.hotkey in roster.members:
            self._decided, kind = True, self._cast(roster)
            if kind is not None:
                self._plan = self._plans[kind]
                telemetry.emit(Intervention("cheat", self.node.config.name, roster.round, f"--adversary {kind}"))
        return self._plan

    def plays(self, *kinds: Kind) -> bool:
        plan = self.plan()
        return plan is not None and plan.kind in kinds

    def _cast(self, roster: Roster) -> Kind | None:
        me = self.node.identity.hotkey
        if self._first:
            return choose(list(self._plans), roster.stages).get(me)
        stage = roster.stage_of(me)
        for kind in self._plans:
            if stage is not None and fits(PROFILES[kind].role, stage, len(roster.stages)):
                return kind
            log.error("stage %s is no place for '%s': this node is honest", stage, kind)
        return None

    def colluder(self, roster: Roster) -> Identity | None:
        """Who signs for what this node forges: its keys lie beside this node's."""
        name = accomplice(self.node.identity.hotkey, roster.stages)
        return None if name is None else _identity(self.node, name)


def _identity(node: Node, hotkey: str) -> Identity | None:
    """The key pair of a hotkey in this node's wallet."""
    config = node.config
    for path in sorted((config.wallet_path / config.wallet / "hotkeys").iterdir()):
        if path.suffix == "":
            identity = Identity(load_wallet(config.wallet, path.name, config.wallet_path))
            if identity.hotkey == hotkey:
                return identity
    return None


def machine(part: Part) -> type[RoundMachine]:
    """A round machine with the parts that the kind replaces."""
    node = part.node

    class OneDevice(SharedEngine):
        device = node.config.out / "adversaries.device"

    class Forger(ForgingWorker):
        colluder = staticmethod(part.colluder)

    class Machine(RoundMachine):
        def _build(self) -> StageWorker:
            engine: Callable[..., StageEngine] = StageEngine
            plan = part.plan()
            if plan is not None and PROFILES[plan.kind].falsifies:
                part.memory = Memory(plan, lambda: node.corpus.sample(OTHER_TOKENS)[:, :-1])
                engine = partial(CheatingEngine, cheat=plan, memory=part.memory)
            elif part.plays(Kind.SYBIL):
                engine = OneDevice
            worker = Forger if part.plays(Kind.FORGED_RECEIPTS) else StageWorker
            return build_worker(node, self.stage, engine=engine, worker=worker)

        def _terms(self, roster: Roster, *, end: int | None = None) -> Terms:
            terms = super()._terms(roster, end=end)
            return lying(terms) if part.plays(Kind.LYING_HOLDER, Kind.COLLUDING_HOLDERS) else terms

    return Machine


async def play(node: Node, plans: Sequence[Plan], *, first: bool) -> None:
    """An adversary's whole life in one run."""
    if any(PROFILES[plan.kind].role is Role.VALIDATOR for plan in plans):
        node.telemetry.emit(Intervention("cheat", node.config.name, 0, f"--adversary {Kind.WEIGHT_COPIER}"))
        await copy_weights(node)
        return
    part = Part(node, plans, first=first)

    class Desk(SilentDesk):
        silent = staticmethod(lambda: part.plays(Kind.WITHHELD_EVIDENCE))

    copying = asyncio.create_task(copy_sibling(node, lambda: part.memory if part.plays(Kind.COPYCAT) else None))
    try:
        await mine(node, desk=Desk, machine=machine(part))
    finally:
        copying.cancel()
        await asyncio.gather(copying, return_exceptions=True)


def run(argv: list[str]) -> int:
    """The program: a kind, its options and a neuron's flags in, exit status out."""
    parser = argparse.ArgumentParser(prog="python -m tests.adversaries", allow_abbrev=False, description=__doc__)
    parser.add_argument("kinds", metavar="KIND[,KIND...]", help=", ".join(Kind))
    parser.add_argument("--first", action="store_true", help="cheat only if this node is the first that fits")
    parser.add_argument("--strength", type=float, default=None, help="how strongly (default: the kind's)")
    parser.add_argument("--share", type=float, default=1.0, help="of its units (default: 1)")
    parser.add_argument("--packed", action="store_true", help="all units of a share of its windows")
    parser.add_argument("--cheat-seed", type=int, default=0, help="of its chance (default: 0)")
    flags, rest = parser.parse_known_args(argv)
    try:
        kinds = [Kind.parse(text) for text in flags.kinds.split(",")]
        plans = [
            Plan.of(kind, strength=flags.strength, share=flags.share, packed=flags.packed, seed=flags.cheat_seed)
            for kind in kinds
        ]
    except AdversaryError as error:
        parser.error(str(error))
    validates = any(PROFILES[kind].role is Role.VALIDATOR for kind in kinds)
    if len(kinds) > 1 and (validates or not flags.first):
        parser.error("several kinds go with --first, and are those of miners: give one")
    description = "\n".join(f"{kind}: {PROFILES[kind].gains} {PROFILES[kind].stopped_by}" for kind in kinds)
    role = "validator" if validates else "miner"
    return main(rest, role=role, description=description, body=partial(play, plans=plans, first=flags.first))
