"""The routes of a miner's axon: pushes to its worker, evidence to validators, a merge's pieces to its siblings."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch

from neurons.archive import Archive, RoundArchive
from neurons.exchange import Desk
from neurons.kept import NotNamedError, Provable
from neurons.library import Library
from neurons.node import Node
from neurons.pipeline import StageWorker
from neurons.quota import Audience, Uplink
from neurons.wire import MergeRoutes, byte_tensor
from subnet.messages import (
    Backward,
    EvidenceRequest,
    EvidenceTables,
    Forward,
    HolderRequest,
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
from subnet.transport.synapse import Received, Synapse
from subnet.trust import delta
from subnet.trust.heads import ACK_BYTES, HEAD_BYTES
from subnet.trust.ledger import CLOSING_BYTES, LEAF_BYTES, Direction, Evidence, UnitKey

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Visit:
    """One caller's request for evidence of a closed round."""

    caller: str
    request: RunSynapse
    held: RoundArchive
    evidence: Evidence
    desk: Desk
    audience: Audience

    def weights(self, version: int) -> torch.Tensor:
        self.require_picked(version)
        return self.known(self.held.weights(version), version)

    def part(self, version: int, part: StatePart) -> Provable:
        found = self.held.part(version, part)
        if part in ("closing", "owed", "still_owed"):
            if found is None:
                raise Dropped(f"round {self.request.round} has no {part} here", "ask for what its closing names")
            return found
        self.require_picked(version)
        return self.known(found, version)

    def require_picked(self, version: int) -> None:
        if version not in self.held.picked:
            raise NotPicked(
                f"window {version} of round {self.request.round} is none that its slot's seed picks",
                "ask for windows that are picked",
            )

    def known(self, found: T | None, version: int) -> T:
        if found is None:
            raise Dropped(
                f"window {version} of round {self.request.round} is not kept here: given up, or lost in a restart",
                "ask for others",
            )
        return found


