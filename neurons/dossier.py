"""What an audit of a round is about: what everybody knows of it, and what is known of one miner in it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from neurons.fetching import Source
from neurons.follower import RoundStart
from subnet.swarm.record import Record
from subnet.swarm.roster import Roster
from subnet.trust.finding import Finding
from subnet.trust.heads import Statement, WindowHead
from subnet.trust.ledger import Evidence, UnitKey


@dataclass(frozen=True, slots=True)
class RoundFacts:
    """What everybody knows of a round when its audit begins, and this validator's secret."""

    roster: Roster
    records: Mapping[str, Record | None]
    """At CUT."""
    start: RoundStart
    seeds: Sequence[bytes]
    """By slot."""
    secret: bytes
    stake_share: float
    """This validator's part of the stake at work."""
    statements: Mapping[str, Sequence[Statement]]
    """What miners signed during the round, by hotkey."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A finding as this validator came by it."""

    finding: Finding
    accuser: str = ""
    """Hotkey of the validator whose finding was replayed; empty for an own one."""
    statement: Statement | None = None
    """Of a proof by what the miner signed."""


@dataclass
class Dossier:
    """One miner in one round."""

    hotkey: str
    stage: int
    source: Source
    evidence: Evidence | None = None
    picked: dict[int, bytes] = field(default_factory=dict)
    """Slot seed of the picked windows, by version, in the ledger's order."""
    entries: list[Entry] = field(default_factory=list)
    replayed: set[UnitKey] = field(default_factory=set)
    stepped: set[int] = field(default_factory=set)
    """Windows whose whole gradient was asked for."""
    pieces: set[tuple[int, int]] = field(default_factory=set)
    """Windows and pieces of their state around the step that were looked at."""
    polar: set[int] = field(default_factory=set)
    """Windows of which a whole matrix was looked at."""
    merges: set[tuple[int, int]] = field(default_factory=set)
    """Windows and pieces of the weights that a merge was taken over to."""
    shut: set[int] = field(default_factory=set)
    """Windows of which something was withheld: no more is asked of them."""
    first: torch.Tensor | None = None
    """Weights of the round's first window, fp32 (n,), if they follow from public state and it is picked."""
    moved: bool = False
    """Whether the round's first window began with the public state, so that no merge was left to be taken over."""
    deltas: dict[int, bytes] = field(default_factory=dict)
    """By version: what the weights of picked windows differ by from public state."""
    flops: float = 0.0
    absent: str = ""
    """Why there are no tables yet: nobody answered. Empty if somebody did."""
    broken: str = ""
    """What ended the audit on this validator's side; then what passed speaks for nobody. Empty if nothing did."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by who replays because of another's report."""

    @property
    def looks(self) -> int:
        """How much of what the miner served was looked at: units, gradients, pieces, matrices."""
        return len(self.replayed) + len(self.stepped) + len(self.pieces) + len(self.polar) + len(self.merges)

    @property
    def findings(self) -> list[Finding]:
        return [entry.finding for entry in self.entries]

    def head(self, version: int) -> WindowHead | None:
        heads = () if self.evidence is None else self.evidence.heads
        return next((head for head in heads if head.version == version), None)
