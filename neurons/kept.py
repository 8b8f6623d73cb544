"""What a miner keeps of a window: all that its head names, and once a seed has picked it, what may still be asked for.

The units are replayed from the weights that the window began with, so those stay whole. Of the other states only pieces
are ever looked at, and the seed names which: they stay, with the hashes that lead from them to the roots in the head.
What has been put on disk (`neurons/shelf.py`) is mapped, and takes no host memory that the system could not take back.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Protocol

import torch

from model.engine import StageEngine
from model.stage import flatten
from neurons.wire import byte_tensor
from subnet.messages import StatePart
from subnet.transport.synapse import tensor_bytes
from subnet.trust.audit import UnitTensors
from subnet.trust.ledger import UnitKey
from subnet.trust.pool import Pool
from subnet.trust.tree import HASH_BYTES, PIECE_BYTES, Tree, pieces_of


class NotNamedError(LookupError):
    """A piece that no seed names, so it is not kept: one line."""


class Provable(Protocol):
    """A flat fp32 vector as far as it is here."""

    def piece(self, index: int) -> torch.Tensor:
        """Piece `index`, uint8 (1, size): a view. Raises `IndexError` for one that the vector does not have, and
        `NotNamedError` for one that is not kept."""
        ...

    def proof(self, index: int) -> tuple[bytes, ...]:
        """The hashes that lead from a piece which is here to the root."""
        ...


class Vector:
    """Flat fp32 values, (n,) in host memory, that evidence names by the root of their tree. Not to be written to."""

    def __init__(self, values: torch.Tensor, tree: Tree | None = None) -> None:
        """`tree` is that of the values, where it is known."""
        self.values = values
        self._tree = tree
        self._hashing = threading.Lock()

    def tree(self) -> Tree:
        """Hashed when first asked for, in whatever thread that is: about a quarter of a second per gigabyte."""
        with self._hashing:
            if self._tree is None:
                self._tree = Tree.of(tensor_bytes(self.values))
            return self._tree

    def piece(self, index: int) -> torch.Tensor:
        _require(index, pieces_of(self.values.nbytes))
        return self.values.view(torch.uint8)[index * PIECE_BYTES : (index + 1) * PIECE_BYTES].view(1, -1)

    def proof(self, index: int) -> tuple[bytes, ...]:
        return self.tree().proof(index)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Some pieces of a vector, copied out of it, and their proofs."""

    count: int
    """Pieces of the whole vector."""
    numbers: tuple[int, ...]
    """Of those that are here, ascending."""
    data: torch.Tensor
    """One after the other, uint8 (bytes,)."""
    lengths: tuple[int, ...]
    """Hashes in the proof of each."""
    hashes: torch.Tensor
    """The proofs one after the other, uint8 (sum of lengths, 32)."""

    @classmethod
    def of(cls, vector: Vector, numbers: Sequence[int]) -> Pieces:
        """`numbers` ascend, and there is one at least."""
        proofs = [vector.proof(number) for number in numbers]
        return cls(
            count=pieces_of(vector.values.nbytes),
            numbers=tuple(numbers),
            data=torch.cat([vector.piece(number).flatten() for number in numbers]),
            lengths=tuple(map(len, proofs)),
            hashes=byte_tensor(b"".join(chain.from_iterable(proofs))).view(-1, HASH_BYTES),
        )

    def piece(self, index: int) -> torch.Tensor:
        place = self._place(index)
        return self.data[place * PIECE_BYTES : (place + 1) * PIECE_BYTES].view(1, -1)

    def proof(self, index: int) -> tuple[bytes, ...]:
        place = self._place(index)
        start = (0, *accumulate(self.lengths))[place]
        return tuple(row.numpy().tobytes() for row in self.hashes[start : start + self.lengths[place]])

    def _place(self, index: int) -> int:
        _require(index, self.count)
        place = bisect_left(self.numbers, index)
        if place == len(self.numbers) or self.numbers[place] != index:
            raise NotNamedError(f"piece {index} is none of the {len(self.numbers)} that its window's seed names")
        return place


def _require(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise IndexError(f"piece {index} of {count}")


@dataclass(frozen=True, slots=True)
class State:
    """A replica between two steps: its weights, (n,), and its optimizer's moments, as `model.layout` orders them."""

    weights: Vector
    moments: Vector

    @classmethod
    def of(cls, engine: StageEngine) -> State:
        """Copies of what the engine has now."""
        return cls(Vector(flatten(engine.stage)), Vector(engine.moments()))


@dataclass
class KeptWindow:
    """What the head of a window names. States that follow each other share what did not change in between."""

    opening: State
    closing: State | None = None
    """None while the window is open."""
    slot: int = 0
    units: dict[UnitKey, UnitTensors] = field(default_factory=dict)
    previous: Vector | None = None
    """The weights that the window before ended with, where a merge was taken over in between."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything it holds."""
        for state in (self.opening, self.closing):
            if state is not None:
                yield from (state.weights.values, state.moments.values)
        if self.previous is not None:
            yield self.previous.values
        for unit in self.units.values():
            yield from unit_tensors(unit)


@dataclass(frozen=True, slots=True)
class PickedWindow:
    """What may still be asked for of a window that a seed picked."""

    weights: torch.Tensor
    """That it began with, fp32 (n,)."""
    parts: Mapping[StatePart, Pieces]
    units: Mapping[UnitKey, UnitTensors]
    mapped: bool = False
    """Whether it lies on disk."""

    @classmethod
    def of(cls, window: KeptWindow, pool: Pool) -> PickedWindow:
        """Of a window that is closed."""
        assert window.closing is not None  # noqa: S101 - it has a head
        opening, closing = window.opening, window.closing
        parts: dict[StatePart, Pieces] = {
            "weights": Pieces.of(opening.weights, pool.weights),
            "optimizer": Pieces.of(opening.moments, pool.moments),
            "next_weights": Pieces.of(closing.weights, pool.weights),
            "next_optimizer": Pieces.of(closing.moments, pool.moments),
        }
        if window.previous is not None:
            parts["previous_weights"] = Pieces.of(window.previous, pool.weights)
        return cls(opening.weights.values, parts, window.units)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything it holds in host memory."""
        if self.mapped:
            return
        yield self.weights
        for pieces in self.parts.values():
            yield from (pieces.data, pieces.hashes)
        for unit in self.units.values():
            yield from unit_tensors(unit)


def unit_tensors(unit: UnitTensors) -> Iterator[torch.Tensor]:
    yield from (tensor for tensor in (unit.input, unit.gradient, unit.output) if tensor is not None)


@dataclass(frozen=True, slots=True)
class Cut:
    """The vectors that the closing of a round names, as far as there are any."""

    closing: Vector | None = None
    """The weights at the cut."""
    owed: Vector | None = None
    """What error feedback owed before it."""
    still_owed: Vector | None = None
    """What it owes after it."""
    mapped: bool = False
    """Whether they lie on disk."""

    @property
    def vectors(self) -> dict[str, Vector]:
        """Those that there are."""
        named = {"closing": self.closing, "owed": self.owed, "still_owed": self.still_owed}
        return {name: vector for name, vector in named.items() if vector is not None}

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything it holds in host memory."""
        if not self.mapped:
            yield from (vector.values for vector in self.vectors.values())
