"""Adversaries in a simulation: the programs of `tests.adversaries`, computing on its clock."""

from __future__ import annotations

from functools import partial

from model.engine import StageEngine
from neurons.miner import mine
from neurons.node import Node
from neurons.pipeline import StageWorker
from neurons.rounds import RoundMachine, build_worker
from scripts.sim.compute import Pace, PacedEngine, VirtualCompute, machine_at
from scripts.sim.world import Program
from tests.adversaries.engine import CheatingEngine, Memory
from tests.adversaries.evidence import SilentDesk
from tests.adversaries.kinds import PROFILES, Kind, Plan
from tests.adversaries.program import Part


class PacedCheat(PacedEngine, CheatingEngine):
    """Takes as long as honest work would."""


def cheating(kind: Kind, *, share: float = 1.0) -> Program:
    """A miner that cheats so from its first unit on, wherever it is put."""
    plans = [Plan.of(kind, share=share)]

    async def program(node: Node, *, pace: Pace) -> None:
        part = Part(node, plans, first=False)

        class Desk(SilentDesk):
            silent = staticmethod(lambda: part.plays(Kind.WITHHELD_EVIDENCE))

        await mine(node, desk=Desk, machine=_machine(part, pace))

    return program


def _machine(part: Part, pace: Pace) -> type[RoundMachine]:
    class Machine(machine_at(pace)):  # type: ignore[misc]
        def _build(self) -> StageWorker:
            plan = part.plan()
            engine: partial[StageEngine] = partial(PacedEngine, pace=pace)
            if plan is not None and PROFILES[plan.kind].falsifies:
                part.memory = Memory(plan, lambda: part.node.corpus.sample(0)[:, :-1])
                engine = partial(PacedCheat, pace=pace, cheat=plan, memory=part.memory)
            return build_worker(
                self._node, self.stage, engine=engine, worker=partial(StageWorker, compute=VirtualCompute)
            )

    return Machine
