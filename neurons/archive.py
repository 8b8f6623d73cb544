"""What a miner keeps so that others can check it: tensors of its units, weights of its windows, payloads, tables.

Nobody knows which window an audit will pick until the round's roots are on chain, so everything of a round stays in
host memory until the next round's evidence replaces it: two rounds at most.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from subnet.trust.audit import UnitTensors
from subnet.trust.ledger import Evidence, UnitKey


@dataclass
class RoundArchive:
    """One round of one replica. Tensors are as they crossed the wire; weights are flat fp32."""

    units: dict[UnitKey, UnitTensors] = field(default_factory=dict)
    windows: dict[int, torch.Tensor] = field(default_factory=dict)
    evidence: Evidence | None = None
    payloads: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    """Payloads held, by source hotkey: (payload, its evidence root)."""
    payload_root: bytes = bytes(32)


class Archive:
    """The rounds a miner still answers for."""

    def __init__(self, *, keep: int = 2) -> None:
        self._keep = keep
        self._rounds: dict[int, RoundArchive] = {}

    def open(self, number: int) -> RoundArchive:
        """Start a round's archive and forget those too old to be asked for."""
        self._rounds[number] = RoundArchive()
        for old in [held for held in self._rounds if held <= number - self._keep]:
            del self._rounds[old]
        return self._rounds[number]

    def get(self, number: int) -> RoundArchive | None:
        return self._rounds.get(number)

    @property
    def newest(self) -> int:
        """Number of the newest round, -1 before the first."""
        return max(self._rounds, default=-1)
