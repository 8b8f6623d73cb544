"""How long miners have run: what a card's peak and its price are multiplied with."""

from __future__ import annotations

from dataclasses import dataclass, field

from neurons.telemetry import (
    Intervention,
    LocalStep,
    Merged,
    MicrobatchDone,
    NodeFailed,
    NodeFinished,
    NodeStarted,
    Stamped,
    StateChanged,
)


@dataclass
class Meter:
    """Folds events in the order of their times."""

    seconds: float = 0.0
    """Summed over miners, from the start of their processes to their end, or until now."""
    trained: float = 0.0
    """Of these, those between the first local step of the run and its last merge or microbatch."""
    _running: set[str] = field(default_factory=set)
    _now: float | None = None
    _first: float | None = None
    """`seconds` at the first local step."""

    def add(self, name: str, stamped: Stamped) -> None:
        """Fold in one event of the node `name`."""
        event = stamped.event
        resumed = isinstance(event, Intervention) and event.action == "resume"
        if self._now is not None and not resumed:
            self.seconds += max(0.0, stamped.time - self._now) * len(self._running)
        self._now = stamped.time if self._now is None else max(self._now, stamped.time)
        match event:
            case NodeStarted(role="miner"):
                self._running.add(name)
            case NodeFinished() | NodeFailed() | StateChanged(state="left"):
                self._running.discard(name)
            case Intervention(action="kill", node=node):
                self._running.discard(node)
            case Intervention(action="resume"):
                self._running.clear()
            case LocalStep():
                self._first = self.seconds if self._first is None else self._first
            case Merged() | MicrobatchDone():
                self.trained = self.seconds - (self.seconds if self._first is None else self._first)
            case _:
                pass
