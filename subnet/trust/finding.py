"""A finding: the outcome of one check of one miner in one round, and how much it may weigh.

Three grades. A *proof* is exact and anyone can repeat it: a hash, a signature, an optimizer step that does not follow;
one convicts. A *measurement* compares floating-point results across machines: it goes into the sequential test of
`subnet.trust.decision`. What was *withheld* cannot be shown to others, so it counts in one's own score only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Check(StrEnum):
    """What was looked at."""

    FORWARD = "forward"
    BACKWARD = "backward"
    LOSS = "loss"
    DATA = "data"
    """A head's input is the assigned sample."""
    WEIGHTS = "weights"
    """A window's weights follow from public state, or link to the window before."""
    GRADIENT = "gradient"
    """The gradient in a step is the one its units give."""
    STEP = "step"
    """Optimizer arithmetic, given the gradient."""
    POLAR = "polar"
    """A matrix moved by the polar factor of its momentum."""
    HEADS = "heads"
    """No signed statement is contradicted."""
    PAYLOAD = "payload"
    """What was sent into the merge follows from the weights at the cut."""
    SHARD = "shard"
    """A holder's digest of a merged shard."""
    RECEIPT = "receipt"
    """Neighbours' leaves and signatures agree."""
    WITHHELD = "withheld"


UNIT_CHECKS = frozenset({Check.FORWARD, Check.BACKWARD, Check.LOSS})
"""Checks of one replayed unit each."""


class Grade(StrEnum):
    PROOF = "proof"
    MEASUREMENT = "measurement"
    WITHHELD = "withheld"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check. `version`, `sample` and `piece` say where, as far as they apply."""

    hotkey: str
    round: int
    stage: int
    check: Check
    grade: Grade
    passed: bool
    error: float = 0.0
    """Relative, as the check defines it; infinite where nothing could be compared."""
    tolerance: float = 0.0
    version: int | None = None
    sample: int | None = None
    piece: int | None = None
    reason: str = ""
