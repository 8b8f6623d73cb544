"""The library: a stage's last public states, lent in pieces to whoever joins, fell behind or audits."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from subnet.messages import RunSynapse, StatePieceRequest, StateTreeRequest, Tensors
from subnet.swarm.content import LEAF_BYTES
from subnet.swarm.merge import Merged
from subnet.swarm.public import PublicTree, part_of, span_of
from subnet.transport.axon import Axon, Reply
from subnet.transport.dendrite import NO_SPECS
from subnet.transport.errors import Dropped, MalformedRequest, Unavailable, UnknownRun

KEPT = 2


@dataclass(frozen=True, slots=True)
class _Held:
    state: Merged
    tree: PublicTree


class Library:
    """Keeps and serves the public states with the most rounds merged into them."""

    def __init__(self, run_id: bytes) -> None:
        self._run = run_id.hex()
        self._states: dict[int, _Held] = {}

    def open(self, axon: Axon) -> None:
        """Put its routes on the axon."""
        axon.serve(StateTreeRequest, self.tree, specs=NO_SPECS)
        axon.serve(StatePieceRequest, self.piece, specs=NO_SPECS)

    def clear(self) -> None:
        """Forget everything: this node holds another stage now."""
        self._states.clear()

    async def put(self, held: int, state: Merged) -> bytes:
        """Hash a state with `held` rounds merged into it, serve it from now on, and return its digest.

        Its tensors must not be written to afterwards. Older states than the last few are forgotten.
        """
        known = next((entry.tree for entry in self._states.values() if entry.state is state), None)
        tree = await asyncio.to_thread(PublicTree.of, state) if known is None else known
        self._states[held] = _Held(state, tree)
        for old in sorted(self._states)[:-KEPT]:
            del self._states[old]
        return tree.digest

    def theta(self, held: int) -> torch.Tensor | None:
        """The weights with so many rounds merged, fp32 (n,), if they are kept."""
        entry = self._states.get(held)
        return None if entry is None else entry.state.theta

    async def tree(self, _caller: str, request: StateTreeRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        tree = self._held(request).tree
        return Tensors(), {"theta": _rows(tree.theta), "momentum": _rows(tree.momentum)}

    async def piece(self, _caller: str, request: StatePieceRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        values = part_of(self._held(request).state, request.part)
        try:
            start, end = span_of(values.numel(), request.piece)
        except IndexError as error:
            raise MalformedRequest(f"{request.part} {error}", "take the sizes from the run's plan") from None
        return Tensors(), {"data": values.view(torch.uint8)[start:end]}

    def _held(self, request: RunSynapse) -> _Held:
        if request.run != self._run:
            raise UnknownRun(f"run {request.run} is not {self._run}", "start with the manifest that is on chain")
        held = self._states.get(request.round)
        if held is not None:
            return held
        if request.round > max(self._states, default=-1):
            raise Unavailable(
                f"the state with {request.round} rounds merged is not here yet", "ask again", retry_after=0.2
            )
        raise Dropped(
            f"the state with {request.round} rounds merged is not kept here", "ask for what the records on chain say"
        )


def _rows(leaves: tuple[bytes, ...]) -> torch.Tensor:
    """uint8 (n, 32)."""
    if not leaves:
        return torch.empty((0, LEAF_BYTES), dtype=torch.uint8)
    return torch.frombuffer(bytearray(b"".join(leaves)), dtype=torch.uint8).view(-1, LEAF_BYTES)
