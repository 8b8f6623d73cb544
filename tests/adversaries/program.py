"""An adversary as a program: the real miner (or validator) with one part replaced.

    python -m tests.adversaries sign-flip [--share 0.1] [--packed] [--strength 2] --network … --wallet … (as a miner)

It cheats if its stage is one that its kind fits; with --first only if it is the one that `places.choose` names, so that
a whole swarm can be started so before anybody knows who will hold what.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Callable
from functools import partial

from torch import Tensor

from model.engine import StageEngine
from neurons.desks import EvidenceDesk
from neurons.miner import mine
from neurons.node import Node, main
from neurons.pipeline import StageWorker
from neurons.rounds import RoundMachine, build_worker
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

    def __init__(self, node: Node, plan: Plan, *, first: bool) -> None:
        self.node = node
        self.plan = plan
        self._first = first
        self._playing: bool | None = None
        self.memory = Memory(plan, lambda: _tokens(node))

    def playing(self) -> bool:
        """Whether this node cheats: fixed by the first roster that gives it a stage."""
        roster = self.node.history.newest
        if self._playing is None and roster is not None and self.node.identity.hotkey in roster.members:
            self._playing = self._cast(roster)
            log.warning("%s: this node %s", self.plan.kind, "cheats" if self._playing else "is honest")
        return bool(self._playing)

    def _cast(self, roster: Roster) -> bool:
        me = self.node.identity.hotkey
        if self._first:
            return me in choose(self.plan.kind, roster.stages)
        stage = roster.stage_of(me)
        return stage is not None and fits(PROFILES[self.plan.kind].role, stage, len(roster.stages))

    def colluder(self, roster: Roster) -> Identity | None:
        """Who signs for what this node forges: its keys lie beside this node's."""
        name = accomplice(self.node.identity.hotkey, roster.stages) if self.playing() else None
        return None if name is None else _identity(self.node, name)


def _tokens(node: Node) -> Tensor:
    return node.corpus.sample(OTHER_TOKENS)[:, :-1]


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
    node, kind = part.node, part.plan.kind

    class OneDevice(SharedEngine):
        device = node.config.out / "adversaries.device"
        active = staticmethod(part.playing)

    class Forger(ForgingWorker):
        colluder = staticmethod(part.colluder)

    class Machine(RoundMachine):
        def _build(self) -> StageWorker:
            engine: Callable[..., StageEngine] = StageEngine
            if PROFILES[kind].falsifies:
                engine = partial(CheatingEngine, cheat=part.plan, memory=part.memory, active=part.playing)
            elif kind is Kind.SYBIL:
                engine = OneDevice
            forges = kind is Kind.FORGED_RECEIPTS
            return build_worker(node, self.stage, engine=engine, worker=Forger if forges else StageWorker)

        def _terms(self, roster: Roster, *, end: int | None = None) -> Terms:
            terms = super()._terms(roster, end=end)
            lies = kind in {Kind.LYING_HOLDER, Kind.COLLUDING_HOLDERS} and part.playing()
            return lying(terms) if lies else terms

    return Machine


def desk(part: Part) -> type[EvidenceDesk]:
    """The desk that answers for this node's work."""

    class Desk(SilentDesk):
        active = staticmethod(part.playing)

    return Desk if part.plan.kind is Kind.WITHHELD_EVIDENCE else EvidenceDesk


async def play(node: Node, plan: Plan, *, first: bool) -> None:
    """An adversary's whole life in one run."""
    if PROFILES[plan.kind].role is Role.VALIDATOR:
        await copy_weights(node)
        return
    part = Part(node, plan, first=first)
    copying = None
    if plan.kind is Kind.COPYCAT:
        copying = asyncio.create_task(copy_sibling(node, part.memory))
    try:
        await mine(node, desk=desk(part), machine=machine(part))
    finally:
        if copying is not None:
            copying.cancel()
            await asyncio.gather(copying, return_exceptions=True)


def run(argv: list[str]) -> int:
    """The program: a kind, its options and a neuron's flags in, exit status out."""
    parser = argparse.ArgumentParser(prog="python -m tests.adversaries", allow_abbrev=False, description=__doc__)
    parser.add_argument("kind", help=", ".join(Kind))
    parser.add_argument("--first", action="store_true", help="cheat only if this node is the first that fits")
    parser.add_argument("--strength", type=float, default=None, help="how strongly (default: the kind's)")
    parser.add_argument("--share", type=float, default=1.0, help="of its units (default: 1)")
    parser.add_argument("--packed", action="store_true", help="all units of a share of its windows")
    parser.add_argument("--cheat-seed", type=int, default=0, help="of its chance (default: 0)")
    flags, rest = parser.parse_known_args(argv)
    try:
        kind = Kind.parse(flags.kind)
        plan = Plan.of(kind, strength=flags.strength, share=flags.share, packed=flags.packed, seed=flags.cheat_seed)
    except AdversaryError as error:
        parser.error(str(error))
    role = "validator" if PROFILES[kind].role is Role.VALIDATOR else "miner"
    description = f"{kind}. {PROFILES[kind].gains} {PROFILES[kind].stopped_by}"
    return main(rest, role=role, description=description, body=partial(play, plan=plan, first=flags.first))
