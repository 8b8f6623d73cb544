"""What the heads of a round say about each other: every window goes on from where the one before it ended.

Nothing is fetched for it. With it a few windows stand for all: who replaces weights or moments between two windows has
to write it down, and who writes it down inside a window is found when that window is picked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from subnet.trust.heads import WindowHead


@dataclass(frozen=True, slots=True)
class Break:
    """A window that does not go on from the one before."""

    version: int
    reason: str


def breaks(heads: Sequence[WindowHead]) -> Iterator[Break]:
    """Every break in a round's chain of heads, in order.

    A step adds one to the steps done, unless its gradient was not finite, which leaves everything as it was; a window
    without a backward unit ends as it began; moments are touched by steps alone; weights change between two windows
    only where a merge was taken over, which is once.
    """
    merges = 0
    for head in heads:
        if not head.backward and not head.idle:
            yield Break(head.version, "ends in another state than it began with, without a backward unit")
        merges += head.merged > 0
        if head.merged and merges > 1:
            yield Break(head.version, "begins with a merge taken over, the second one in its round")
    for before, head in pairwise(heads):
        dropped = before.idle and head.steps == before.steps
        if head.steps != before.steps + (before.backward > 0) and not dropped:
            yield Break(head.version, f"begins after {head.steps} steps, the window before after {before.steps}")
        if head.optimizer != before.next_optimizer:
            yield Break(head.version, "begins with other moments than the window before ended with")
        if not head.merged and head.weights != before.next_weights:
            yield Break(head.version, "begins with other weights than the window before ended with, without a merge")
