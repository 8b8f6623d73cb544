"""One round's training at one replica: what is open, in flight, computed and receipted."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import torch

from neurons.archive import RoundArchive
from subnet.messages import Forward
from subnet.swarm.roster import Roster
from subnet.trust.ledger import Ledger, UnitKey


@dataclass
class OpenInput:
    """A forward unit whose gradient is awaited: where its input came from and what it was."""

    source: str
    source_index: int
    tensor: torch.Tensor
    digest: bytes
    taken_over: bool = False
    """Fetched to compute a dead sibling's backward; this replica sent nothing forward for it."""


@dataclass
class Awaited:
    """A forward output that was delivered and whose gradient is awaited."""

    sink: str
    since: float
    """Loop time of the delivery."""


@dataclass
class TrainingRound:
    """From the first push to the closed ledger."""

    number: int
    roster: Roster
    seed: bytes
    """Of the routing lottery."""
    archive: RoundArchive
    ledger: Ledger = field(default_factory=Ledger)
    accepting: bool = True
    stopping: bool = False
    receipts: dict[UnitKey, tuple[str, str]] = field(default_factory=dict)
    """Pushes accepted: who sent them and the receipt they got."""
    open: dict[int, OpenInput] = field(default_factory=dict)
    pushes: dict[int, Forward] = field(default_factory=dict)
    """Forwards sent on, kept to be offered again."""
    awaited: dict[int, Awaited] = field(default_factory=dict)
    sinks: dict[int, set[str]] = field(default_factory=dict)
    """Who signed for the forward of a sample: only they may send its gradient."""
    claims: dict[int, set[str]] = field(default_factory=dict)
    """Who asked for the activation of a sample to take a sibling's unit over: they may send its gradient once those who
    signed for it cannot be reached."""
    delivering: set[int] = field(default_factory=set)
    """Samples whose gradient is being passed on."""
    adopting: set[int] = field(default_factory=set)
    """Samples whose input is being fetched to take over a dead sibling's backward."""
    orphans: set[int] = field(default_factory=set)
    """Samples whose input nobody in the stage before has."""
    flights: dict[int, float] = field(default_factory=dict)
    """At the head: samples in flight and when they left."""
    started: int = 0
    completed: int = 0
    adopted: int = 0
    """Backwards computed here in place of a sibling that is gone."""
    chased: int = 0
    """Outputs offered to another replica because their gradient was overdue."""
    rerouted: int = 0
    units: int = 0
    work: set[asyncio.Task[None]] = field(default_factory=set)
    sends: set[asyncio.Task[None]] = field(default_factory=set)
    room: asyncio.Event = field(default_factory=asyncio.Event)
