"""What a miner keeps so that others can check it: tensors of its units, states of its windows, its tables.

Nobody knows which window an audit will pick until the round's roots are on chain, so everything of a round stays in
host memory until the round after next begins: two rounds at most.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from model.engine import StageEngine
from model.stage import flatten
from neurons.exchange import Desk
from subnet.messages import StatePart
from subnet.transport.synapse import tensor_bytes
from subnet.trust.audit import UnitTensors
from subnet.trust.ledger import Evidence, UnitKey
from subnet.trust.tree import PIECE_BYTES, Tree, pieces_of


class Vector:
    """Flat fp32 values, (n,) in host memory, that evidence names by the root of their tree. Not to be written to."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self._tree: Tree | None = None
        self._hashing = threading.Lock()

    def tree(self) -> Tree:
        """Hashed when first asked for, in whatever thread that is: about half a second per gigabyte."""
        with self._hashing:
            if self._tree is None:
                self._tree = Tree.of(tensor_bytes(self.values))
            return self._tree

    def piece(self, index: int) -> torch.Tensor:
        """Piece `index` of the tree, uint8 (1, size): a view. Raises `IndexError` for one that there is not."""
        count = pieces_of(self.values.nbytes)
        if not 0 <= index < count:
            raise IndexError(f"piece {index} of {count}")
        return self.values.view(torch.uint8)[index * PIECE_BYTES : (index + 1) * PIECE_BYTES].view(1, -1)


@dataclass(frozen=True, slots=True)
class State:
    """A replica between two steps: its weights, (n,), and its optimizer's moments, (2n,)."""

    weights: Vector
    moments: Vector

    @classmethod
    def of(cls, engine: StageEngine) -> State:
        """Copies of what the engine has now."""
        return cls(Vector(flatten(engine.stage)), Vector(engine.moments()))


@dataclass(frozen=True, slots=True)
class KeptWindow:
    """The states that a window's head names. Those that follow each other share what did not change in between."""

    opening: State
    closing: State


@dataclass
class Cut:
    """The vectors that the closing of a round names, as far as there are any."""

    closing: Vector | None = None
    """The weights at the cut."""
    owed: Vector | None = None
    """What error feedback owed before it."""
    still_owed: Vector | None = None
    """What it owes after it."""


@dataclass
class RoundArchive:
    """One round of one replica. Tensors are as they crossed the wire."""

    units: dict[UnitKey, UnitTensors] = field(default_factory=dict)
    windows: dict[int, KeptWindow] = field(default_factory=dict)
    """By version: those that are closed."""
    cut: Cut = field(default_factory=Cut)
    evidence: Evidence | None = None
    desk: Desk | None = None
    """What it has of the round's merge, once it takes part in that."""

    def vector(self, version: int, part: StatePart) -> Vector | None:
        """A part of a window, or of the cut whatever the version; None if it is not here."""
        match part:
            case "closing" | "owed" | "still_owed":
                return {"closing": self.cut.closing, "owed": self.cut.owed, "still_owed": self.cut.still_owed}[part]
            case "weights" | "optimizer":
                state = self.windows[version].opening if version in self.windows else None
            case "next_weights" | "next_optimizer":
                state = self.windows[version].closing if version in self.windows else None
        if state is None:
            return None
        return state.weights if part in ("weights", "next_weights") else state.moments


class Archive:
    """The rounds a miner still answers for."""

    def __init__(self, *, keep: int = 2) -> None:
        self._keep = keep
        self._rounds: dict[int, RoundArchive] = {}

    def open(self, number: int) -> RoundArchive:
        """A round's archive; those too old to be asked for are forgotten."""
        found = self._rounds.setdefault(number, RoundArchive())
        for old in [held for held in self._rounds if held <= number - self._keep]:
            del self._rounds[old]
        return found

    def get(self, number: int) -> RoundArchive | None:
        return self._rounds.get(number)

    @property
    def newest(self) -> int:
        """Number of the newest round, -1 before the first."""
        return max(self._rounds, default=-1)