class EvidenceDesk:
    """Serves what the archive holds: a merge's pieces to siblings, evidence to validators and joiners.

    Evidence is that of picked windows, of their states the pieces that seeds name, once their round is closed and it is
    known who watches it, within quotas.
    """

    def __init__(self, run: bytes, archive: Archive, library: Library, uplink: Uplink) -> None:
        self._run = run.hex()
        self._archive = archive
        self._library = library
        self._uplink = uplink
        self._encoding = asyncio.Lock()
        """A delta takes several times its weights while it is packed: one at a time."""

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

    # -- who may have how much --------------------------------------------------------------------------------------

    def _visit(self, caller: str, request: RunSynapse) -> _Visit:
        held = self._held(request)
        if held.evidence is None or held.desk is None:
            raise Unavailable(f"the ledger of round {request.round} is still open", "ask after CUT", retry_after=0.5)
        if held.audience is None:
            raise Unavailable(f"a seed of round {request.round} is not known here", "ask again", retry_after=0.5)
        self._uplink.share_out(request.round, held.audience.shares)
        return _Visit(caller, request, held, held.evidence, held.desk, held.audience)

    def _require(self, visit: _Visit, size: int) -> None:
        """Raises `OverQuota` where `size` bytes are more than the caller may have."""
        picked = [head for head in visit.evidence.heads if head.version in visit.held.picked]
        limit = visit.audience.limit(visit.caller, picked, tables=visit.evidence.size)
        visit.audience.require(visit.caller, size, limit)

    def _give(self, visit: _Visit, reply: Synapse, tensors: Mapping[str, torch.Tensor]) -> Reply:
        """Count what is sent, if the caller may have it."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._require(visit, size)
        visit.audience.take(visit.caller, size)
        self._uplink.take(visit.caller, size)
        return reply, tensors

    # -- routes -----------------------------------------------------------------------------------------------------

    async def tables(self, caller: str, request: EvidenceRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        visit = self._visit(caller, request)
        with self._uplink.working(caller):
            evidence, tables = visit.evidence, visit.evidence.tables()
            payload = visit.desk.payload_root.hex()
            reply = EvidenceTables(payload=payload, heads=len(evidence.heads), acks=len(evidence.acks))
            return self._give(
                visit,
                reply,
                {
                    "leaves": byte_tensor(tables.leaves).view(-1, LEAF_BYTES),
                    "heads": byte_tensor(tables.heads).view(-1, HEAD_BYTES),
                    "acks": byte_tensor(tables.acks).view(-1, ACK_BYTES),
                    "closing": byte_tensor(tables.closing).view(-1, CLOSING_BYTES),
                },
            )

    async def window(self, caller: str, request: WindowRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        visit = self._visit(caller, request)
        weights = visit.weights(request.version)
        with self._uplink.working(caller):
            base = self._library.theta(request.held)
            if base is None:
                raise Dropped(
                    f"the state with {request.held} rounds merged is not kept here", "name the round's own state"
                )
            self._require(visit, visit.held.packed.get((request.version, request.held), 1))
            async with self._encoding:
                data = await asyncio.to_thread(delta.encode, weights, base)
            visit.held.packed[request.version, request.held] = len(data)
            return self._give(visit, WeightsDelta(size=len(data)), {"delta": byte_tensor(data).view(1, -1)})

    async def state(self, caller: str, request: StateRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        visit = self._visit(caller, request)
        vectors = [visit.part(request.version, part) for part in request.parts]
        data: list[torch.Tensor] = []
        for part, vector, index in zip(request.parts, vectors, request.pieces, strict=True):
            try:
                data.append(vector.piece(index))
            except IndexError as error:
                raise MalformedRequest(f"{part}: {error}", "take the sizes from the run's plan") from None
            except NotNamedError as error:
                raise NotPicked(f"{part} of window {request.version}: {error}", "ask for those") from None
        with self._uplink.working(caller):
            self._require(visit, sum(piece.numel() for piece in data))
            proofs = [
                await asyncio.to_thread(vector.proof, index)
                for vector, index in zip(vectors, request.pieces, strict=True)
            ]
            reply = StatePieces(sizes=[piece.numel() for piece in data], hashes=[len(proof) for proof in proofs])
            hashes = byte_tensor(b"".join(chain.from_iterable(proofs))).view(-1, HASH_BYTES)
            joined = await asyncio.to_thread(torch.cat, data, 1)  # may have to be read from disk
            return self._give(visit, reply, {"data": joined, "proof": hashes})

    async def unit(self, caller: str, request: UnitRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        visit = self._visit(caller, request)
        key = UnitKey(request.sample, Direction.BACKWARD if request.backward else Direction.FORWARD)
        leaf = next((leaf for leaf in visit.evidence.leaves if leaf.key == key), None)
        if leaf is None:
            raise Dropped(
                f"sample {request.sample} of round {request.round} is not in the ledger", "ask for one that is"
            )
        visit.require_picked(leaf.version)
        unit = visit.known(visit.held.unit(key), leaf.version)
        with self._uplink.working(caller):
            named = {"input": unit.input, "gradient": unit.gradient, "output": unit.output}
            tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
            self._require(visit, sum(tensor.nbytes for tensor in tensors.values()))
            read = await asyncio.to_thread(lambda: {name: tensor.clone() for name, tensor in tensors.items()})
            return self._give(visit, Tensors(), read)


class PushDesk:
    """Routes pushes to the worker, once the roster has given this node a stage."""

    def __init__(self) -> None:
        self.worker: StageWorker | None = None

    def open(self, node: Node) -> None:
        """Put its routes on the axon."""
        node.axon.serve(Forward, self.forward, specs={"y": node.shapes.boundary})
        node.axon.serve(Backward, self.backward, specs={"g": node.shapes.boundary})
        node.axon.serve(HolderRequest, self.holder, specs=NO_SPECS)
        node.axon.serve(InputRequest, self.input, specs=NO_SPECS)
        node.axon.serve(Notice, self.notice, specs=NO_SPECS)

    async def forward(self, caller: str, push: Forward, tensors: Received) -> Reply:
        return await self._ready().on_forward(caller, push, tensors)

    async def backward(self, caller: str, push: Backward, tensors: Received) -> Reply:
        return await self._ready().on_backward(caller, push, tensors)

    async def holder(self, caller: str, request: HolderRequest, tensors: Mapping[str, torch.Tensor]) -> Reply:
        return await self._ready().on_holder(caller, request, tensors)

    async def input(self, caller: str, request: InputRequest, tensors: Mapping[str, torch.Tensor]) -> Reply:
        return await self._ready().on_input(caller, request, tensors)

    async def notice(self, caller: str, notice: Notice, tensors: Mapping[str, torch.Tensor]) -> Reply:
        return await self._ready().on_notice(caller, notice, tensors)

    def _ready(self) -> StageWorker:
        if self.worker is None:
            raise Unavailable("this node is still building its stage", "push to a sibling, or again", retry_after=0.2)
        return self.worker
