"""The miner: holds one stage, trains it with its neighbours, merges with its siblings, answers for its work.

    python -m neurons.miner --network ws://127.0.0.1:9944 --wallet w --hotkey miner-0 \\
        --manifest manifest.toml --data shards/ --port 8091

It announces itself (axon and record), waits for the roster to name its stage, plays the manifest's rounds, and stays
for the audits of the last one.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

import torch

from model.accounting import total_parameters
from model.engine import Recompute, StageEngine
from model.stage import build_stage
from neurons.archive import Archive, RoundArchive
from neurons.drive import DEPTH_LIMIT_PER_STAGE
from neurons.node import Node, NodeError, main
from neurons.pipeline import StageWorker
from neurons.rounds import RoundMachine, traffic
from neurons.telemetry import NodeFinished
from subnet.messages import (
    Backward,
    EvidenceRequest,
    EvidenceTables,
    Forward,
    InputRequest,
    Notice,
    Payload,
    PayloadRequest,
    PublicPart,
    RunSynapse,
    Tensors,
    UnitRequest,
    WeightsRequest,
    WindowRequest,
)
from subnet.swarm.record import Phase, Record
from subnet.swarm.roster import Roster
from subnet.transport.axon import Reply
from subnet.transport.dendrite import NO_SPECS
from subnet.transport.errors import Dropped, Unavailable, UnknownRun
from subnet.transport.synapse import tensor_bytes
from subnet.trust.ledger import Direction, UnitKey, digest

log = logging.getLogger("orion.neurons.miner")


class EvidenceDesk:
    """Serves what the archive holds: payloads to siblings, evidence to validators."""

    def __init__(self, node: Node, archive: Archive) -> None:
        self._node = node
        self._archive = archive

    def open(self) -> None:
        """Put its routes on the axon."""
        axon = self._node.axon
        axon.serve(PayloadRequest, self.payload, specs=NO_SPECS)
        axon.serve(EvidenceRequest, self.tables, specs=NO_SPECS)
        axon.serve(WindowRequest, self.window, specs=NO_SPECS)
        axon.serve(UnitRequest, self.unit, specs=NO_SPECS)
        axon.serve(WeightsRequest, self.weights, specs=NO_SPECS)

    def _held(self, request: RunSynapse) -> RoundArchive:
        if request.run != self._node.loaded.run_id.hex():
            raise UnknownRun(
                f"run {request.run} is not {self._node.loaded.run_id.hex()}", "start with the manifest that is on chain"
            )
        held = self._archive.get(request.round)
        if held is None and request.round > self._archive.newest:
            raise Unavailable(f"round {request.round} has not begun here", "ask again", retry_after=0.2)
        if held is None:
            raise Dropped(f"round {request.round} is not kept here", "ask in the round after it, or ask a sibling")
        return held

    async def payload(self, _caller: str, request: PayloadRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        held = self._held(request)
        if request.source not in held.payloads:
            raise Unavailable(f"no payload of {request.source} here yet", "ask again", retry_after=0.2)
        payload, evidence = held.payloads[request.source]
        tensor = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(1, -1)
        return Payload(evidence=evidence.hex()), {"payload": tensor}

    async def tables(self, _caller: str, request: EvidenceRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        held = self._held(request)
        if held.evidence is None:
            raise Unavailable(f"the ledger of round {request.round} is still open", "ask after CUT", retry_after=0.5)
        leaves, windows = held.evidence.tables()
        rows = {"leaves": (leaves, len(held.evidence.leaves)), "windows": (windows, len(held.evidence.windows))}
        return EvidenceTables(payload=held.payload_root.hex(), windows=len(held.evidence.windows)), {
            name: torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, -1) if count else torch.empty(0, 0)
            for name, (data, count) in rows.items()
        }

    async def window(self, _caller: str, request: WindowRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        held = self._held(request)
        if held.evidence is None or request.version not in held.windows:
            raise Dropped(f"window {request.version} of round {request.round} is not kept here", "ask after CUT")
        return Tensors(), {"weights": held.windows[request.version]}

    async def unit(self, _caller: str, request: UnitRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        held = self._held(request)
        direction = Direction.BACKWARD if request.backward else Direction.FORWARD
        unit = held.units.get(UnitKey(request.sample, direction)) if held.evidence is not None else None
        if unit is None:
            raise Dropped(f"sample {request.sample} of round {request.round} was not computed here", "ask after CUT")
        tensors = {"input": unit.input, "gradient": unit.gradient, "output": unit.output}
        return Tensors(), {name: tensor for name, tensor in tensors.items() if tensor is not None}

    async def weights(self, _caller: str, request: WeightsRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        public = self._held(request).public
        part, other = (public.theta, public.momentum) if request.part == "theta" else (public.momentum, public.theta)
        return PublicPart(other=digest(tensor_bytes(other)).hex()), {"weights": part}


class PushDesk:
    """Routes pushes to the worker, once the roster has given this node a stage."""

    def __init__(self) -> None:
        self.worker: StageWorker | None = None

    async def forward(self, caller: str, push: Forward, tensors: Mapping[str, torch.Tensor]) -> Reply:
        return await self._ready().on_forward(caller, push, tensors)

    async def backward(self, caller: str, push: Backward, tensors: Mapping[str, torch.Tensor]) -> Reply:
        return await self._ready().on_backward(caller, push, tensors)

    async def input(self, caller: str, request: InputRequest, tensors: Mapping[str, torch.Tensor]) -> Reply:
        return await self._ready().on_input(caller, request, tensors)

    async def notice(self, caller: str, notice: Notice, tensors: Mapping[str, torch.Tensor]) -> Reply:
        return await self._ready().on_notice(caller, notice, tensors)

    def _ready(self) -> StageWorker:
        if self.worker is None:
            raise Unavailable("this node is still building its stage", "push again after the pause", retry_after=0.2)
        return self.worker


async def mine(node: Node) -> None:
    """A miner's whole life in one run."""
    manifest = node.loaded.manifest
    archive = Archive()
    desk = EvidenceDesk(node, archive)
    desk.open()
    pushes = PushDesk()
    node.axon.serve(Forward, pushes.forward, specs={"y": node.shapes.boundary})
    node.axon.serve(Backward, pushes.backward, specs={"g": node.shapes.boundary})
    node.axon.serve(InputRequest, pushes.input, specs=NO_SPECS)
    node.axon.serve(Notice, pushes.notice, specs=NO_SPECS)
    await node.listen()
    ready = Record(run=node.loaded.run_id, round=0, phase=Phase.READY)
    await node.chain.publish(ready.encode())
    roster, start = await node.first_roster()
    stage = roster.stage_of(node.identity.hotkey)
    if stage is None:
        raise NodeError(
            f"{node.identity.hotkey} came after the run had gathered at block {start}: joining is not possible yet"
        )
    worker = build_worker(node, stage)
    pushes.worker = worker
    machine = RoundMachine(node, worker, archive)
    try:
        await _play(node, machine, roster, start)
    finally:
        worker.shut_down()
    await machine.settle()
    rounds = manifest.round.count
    # The state after the last round is served like any round's start.
    archive.open(rounds, machine.public)
    await node.wait(manifest.round_start(start, rounds) + manifest.round.linger)
    node.telemetry.emit(traffic(node))
    node.telemetry.emit(NodeFinished(rounds=rounds))


