"""A receiver's bounds on what neighbours send it: values outside them go no further than its door.

Every tensor that crosses a boundary is summed up in three numbers, cheaper than its digest:

    size   log of the root mean square: scaling, noise of the order of the signal, silence
    peak   log of root mean square over mean magnitude: the signal moved into few values, or cut to a few levels
    crest  log of largest magnitude over root mean square: single wild values that hardly change the size

For every sender and direction (an *edge*) each number has a level and a width: exponential means of the value, and of
how far values fell from it. A push is taken if it is near its edge's own level and near the median level of all edges
of its direction; or, where everything moves at once (a merge, a change of rate), near the last pushes of most of them.
"Near" is `WIDTHS` widths, and never less than `LEAST`. This follows SENTINEL (arXiv 2603.03592), which keeps such
means at a router; here every receiver has its own.

*Warm-up* needs no rule of its own: a width begins at `WIDEST` and comes down with evidence, so at the start of a run
only what is off by orders of magnitude is refused. Training itself is as violent there: the first rounds of `nano` show
honest gradients of eight times their neighbours' size. A tenfold scaling was caught in 1, 50 and 100 % of cases after
30, 60 and 100 pushes of an edge, with none of 12,000 honest pushes refused, from the first one on. A sender that is new
begins at the median of the others, so nobody gets a second warm-up by coming back.

*Slow boiling.* What a push can move a level by is bounded, and with three edges or more it ends at the median: a
minority that drifts away from it is refused once it is farther off than the bound, a factor of two as a rule, however
slowly it went. A sender's width counts up to `ALIKE` times the median one, so nobody widens its own bound. With two
edges nobody can say which of them drifts, with one there is nothing to compare: there only speed is bounded, and one of
two that sends with unnatural evenness narrows the other's bound, to the factor of two at worst.

*False refusals.* A push within a factor of two of its level is never refused. Of honest pushes whose deviations have
normal tails, one in 1e15 lies beyond 10 mean absolute deviations; with Laplace tails e^-10 = 4.5e-5 do, so at most 1e-4
of all pushes for size and peak. Of the three the crest alone has such tails: in 8,400 gradients of `pico` with Muon, 12
seeds, once off by about 9 widths, a factor of 3, where size and peak never left a factor of 1.6. It is a maximum,
and what a single value can do the size bounds as well, so it has 16 widths, beyond which e^-16 = 1e-7 lie. One refusal
costs one microbatch's detour, or the microbatch where its sender is the last replica of its stage, and nothing else.

*Not seen*: anything that keeps the three numbers, such as a flipped sign, another sample's tensor, stale weights, a
skipped layer, noise below 1.7 times the signal; a majority of a stage's replicas that moves together; the first pushes
of a run. Audits (`subnet.trust.audit`) and attribution (`subnet.trust.attribution`) are for those. A refusal convicts
nobody.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

import torch

WIDTHS = (10.0, 10.0, 16.0)
"""Widths (mean absolute deviations) of size, peak and crest from a level within which a push is near it."""
LEAST = math.log(2.0)
"""Nats from a level within which a push is always near it."""
WIDEST = 0.5
"""Nats: the width before anything is known, and the largest."""
ALIKE = 1.5
"""A sender's width counts up to this many times the median of its direction."""
LEVEL_RATE = 0.2
"""What one push weighs in its edge's level."""
REFUSED_RATE = 0.02
"""The same for a push that is refused: a lasting change that concerns one sender alone is taken in the end, after a
hundred refusals where it is tenfold. Whole swarms change at once, and that is taken from the second push on."""
WIDTH_RATE = 1 / 32
"""What one push that is taken weighs in its edge's width. Deviations count up to 3 widths."""
MANY = 3
"""Edges from which on a median says who has drifted."""
IDLE = 1024
"""Pushes of a direction after which an edge that sent none of them is forgotten."""
SILENCE = 1e-18
"""A root mean square below this is none: fp32 cannot hold its square."""
BLOCK = 256 * 1024
"""Elements summed up at a time: as fp32 they are a megabyte, which stays in a core's cache from one sum to the next."""
_memory = threading.local()

NAMES = ("size", "peak", "crest")
Numbers = tuple[float, float, float]
"""Size, peak and crest of a tensor, natural logs."""


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """What a tensor's magnitudes come to."""

    root: float
    """Of their mean square."""
    mean: float
    largest: float
    """NaN if there is one among the values."""

    @property
    def numbers(self) -> Numbers:
        """Of a finite tensor; of one whose root mean square is below `SILENCE` log(SILENCE), 0, 0."""
        if self.root < SILENCE:
            return math.log(SILENCE), 0.0, 0.0
        return math.log(self.root), math.log(self.root / self.mean), math.log(self.largest / self.root)


