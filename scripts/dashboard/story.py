"""A run's story as the page tells it: the tally, and beside it the histories that a tally does not keep.

What is counted once or twice, who is in which state, what a run's figures are: the tally says. This adds when.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import merge

from neurons.telemetry import Checked, Merged, MinerScored, NodeStarted, RoundStarted, Stamped, Validated
from scripts.dashboard.curves import Curve, Rate
from scripts.dashboard.meter import Meter
from scripts.dashboard.notes import Note, Topic, note
from scripts.tally import Tally
from subnet.trust.finding import UNIT_CHECKS

NOTES = 400
"""Kept of each topic: many of one leave the others' in the log."""
SCORED_ROUNDS = 4
FAILURES = 60


@dataclass
class Beginning:
    """Of a round: when, and at which block."""

    time: float
    block: int
    replicas: list[int]


@dataclass
class Findings:
    """Checks of one miner by all validators, findings that came from another's report left out."""

    stage: int
    """Of the latest."""
    passed: int = 0
    failed: int = 0
    """Of replayed units."""
    other_passed: int = 0
    other_failed: int = 0
    """Of everything else that is looked at: heads, weights, steps, payloads, receipts, what was withheld."""


@dataclass
class Story:
    """Folds events in the order of their times."""

    tally: Tally
    begin: float | None = None
    """Time of the first event, seconds since the epoch."""
    roles: dict[str, str] = field(default_factory=dict)
    """By node name."""
    losses: Curve = field(default_factory=Curve)
    rate: Rate = field(default_factory=Rate)
    beginnings: dict[int, Beginning] = field(default_factory=dict)
    validated_at: dict[int, float] = field(default_factory=dict)
    merges: dict[tuple[int, int], dict[str, Merged]] = field(default_factory=dict)
    """By (round, stage) and node name."""
    last_merge: dict[str, Merged] = field(default_factory=dict)
    """By node name."""
    findings: dict[str, Findings] = field(default_factory=dict)
    """By hotkey."""
    failures: deque[tuple[str, Checked]] = field(default_factory=lambda: deque(maxlen=FAILURES))
    """The latest checks that failed, with the validator's node name."""
    scores: dict[int, dict[tuple[str, str], MinerScored]] = field(default_factory=dict)
    """By round, then by (validator's node name, hotkey); the latest rounds only."""
    meter: Meter = field(default_factory=Meter)
    noted_by_topic: dict[Topic, deque[Note]] = field(default_factory=dict)
    noted: set[tuple[str, int]] = field(default_factory=set)
    """What many nodes say alike and the log shall say once: kind and round."""

    @property
    def notes(self) -> list[Note]:
        """Oldest first."""
        return list(merge(*self.noted_by_topic.values(), key=lambda line: line.time))

    def called(self, hotkey: str) -> str:
        """The node name of a hotkey, or what it begins with where no log is of it."""
        return next((name for name, known in self.tally.hotkeys.items() if known == hotkey), f"{hotkey[:8]}…")

    def add(self, name: str, stamped: Stamped) -> None:
        """Fold in one event of the node `name`."""
        tally = self.tally
        completed = tally.completed
        tally.add(name, stamped)
        tally.news.clear()
        self.meter.add(name, stamped)
        self.begin = stamped.time if self.begin is None else min(self.begin, stamped.time)
        if tally.completed > completed:
            self.losses.add(stamped.time, tally.completed, tally.losses[-1])
            self.rate.add(stamped.time)
        match stamped.event:
            case NodeStarted(role=role):
                self.roles[name] = role
            case RoundStarted() as event:
                self.beginnings.setdefault(event.round, Beginning(stamped.time, event.block, event.replicas))
            case Validated(round=number):
                self.validated_at.setdefault(number, stamped.time)
            case Merged() as event:
                self.merges.setdefault((event.round, event.stage), {})[name] = event
                self.last_merge[name] = event
            case Checked() as event:
                self._checked(name, event)
            case MinerScored() as event:
                self.scores.setdefault(event.round, {})[name, event.hotkey] = event
                for old in sorted(self.scores)[:-SCORED_ROUNDS]:
                    del self.scores[old]
            case _:
                pass
        self._note(name, stamped)

    def _checked(self, name: str, event: Checked) -> None:
        if not event.passed:
            self.failures.append((name, event))
        if event.accuser:
            return
        findings = self.findings.setdefault(event.hotkey, Findings(event.stage))
        findings.stage = event.stage
        if event.check in UNIT_CHECKS:
            findings.passed += event.passed
            findings.failed += not event.passed
        else:
            findings.other_passed += event.passed
            findings.other_failed += not event.passed

    def _note(self, name: str, stamped: Stamped) -> None:
        key = _said_by_many(stamped)
        if key is not None and key in self.noted:
            return
        line = note(name, stamped, self.called)
        if line is not None:
            self.noted_by_topic.setdefault(line.topic, deque(maxlen=NOTES)).append(line)
            if key is not None:
                self.noted.add(key)


def _said_by_many(stamped: Stamped) -> tuple[str, int] | None:
    """What is the same whichever validator says it."""
    match stamped.event:
        case RoundStarted(stage=None, round=number):
            return "round", number
        case Validated(round=number):
            return "validation", number
        case _:
            return None
