"""A merge's exchange over the network: what `neurons.exchange` asks for and answers, as messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from neurons.exchange import Desk, Leaves
from subnet.messages import (
    LeavesRequest,
    PayloadLeaves,
    PayloadRequest,
    RunSynapse,
    ShardRequest,
    Tensors,
    table,
)
from subnet.swarm.content import LEAF_BYTES
from subnet.transport.axon import Axon, Reply
from subnet.transport.dendrite import NO_SPECS, Dendrite
from subnet.transport.synapse import Synapse, TensorSpec, tensor_bytes

CALL_DEADLINE = 30.0
"""Seconds one piece may take; the merge's own marks end earlier where they must."""


class DendriteExchange:
    """`Exchange` of one round over a dendrite."""

    def __init__(
        self, dendrite: Dendrite, endpoint_of: Callable[[str], str | None], *, run: bytes, number: int
    ) -> None:
        self._dendrite = dendrite
        self._endpoint_of = endpoint_of
        self._run = run.hex()
        self._number = number

    async def leaves(self, holder: str, source: str, pieces: int) -> Leaves:
        reply, tensors = await self._dendrite.call(
            self._endpoint_of(holder) or "",
            holder,
            LeavesRequest(run=self._run, round=self._number, source=source),
            reply=PayloadLeaves,
            reply_specs={"leaves": table(pieces, LEAF_BYTES)},
            deadline=CALL_DEADLINE,
        )
        raw = bytes(tensor_bytes(tensors["leaves"]))
        hashes = tuple(raw[start : start + LEAF_BYTES] for start in range(0, len(raw), LEAF_BYTES))
        return hashes, bytes.fromhex(reply.evidence)

    async def piece(self, holder: str, source: str, index: int, size: int) -> bytes:
        return await self._data(
            holder, PayloadRequest(run=self._run, round=self._number, source=source, piece=index), size
        )

    async def merged(self, holder: str, shard: int, index: int, size: int) -> bytes:
        return await self._data(holder, ShardRequest(run=self._run, round=self._number, shard=shard, piece=index), size)

    async def _data(self, holder: str, request: Synapse, size: int) -> bytes:
        _, tensors = await self._dendrite.call(
            self._endpoint_of(holder) or "",
            holder,
            request,
            reply=Tensors,
            reply_specs={"data": TensorSpec(torch.uint8, (size,))},
            deadline=CALL_DEADLINE,
        )
        return bytes(tensor_bytes(tensors["data"]))


class MergeRoutes:
    """The axon's side: answers from the desk of the round asked for. `desk_of` raises a `Refused` if there is none."""

    def __init__(self, desk_of: Callable[[RunSynapse], Desk]) -> None:
        self._desk_of = desk_of

    def open(self, axon: Axon) -> None:
        axon.serve(LeavesRequest, self.leaves, specs=NO_SPECS)
        axon.serve(PayloadRequest, self.piece, specs=NO_SPECS)
        axon.serve(ShardRequest, self.merged, specs=NO_SPECS)

    async def leaves(self, _caller: str, request: LeavesRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        hashes, evidence = self._desk_of(request).leaves(request.source)
        return PayloadLeaves(evidence=evidence.hex()), {"leaves": byte_tensor(b"".join(hashes)).view(-1, LEAF_BYTES)}

    async def piece(self, _caller: str, request: PayloadRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        return Tensors(), {"data": byte_tensor(self._desk_of(request).piece(request.source, request.piece))}

    async def merged(self, _caller: str, request: ShardRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        return Tensors(), {"data": byte_tensor(self._desk_of(request).merged(request.shard, request.piece))}


def byte_tensor(data: bytes) -> torch.Tensor:
    """uint8 (n,), a copy that may be written to."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
