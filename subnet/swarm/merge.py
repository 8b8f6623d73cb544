"""The merge: which contributions count is read from the chain, and every replica computes the whole merge itself.

Two deadlines decide (design §8). At CUT each replica's record holds the root of its payload, so a source cannot send
different things to different peers. At HAVE each record holds a bitmap of the payloads its owner has; a source counts
iff more than half of the stage's replicas that cut in time have it, and the round counts iff the list holds more than
half of them. Otherwise the round is void and contributions carry over (`neurons.replica`).

Reduction arithmetic is pinned: fp32, hotkey order, separate multiply and add. Replicas end bit-identical by
construction, on any device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from model.optimizer import OuterConfig, outer_step, plain_step
from subnet.swarm.record import Phase, Record


@dataclass(frozen=True, slots=True)
class Source:
    """A replica whose payload was fixed in time."""

    index: int
    """Position among the stage's replicas in hotkey order: its bit in every have-bitmap."""
    hotkey: str
    root: bytes
    """`bind_roots(payload root, evidence root)` as committed."""
    work: int


def cut_sources(replicas: Sequence[str], records: Mapping[str, Record | None], number: int) -> tuple[Source, ...]:
    """Replicas of the stage whose record at the CUT block fixes a payload for round `number`."""
    sources = []
    for index, hotkey in enumerate(replicas):
        record = records.get(hotkey)
        if record is not None and record.fixes(number):
            sources.append(Source(index, hotkey, record.root, record.work))
    return tuple(sources)


def accepted(sources: Sequence[Source], records: Mapping[str, Record | None], number: int) -> tuple[Source, ...]:
    """The source list of round `number` from the records at the HAVE block; empty means the round is void.

    A record whose root is no longer the one at CUT does not vote: it was changed after the deadline.
    """
    voters = 0
    votes = {source.index: 0 for source in sources}
    for source in sources:
        record = records.get(source.hotkey)
        if record is None or record.round != number or record.phase < Phase.HAVE or record.root != source.root:
            continue
        voters += 1
        for index in votes:
            votes[index] += (record.have >> index) & 1
    listed = tuple(source for source in sources if votes[source.index] * 2 > len(sources))
    return listed if voters * 2 > len(sources) and len(listed) * 2 > len(sources) else ()


def mean(deltas: Iterable[torch.Tensor]) -> torch.Tensor:
    """Plain mean of fp32 pseudo-gradients, summed in the order given (hotkey order), then one multiplication.

    Takes them one by one, so no more than two need be in memory. Raises `ValueError` if there are none.
    """
    total, count = None, 0
    for delta in deltas:
        total, count = delta if total is None else total + delta, count + 1
    if total is None:
        raise ValueError("the mean of no pseudo-gradients: a round without sources leaves the state as it is")
    return total * (1.0 / count)


@dataclass(frozen=True, slots=True)
class Merged:
    """A stage's public state, equal on every replica."""

    theta: torch.Tensor
    """Weights, fp32 (n,)."""
    momentum: torch.Tensor
    """Outer momentum, fp32 (n,), or empty (0,) where the codec's error feedback takes its place."""


def step(state: Merged, change: torch.Tensor, outer: OuterConfig) -> Merged:
    """One outer step on a mean pseudo-gradient, element by element: a shard's step is the shard of the whole's.

    Without a momentum buffer the step is plain; `ValueError` if `outer` asks for momentum all the same.
    """
    if not state.momentum.numel():
        return Merged(plain_step(state.theta, change, outer), state.momentum)
    theta, momentum = outer_step(state.theta, change, state.momentum, outer)
    return Merged(theta, momentum)


def taken_over(weights: torch.Tensor, start: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A replica's weights (fp32, any shape) once the state that they started from, `start`, has become `target`.

    Progress since then is added, in fp32 and element by element, so anybody gets the same bits; weights that have not
    moved land on the new state exactly, not on a sum that rounds to it.
    """
    return torch.where(weights == start, target, weights + (target - start))
