"""What of a swarm's clock time rounds, merges and departures take away, in closed form. Times are seconds.

fill     A round begins with an empty pipeline. All W leave at once, the first is back after T_loop, and from then on
         they come back at full pace: T_loop is lost.
drain    A head starts nothing that takes more than m·f + s·f, a full flight f with its margin and slack. What is in the
         air then comes back at full pace, the last of it after f: (m + s - 1)·f is lost (`neurons.flights`). Heads may
         keep fewer in the air instead of none, which would cost less: with that 29 s were expected at 100b and 39 to
         41 s found by event simulation, since the quickest recent flight, below which none is expected, is a full one.
close    Training closes before the round does, since a unit and a step in flight have to end somewhere.
merge    Serial: all stages wait for it, as the published run's did (facts: orion §1.5, §3.4). Overlapped: it takes a
         share of the uplink, and no time while it is shorter than a round.
churn    A replica leaves at rate f and its place stays empty for D: it is away a = f·D / (1 + f·D) of the time. A
         pipeline runs at the pace of its slowest stage, so what counts is the expected minimum over stages, with
         binomial numbers of replicas there: with 16 stages x 3 every absence costs a third of everything.
unmerged What a replica that dies has added since the last merge is gone: f · round / 2 of all gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from subnet.swarm.codec import Codec

ROSTER_ROUNDS = 2.5
"""Rounds that a dead replica's place stays empty, on average, where a newcomer takes it: half of the one it dies in,
the next, for which its last record still speaks, and the one in which its heir catches up (`membership`)."""


class DowntimeError(ValueError):
    """Numbers that describe no run: one line with the value, the limit and what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How training and merging share the clock."""

    length: float
    """Seconds between two merges."""
    held_back: float
    """Full flights before the close whose time brings nothing back."""
    merge: float
    """Seconds of one merge."""
    overlapped: bool
    pause: float = 0.0
    """Seconds in which a replica computes nothing, while an overlapped merge takes and changes its weights."""
    last_step: float = 0.0
    """Seconds from the close of training to the end of the round."""

    def __post_init__(self) -> None:
        if not 0 < self.length < math.inf or not 0 <= self.merge < math.inf or self.held_back < 0:
            raise DowntimeError(
                f"a round is {self.length} s, a merge {self.merge} s, held back {self.held_back} flights; they must be "
                "finite and above 0: change the round or the links"
            )
        if self.overlapped and self.merge > self.length:
            raise DowntimeError(
                f"a merge takes {self.merge:.0f} s, a round {self.length:.0f} s: it must fit behind the next round's "
                "training, lengthen the round, raise the bandwidth or choose codec topk2bit"
            )

    def ends_share(self, round_trip: float, flight: float) -> float:
        """Of a round, lost to its ends: filling, draining and the last step. Raises `DowntimeError` where nothing is
        left.

        Args:
            round_trip: T_loop, of an empty pipeline.
            flight: of a microbatch through a full one.
        """
        lost = round_trip + self.held_back * flight + self.last_step
        if lost >= self.length:
            raise DowntimeError(
                f"a round of {self.length:.0f} s is over before a microbatch is back ({lost:.0f} s to fill, to drain "
                "and for the last step): lengthen the round"
            )
        return lost / self.length

    @property
    def merge_share(self) -> float:
        """Of clock time, in which nobody trains."""
        return self.pause / self.length if self.overlapped else self.merge / (self.length + self.merge)


@dataclass(frozen=True, slots=True, kw_only=True)
class Churn:
    """Departures without notice."""

    rate: float
    """Per replica and hour."""
    absence: float
    """Seconds that a place stays empty."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate < math.inf or not 0 <= self.absence < math.inf:
            raise DowntimeError(
                f"{self.rate} departures per replica and hour, each for {self.absence} s; both must be finite and at "
                "least 0: change them"
            )

    @property
    def away(self) -> float:
        """Share of its time that a place is empty."""
        expected = self.rate * self.absence / 3600
        return expected / (1 + expected)

    def unmerged_share(self, length: float) -> float:
        """Of all gradients, those that die with their replica before a merge. `length` seconds of a round."""
        return min(1.0, self.rate * length / 3600 / 2)


def pace_kept(rates: Sequence[float], replicas: Sequence[int], away: float) -> float:
    """Expected pace ÷ pace with everybody there: E[min over stages of the rate that is there] ÷ min of the rates.

    Args:
        rates: of each stage with all its replicas, which count alike.
        replicas: of each stage.
        away: probability that a replica is not there, independently of others.
    """
    full = min(rates)
    steps = sorted({min(full, rate * k / n) for rate, n in zip(rates, replicas, strict=True) for k in range(1, n + 1)})
    expected, before = 0.0, 0.0
    for level in steps:
        reached = math.prod(
            _at_least(n, math.ceil(level * n / rate - 1e-9), away) for rate, n in zip(rates, replicas, strict=True)
        )
        expected += (level - before) * reached
        before = level
    return expected / full


def gather_seconds(codec: Codec, parameters: int, *, replicas: int, up: float, down: float) -> float:
    """A merge in which everybody's payload goes to everybody (`neurons.merging`); links in bits per second."""
    return 8 * (replicas - 1) * codec.payload_bytes(parameters) / min(up, down)


def butterfly_seconds(codec: Codec, parameters: int, *, replicas: int, up: float, down: float) -> float:
    """A merge in pair shards: W(3N - 4)/N each way (`subnet.swarm.butterfly`); one replica sends nothing."""
    share = (3 * replicas - 4) / replicas if replicas > 1 else 0.0
    return 8 * share * codec.payload_bytes(parameters) / min(up, down)


def store_seconds(size: float, *, replicas: int, up: float, down: float) -> float:
    """A merge through an object store as the published code does it, one step after another (facts: orion §1.5).

    Of `size` bytes of weights, every replica puts its own change (1), holds 2/N of the shards and gets all copies of
    them (2) and their momentum (2/N), puts the merged weights and momentum (4/N), and gets the merged stage (1).
    """
    held = 2 / replicas
    return 8 * size * ((1 + 2 * held) / up + (3 + held) / down)


def _at_least(trials: int, least: int, away: float) -> float:
    """Probability that at least `least` of `trials` are there."""
    return sum(math.comb(trials, k) * (1 - away) ** k * away ** (trials - k) for k in range(max(0, least), trials + 1))
