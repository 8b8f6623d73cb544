"""The routes of a miner's axon: pushes to its worker, evidence to validators, a merge's pieces to its siblings."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import chain

import torch

from neurons.archive import Archive, RoundArchive, Vector
from neurons.exchange import Desk
from neurons.library import Library
from neurons.node import Node
from neurons.pipeline import StageWorker
from neurons.wire import MergeRoutes, byte_tensor
from subnet.messages import (
    Backward,
    EvidenceRequest,
    EvidenceTables,
    Forward,
    InputRequest,
    Notice,
    RunSynapse,
    StatePart,
    StatePieces,
    StateRequest,
    Tensors,
    UnitRequest,
    WeightsDelta,
    WindowRequest,
)
from subnet.swarm.content import LEAF_BYTES as HASH_BYTES
from subnet.transport.axon import Axon, Reply
from subnet.transport.dendrite import NO_SPECS
from subnet.transport.errors import Dropped, MalformedRequest, NotPicked, Unavailable, UnknownRun
from subnet.trust import delta
from subnet.trust.heads import ACK_BYTES, HEAD_BYTES
from subnet.trust.ledger import CLOSING_BYTES, LEAF_BYTES, Direction, Evidence, UnitKey


class EvidenceDesk:
    """Serves what the archive holds: a merge's pieces to siblings, evidence to validators and joiners."""

    def __init__(self, run: bytes, archive: Archive, library: Library) -> None:
        self._run = run.hex()
        self._archive = archive
        self._library = library

    def open(self, axon: Axon) -> None:
        """Put its routes on the axon."""
        MergeRoutes(self._desk).open(axon)
        axon.serve(EvidenceRequest, self.tables, specs=NO_SPECS)
        axon.serve(WindowRequest, self.window, specs=NO_SPECS)
        axon.serve(StateRequest, self.state, specs=NO_SPECS)
        axon.serve(UnitRequest, self.unit, specs=NO_SPECS)

    def _held(self, request: RunSynapse) -> RoundArchive:
        if request.run != self._run:
            raise UnknownRun(f"run {request.run} is not {self._run}", "start with the manifest that is on chain")
        held = self._archive.get(request.round)
        if held is None and request.round > self._archive.newest:
            raise Unavailable(f"round {request.round} has not begun here", "ask again", retry_after=0.2)
        if held is None:
            raise Dropped(f"round {request.round} is not kept here", "ask in the round after it, or ask a sibling")
        return held

    def _desk(self, request: RunSynapse) -> Desk:
        desk = self._held(request).desk
        if desk is None:
            raise Unavailable(f"round {request.round} is still training here", "ask after CUT", retry_after=0.2)
        return desk

    def _closed(self, request: RunSynapse) -> tuple[RoundArchive, Evidence, Desk]:
        held = self._held(request)
        if held.evidence is None or held.desk is None:
            raise Unavailable(f"the ledger of round {request.round} is still open", "ask after CUT", retry_after=0.5)
        if not held.settled:
            raise Unavailable(f"a seed of round {request.round} is not known here", "ask again", retry_after=0.5)
        return held, held.evidence, held.desk

    def _vector(self, held: RoundArchive, request: WindowRequest | StateRequest, part: StatePart) -> Vector:
        found = held.vector(request.version, part)
        if part in ("closing", "owed", "still_owed"):
            if found is None:
                raise Dropped(f"round {request.round} has no {part} here", "ask for what its closing names")
            return found
        self._require_picked(held, request, request.version)
        if found is None:
            raise _given_up(request, request.version)
        return found

    def _require_picked(self, held: RoundArchive, request: RunSynapse, version: int) -> None:
        if version not in held.picked:
            raise NotPicked(
                f"window {version} of round {request.round} is none that its slot's seed picks",
                "ask for windows that are picked",
            )

    async def tables(self, _caller: str, request: EvidenceRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        _, evidence, desk = self._closed(request)
        tables = evidence.tables()
        payload = desk.payload_root.hex()
        return EvidenceTables(payload=payload, heads=len(evidence.heads), acks=len(evidence.acks)), {
            "leaves": byte_tensor(tables.leaves).view(-1, LEAF_BYTES),
            "heads": byte_tensor(tables.heads).view(-1, HEAD_BYTES),
            "acks": byte_tensor(tables.acks).view(-1, ACK_BYTES),
            "closing": byte_tensor(tables.closing).view(-1, CLOSING_BYTES),
        }

    async def window(self, _caller: str, request: WindowRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        held, _, _ = self._closed(request)
        weights = self._vector(held, request, "weights")
        base = self._library.theta(request.held)
        if base is None:
            raise Dropped(f"the state with {request.held} rounds merged is not kept here", "name the round's own state")
        data = await asyncio.to_thread(delta.encode, weights.values, base)
        return WeightsDelta(size=len(data)), {"delta": byte_tensor(data).view(1, -1)}

    async def state(self, _caller: str, request: StateRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        held, _, _ = self._closed(request)
        data: list[torch.Tensor] = []
        proofs: list[tuple[bytes, ...]] = []
        for part, index in zip(request.parts, request.pieces, strict=True):
            vector = self._vector(held, request, part)
            try:
                data.append(vector.piece(index))
            except IndexError as error:
                raise MalformedRequest(f"{part}: {error}", "take the sizes from the run's plan") from None
            proofs.append((await asyncio.to_thread(vector.tree)).proof(index))
        return StatePieces(sizes=[piece.numel() for piece in data], hashes=[len(proof) for proof in proofs]), {
            "data": torch.cat(data, dim=1),
            "proof": byte_tensor(b"".join(chain.from_iterable(proofs))).view(-1, HASH_BYTES),
        }

    async def unit(self, _caller: str, request: UnitRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        held, evidence, _ = self._closed(request)
        direction = Direction.BACKWARD if request.backward else Direction.FORWARD
        key = UnitKey(request.sample, direction)
        leaf = next((leaf for leaf in evidence.leaves if leaf.key == key), None)
        if leaf is None:
            raise Dropped(
                f"sample {request.sample} of round {request.round} is not in the ledger", "ask for one that is"
            )
        self._require_picked(held, request, leaf.version)
        unit = held.unit(key)
        if unit is None:
            raise _given_up(request, leaf.version)
        tensors = {"input": unit.input, "gradient": unit.gradient, "output": unit.output}
        return Tensors(), {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _given_up(request: RunSynapse, version: int) -> Dropped:
    return Dropped(
        f"window {version} of round {request.round} is not kept here: given up, or lost in a restart", "ask for others"
    )


class PushDesk:
    """Routes pushes to the worker, once the roster has given this node a stage."""

    def __init__(self) -> None:
        self.worker: StageWorker | None = None

    def open(self, node: Node) -> None:
        """Put its routes on the axon."""
        node.axon.serve(Forward, self.forward, specs={"y": node.shapes.boundary})
        node.axon.serve(Backward, self.backward, specs={"g": node.shapes.boundary})
        node.axon.serve(InputRequest, self.input, specs=NO_SPECS)
        node.axon.serve(Notice, self.notice, specs=NO_SPECS)

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
            raise Unavailable("this node is still building its stage", "push to a sibling, or again", retry_after=0.2)
        return self.worker