def magnitudes(tensor: torch.Tensor) -> Magnitudes:
    """Of a tensor in host memory, of any shape and floating dtype, in one pass (1 ms per million bf16)."""
    count = max(1, tensor.numel())
    flat, scratch = tensor.detach().reshape(-1), _scratch()
    squares, total, largest = 0.0, 0.0, 0
    for start in range(0, flat.numel(), BLOCK):
        values = flat[start : start + BLOCK]
        wide = scratch[: values.numel()].copy_(values).abs_()
        squares += float(torch.dot(wide, wide))
        total += float(wide.sum())
        # The bits of what has no sign, read as integers, are in the same order, NaN last; and integers compare faster.
        largest = max(largest, int(wide.view(torch.int32).max()))
    reached = float(torch.tensor(largest, dtype=torch.int32).view(torch.float32))
    return Magnitudes(math.sqrt(squares / count), total / count, reached)


def _scratch() -> torch.Tensor:
    """A block of this thread's own: the pages of a new one would be cleared first, which takes longer than the sums."""
    found: torch.Tensor | None = getattr(_memory, "block", None)
    if found is None:
        found = _memory.block = torch.empty(BLOCK, dtype=torch.float32)
    return found


@dataclass(frozen=True, slots=True)
class Outside:
    """Why a push is refused: one of its numbers is off by more than the bound."""

    name: str
    value: float
    level: float
    """What it was compared with: the edge's own level, or the median of the direction."""
    bound: float
    """Nats."""
    common: bool
    """Whether it was the median."""

    def __str__(self) -> str:
        of = "that of its stage's replicas" if self.common else "what it sent before"
        return (
            f"{self.name} is {math.exp(self.value - self.level):.3g} times {of}, limit a factor of "
            f"{math.exp(self.bound):.3g}"
        )


@dataclass(slots=True)
class _Edge:
    levels: list[float]
    widths: list[float]
    last: Numbers
    """Of its last push, taken or not."""
    heard: int = 0
    """The direction's count of pushes at its last one."""


@dataclass(slots=True)
class _Direction:
    edges: dict[str, _Edge] = field(default_factory=dict)
    pushes: int = 0


class Bounds:
    """The bounds of one receiver, over all directions. Memory: six numbers per edge, edges by `IDLE` pushes."""

    def __init__(self) -> None:
        self._directions: dict[Hashable, _Direction] = {}

    def judge(self, direction: Hashable, sender: str, values: Numbers) -> Outside | None:
        """What is wrong with a push, None if nothing; its numbers are learned from in both cases.

        Call it once per push: a sender that could repeat one would move its own level faster.
        """
        here = self._directions.setdefault(direction, _Direction())
        here.pushes += 1
        edge = here.edges.get(sender)
        if edge is None:
            edge = _newcomer(list(here.edges.values()), values)
        others = [other for hotkey, other in here.edges.items() if hotkey != sender]
        outside = _compare(edge, others, values)
        _learn(edge, others, values, taken=outside is None)
        edge.heard = here.pushes
        here.edges[sender] = edge
        for hotkey in [hotkey for hotkey, old in here.edges.items() if here.pushes - old.heard > IDLE]:
            del here.edges[hotkey]
        return outside


def _newcomer(others: Sequence[_Edge], values: Numbers) -> _Edge:
    if not others:
        return _Edge(list(values), [WIDEST] * len(values), values)
    levels = [median(other.levels[i] for other in others) for i in range(len(values))]
    return _Edge(levels, [median(other.widths[i] for other in others) for i in range(len(values))], values)


def _bound(edge: _Edge, others: Sequence[_Edge], i: int) -> float:
    """How far number `i` of a push may be from a level, nats."""
    usual = median_low([edge.widths[i], *(other.widths[i] for other in others)])
    return max(LEAST, WIDTHS[i] * min(edge.widths[i], ALIKE * usual))


def _compare(edge: _Edge, others: Sequence[_Edge], values: Numbers) -> Outside | None:
    for i, value in enumerate(values):
        bound = _bound(edge, others, i)
        with_it = 1 + sum(abs(value - other.last[i]) <= bound for other in others)
        if others and 2 * with_it > len(others) + 1:
            continue
        if abs(value - edge.levels[i]) > bound:
            return Outside(NAMES[i], value, edge.levels[i], bound, common=False)
        if len(others) + 1 >= MANY:
            middle = median([edge.levels[i], *(other.levels[i] for other in others)])
            if abs(value - middle) > bound:
                return Outside(NAMES[i], value, middle, bound, common=True)
    return None


def _learn(edge: _Edge, others: Sequence[_Edge], values: Numbers, *, taken: bool) -> None:
    """Move level and width towards a push: by no more than one within the bounds could, hardly at all if refused."""
    for i, value in enumerate(values):
        bound = _bound(edge, others, i)
        off = value - edge.levels[i]
        edge.levels[i] += (LEVEL_RATE if taken else REFUSED_RATE) * max(-bound, min(bound, off))
        if taken:
            seen = min(abs(off), 3.0 * edge.widths[i])
            edge.widths[i] = min(WIDEST, edge.widths[i] + WIDTH_RATE * (seen - edge.widths[i]))
    edge.last = values
