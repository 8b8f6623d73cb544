"""The public states a miner serves: to joiners, to siblings that fell behind, to validators.

A state is named by how many rounds are merged into it and proven by the digest that its holders have on chain.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Literal

import torch

from neurons.node import Node
from subnet.messages import PublicPart, WeightsRequest, flat
from subnet.swarm.merge import Merged
from subnet.transport.axon import Axon, Reply
from subnet.transport.dendrite import NO_SPECS
from subnet.transport.errors import Unavailable, UnknownRun
from subnet.transport.synapse import tensor_bytes
from subnet.trust.ledger import digest

FETCH_DEADLINE = 30.0
KEPT = 2


def public_digest(theta: bytes, momentum: bytes) -> bytes:
    """A stage's public state in one hash, from the digests of its weights and its outer momentum."""
    return hashlib.sha256(b"orion/public/1" + theta + momentum).digest()


def digest_of(state: Merged) -> bytes:
    return public_digest(digest(tensor_bytes(state.theta)), digest(tensor_bytes(state.momentum)))


class Library:
    """The last public states of one replica's stage."""

    def __init__(self, run_id: bytes) -> None:
        self._run = run_id.hex()
        self._states: dict[int, tuple[Merged, dict[str, bytes]]] = {}

    def open(self, axon: Axon) -> None:
        axon.serve(WeightsRequest, self.weights, specs=NO_SPECS)

    def clear(self) -> None:
        """Forget everything: this node holds another stage now."""
        self._states.clear()

    async def put(self, held: int, state: Merged) -> bytes:
        """Serve a state; returns its digest."""
        parts = {"theta": state.theta, "momentum": state.momentum}
        digests = await asyncio.to_thread(lambda: {name: digest(tensor_bytes(part)) for name, part in parts.items()})
        self._states[held] = state, digests
        for old in sorted(self._states)[:-KEPT]:
            del self._states[old]
        return public_digest(digests["theta"], digests["momentum"])

    async def weights(self, _caller: str, request: WeightsRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        if request.run != self._run:
            raise UnknownRun(f"run {request.run} is not {self._run}", "start with the manifest that is on chain")
        found = self._states.get(request.round)
        if found is None:
            raise Unavailable(f"the state after {request.round} rounds is not here", "ask a sibling", retry_after=0.2)
        state, digests = found
        part, other = (state.theta, "momentum") if request.part == "theta" else (state.momentum, "theta")
        return PublicPart(other=digests[other].hex()), {"weights": part}


async def fetch_public(node: Node, holder: str, held: int, *, parameters: int, momentum: int) -> Merged:
    """A stage's public state as `holder` serves it; the caller checks its digest. Raises `TransportError`."""
    parts = {}
    wanted: tuple[tuple[Literal["theta", "momentum"], int], ...] = (("theta", parameters), ("momentum", momentum))
    for part, count in wanted:
        _, tensors = await node.dendrite.call(
            node.neighbours.endpoints.get(holder, ""),
            holder,
            WeightsRequest(run=node.loaded.run_id.hex(), round=held, part=part),
            reply=PublicPart,
            reply_specs={"weights": flat(count)},
            deadline=FETCH_DEADLINE,
        )
        parts[part] = tensors["weights"]
    return Merged(parts["theta"], parts["momentum"])
