"""Faults on demand: which nodes of a local swarm are killed, and when.

miner:3@round1     kill -9 of miner-3 in the middle of round 1
stage:2@round1     the same for one replica of stage 2, whoever holds it
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.tally import Tally

_SPEC = re.compile(r"^(miner|stage):(\d+)@round(\d+)$")


class FaultError(ValueError):
    """A fault that cannot be read: one line with the value and the form it must have."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Kill a miner by its number, or one replica of a stage, in a round."""

    kind: str
    number: int
    round: int

    @classmethod
    def parse(cls, text: str) -> Fault:
        match = _SPEC.match(text)
        if match is None:
            raise FaultError(f"--kill {text!r} is not of the form miner:3@round1 or stage:2@round1")
        return cls(match[1], int(match[2]), int(match[3]))

    def target(self, tally: Tally) -> str | None:
        """The node's name, None while nobody fits."""
        if self.kind == "miner":
            return f"miner-{self.number}"
        alive = sorted(m.name for m in tally.miners.values() if m.stage == self.number and m.state != "dead")
        return alive[0] if alive else None


class FaultPlan:
    """Faults that are still to come. `due` hands each out once, in the middle of its round."""

    def __init__(self, faults: Sequence[Fault], *, round_seconds: float) -> None:
        self._left = list(faults)
        self._half = round_seconds * 0.4
        self._began: dict[int, float] = {}

    def due(self, tally: Tally, *, now: float) -> list[str]:
        """Names of the nodes to kill at time `now` (seconds, any clock that goes forward)."""
        self._began.setdefault(tally.round, now)
        ripe = [fault for fault in self._left if now - self._began.get(fault.round, now) > self._half]
        self._left = [fault for fault in self._left if fault not in ripe]
        return [name for fault in ripe if (name := fault.target(tally)) is not None]
