"""The filter behind the door: what a neighbour sends is computed with only if it looks like what it and its siblings
sent before (`subnet.trust.boundary`), and is not what it sent before for another sample: whole microbatches are never
alike, and one gradient again and again drives an optimizer straight off.

What fails is refused, before any receipt, and that is all. It is not computed and kept out of the
optimizer instead: every backward leaf of a window counts in its step, which an audit replays, so an honest replica that
left one out would fail; and what follows from a bad tensor looks bad one stage on, where an honest neighbour would be
blamed for it. For its sender a refusal is DROP: an activation goes to the other replicas of this stage, each of which
judges by itself, and a gradient is not sent again. The microbatch lives on through a sibling of the sender where
`Delivery.chase` finds one in time, else the head reports it lost. A sender can make nothing of this that it could not
have by sending nothing: bounds are per sender, so nobody else's pushes are refused for what it sends.

Who has `STRIKES` gradients refused in a row is asked last for a while, like a replica that cannot be reached, so that
the next microbatches go another way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

import torch

from neurons.telemetry import Quarantined, Telemetry
from neurons.training import TrainingRound
from subnet.messages import WIRE_LIMIT
from subnet.transport.errors import Dropped, NotFinite
from subnet.transport.synapse import OFF_LOOP, require_finite
from subnet.trust.boundary import SILENCE, Bounds, Magnitudes, magnitudes
from subnet.trust.ledger import Direction

log = logging.getLogger("orion.neurons.filter")

STRIKES = 3
"""Refusals in a row; one that is wrong comes alone."""


async def look(name: str, tensor: torch.Tensor) -> Magnitudes:
    """What a tensor from the wire comes to, before anything is done with it; a large one is looked at in a thread.

    Raises `NotFinite` of one with values that are not finite, or beyond `WIRE_LIMIT`.
    """
    large = tensor.nbytes >= OFF_LOOP
    found = await asyncio.to_thread(magnitudes, tensor) if large else magnitudes(tensor)
    if not found.largest <= WIRE_LIMIT:
        require_finite({name: tensor}, limit=WIRE_LIMIT)
    return found


class Filter:
    """One replica's, over all rounds of its life at a stage."""

    def __init__(self, *, stage: int, telemetry: Telemetry, set_aside: Callable[[str], None]) -> None:
        """
        Args:
            stage: of this replica, for the event log.
            set_aside: makes a replica of the next stage be asked last for a while.
        """
        self._stage = stage
        self._telemetry = telemetry
        self._set_aside = set_aside
        self._bounds = Bounds()
        self._round = -1
        self._refused: dict[tuple[str, int, Direction], str] = {}
        self._sent: dict[tuple[str, Direction, bytes], int] = {}
        """Samples of the round by the digest of what was sent for them."""
        self._counts: Counter[str] = Counter()
        self._strikes: Counter[tuple[str, Direction]] = Counter()

    def require_usual(
        self,
        current: TrainingRound,
        caller: str,
        sample: int,
        direction: Direction,
        seen: Magnitudes,
        digest: bytes,
    ) -> None:
        """Let a push go on to be computed, or not: `seen` is what its finite tensor comes to, `digest` that tensor's.

        Raises `Dropped` naming the number, by what it is off and the limit, or the sample it was sent for. A push that
        was refused is refused again without being looked at, so nobody moves a level by repeating it.
        """
        if current.number != self._round:
            self._round = current.number
            self._refused.clear()
            self._sent.clear()
            self._counts.clear()
        key = (caller, sample, direction)
        reason = self._refused.get(key)
        if reason is None:
            unusual = self._unusual(caller, sample, direction, seen, digest)
            if not unusual:
                del self._strikes[caller, direction]
                return
            reason = self._refused[key] = unusual
            self._counts[caller] += 1
            self._strikes[caller, direction] += 1
            self._note(current, caller, sample, direction, reason)
            if direction is Direction.BACKWARD and self._strikes[caller, direction] >= STRIKES:
                self._set_aside(caller)
        raise Dropped(
            f"{direction.name.lower()} of sample {sample} is unlike the others: {reason}",
            "check this replica's device and weights",
        )

    def _unusual(self, caller: str, sample: int, direction: Direction, seen: Magnitudes, digest: bytes) -> str:
        """Why a push is refused, "" if it is not."""
        if seen.root > SILENCE:
            first = self._sent.setdefault((caller, direction, digest), sample)
            if first != sample:
                return f"it is what was sent for sample {first}"
        outside = self._bounds.judge(direction, caller, seen.numbers)
        return "" if outside is None else str(outside)

    async def takes(self, current: TrainingRound, caller: str, sample: int, y: torch.Tensor, digest: bytes) -> bool:
        """Whether an activation that was fetched from `caller` may be computed with; says why if not."""
        try:
            self.require_usual(current, caller, sample, Direction.FORWARD, await look("y", y), digest)
        except (NotFinite, Dropped) as refusal:
            log.warning("what %s served is not taken: %s", caller, refusal)
            return False
        return True

    def _note(self, current: TrainingRound, caller: str, sample: int, direction: Direction, reason: str) -> None:
        log.warning("%s of sample %d from %s is kept out: %s", direction.name.lower(), sample, caller, reason)
        self._telemetry.emit(
            Quarantined(
                round=current.number,
                stage=self._stage,
                hotkey=caller,
                direction=direction.name.lower(),
                sample=sample,
                reason=reason,
                count=self._counts[caller],
            )
        )
