"""What a miner keeps so that others can check it: tensors of its units, weights of its windows, its tables.

Nobody knows which window an audit will pick until the round's roots are on chain, so everything of a round stays in
host memory until the round after next begins: two rounds at most.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from neurons.exchange import Desk
from subnet.trust.audit import UnitTensors
from subnet.trust.ledger import Evidence, UnitKey


@dataclass
class RoundArchive:
    """One round of one replica. Tensors are as they crossed the wire; weights are flat fp32."""

    units: dict[UnitKey, UnitTensors] = field(default_factory=dict)
    windows: dict[int, torch.Tensor] = field(default_factory=dict)
    evidence: Evidence | None = None
    desk: Desk | None = None
    """What it has of the round's merge, once it takes part in that."""


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