async def _play(node: Node, machine: RoundMachine, roster: Roster, start: int) -> None:
    manifest = node.loaded.manifest
    current = roster
    number = 0
    while manifest.round.count == 0 or number < manifest.round.count:
        if current.stage_of(node.identity.hotkey) is None:
            raise NodeError(
                f"{node.identity.hotkey} is out of the roster of round {number}: its record or axon is gone"
            )
        await machine.play(current, manifest.round_start(start, number))
        number += 1
        current = await node.next_roster(current, manifest.round_start(start, number))


def build_worker(node: Node, stage: int) -> StageWorker:
    """The stage this node holds, with the weights every replica starts from."""
    manifest = node.loaded.manifest
    config = manifest.model.config()
    plan = node.plans[stage]
    limit = DEPTH_LIMIT_PER_STAGE * plan.count
    engine = StageEngine(
        build_stage(config, plan, manifest.run.seed),
        manifest.optimizer.inner(),
        plan,
        n_total_params=total_parameters(config, plan.count),
        accumulation=manifest.optimizer.accumulation,
        recompute=Recompute.KEEP,
        capacity=2 * limit,
    )
    return StageWorker(
        identity=node.identity,
        loaded=node.loaded,
        engine=engine,
        corpus=node.corpus,
        dendrite=node.dendrite,
        endpoint_of=node.neighbours.endpoints.get,
        telemetry=node.telemetry,
    )


def run(argv: list[str]) -> int:
    """The program: flags in, exit status out."""
    return main(argv, role="miner", description="Hold one stage and train it.", body=mine)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
