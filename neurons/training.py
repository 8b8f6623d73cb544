"""One round's training at one replica: what is open, in flight, computed and receipted."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

import torch

from neurons.archive import RoundArchive
from neurons.flights import Flight
from subnet.messages import Forward
from subnet.swarm.roster import Roster
from subnet.trust.ledger import Direction, Ledger, UnitKey

GRADIENTS_KEPT = 256


@dataclass
class OpenInput:
    """A forward unit whose gradient is awaited: where its input came from and what it was."""

    source: str
    source_index: int
    tensor: torch.Tensor
    digest: bytes
    taken_over: bool = False
    """Opened in place of a sibling that is gone: the gradient may come from whoever that one sent its output to."""


@dataclass
class Awaited:
    """A forward output that was delivered and whose gradient is awaited."""

    sink: str
    since: float
    """Loop time of the delivery."""
    first: float
    """Of the first one, where it was offered again since: what a return is measured from."""
    shared: bool = False
    """The other side had it from a sibling already: it is asked again, but nobody else is given the same work."""


@dataclass
class Sibling:
    """Another head in this round: what it said of itself, what it knows of us, whether it is there. Times are the
    loop's."""

    started: int = 0
    """It may have started its indices below this one."""
    open: frozenset[int] = frozenset()
    """Those of them that are not back."""
    heard: float = -math.inf
    """When its last notice came."""
    met: bool = False
    """It has answered or spoken in this round."""
    failing: float | None = None
    """Since when it has not answered as one who plays this round; None if it has."""
    told: int = 0
    """Up to which of our own indices it knows."""
    asked: float | None = None
    """Since when it owes an acknowledgement."""
    exchanged: float = -math.inf
    """When the last exchange that has ended began."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """There is something to tell it now."""


@dataclass
class TrainingRound:
    """From the first push to the closed ledger."""

    number: int
    roster: Roster
    seed: bytes
    """Of the routing lottery."""
    archive: RoundArchive
    ledger: Ledger = field(default_factory=Ledger)
    closing_at: float = math.inf
    """When it is expected to close, by the loop's clock."""
    accepting: bool = True
    stopping: bool = False
    receipts: dict[UnitKey, tuple[str, str]] = field(default_factory=dict)
    """Pushes accepted: who sent them and the receipt they got."""
    open: dict[int, OpenInput] = field(default_factory=dict)
    pushes: dict[int, Forward] = field(default_factory=dict)
    """Forwards sent on, kept to be offered again."""
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    """Activations sent forward whose gradient is not here: they may have to be sent again, kept as evidence or not."""
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)
    """The last `GRADIENTS_KEPT` passed on, by sample: a sibling of who had them may have to be offered them."""
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
    flights: dict[int, Flight] = field(default_factory=dict)
    """At the head: samples in flight and how they left."""
    siblings: dict[str, Sibling] = field(default_factory=dict)
    """At the head: the other heads."""
    watching: bool = False
    lease: int = 0
    """Own indices below this one are announced to the siblings; those below `started` have left."""
    out: set[int] = field(default_factory=set)
    """Own indices announced and not back."""
    foreign: set[int] = field(default_factory=set)
    """Samples of other heads that were taken up here."""
    taken: set[int] = field(default_factory=set)
    """Those of them whose gradient is here."""
    elsewhere: set[int] = field(default_factory=set)
    """Samples whose gradient another head says it has, though they are not its own."""
    beat: float = math.inf
    """At the head: when it last looked after its flights."""
    woke: float = -math.inf
    """When this process last found that it had been stopped."""
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

    def output(self, sample: int) -> torch.Tensor | None:
        """What was sent forward of a sample, as long as it is awaited or kept as evidence."""
        kept = self.archive.unit(UnitKey(sample, Direction.FORWARD))
        return self.outputs.get(sample, None if kept is None else kept.output)

    def pass_on(self, sample: int, gradient: torch.Tensor) -> None:
        """Remember the gradient of a unit's input; the oldest one is forgotten."""
        self.gradients[sample] = gradient
        if len(self.gradients) > GRADIENTS_KEPT:
            del self.gradients[next(iter(self.gradients))]
