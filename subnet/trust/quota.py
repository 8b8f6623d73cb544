"""What a miner owes whom of its evidence, in bytes and bytes per second: the same arithmetic at both ends.

A validator may take tables, and of what the round's picked windows hold its stake's part, or the largest of them where
that is more: who looks into a window at all needs it whole. It asks for no more than that by itself, and the miner
refuses only beyond `RETRIES` times as much; in between lie replies that were lost on the way. So who is refused below
its part is being denied evidence, and an honest miner's quota is never taken for that.

Evidence takes a tenth of an uplink, in parts that follow stake with a floor. Every miner's uplink is `LEAST_UPLINK` or
more, so a reader of stake share s can count on `least_rate(s)`, however many others read at the time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from model.layout import Layout
from model.split import StagePlan
from subnet.messages import Shapes
from subnet.transport.synapse import wire_bytes
from subnet.trust import delta
from subnet.trust.heads import WindowHead
from subnet.trust.tree import HASH_BYTES, PIECE_BYTES, longest_proof, pieces_of

ROUNDS_KEPT = 2
"""A round is answered for until so many more have begun."""
RETRIES = 2
UPLINK_SHARE = 0.1
OTHERS_SHARE = 0.1
"""Of that, for callers that are no validators at work: joiners."""
SMALLEST_SHARE = 0.01
"""A validator of less stake is served as fast as one of that much."""
MOST_VALIDATORS = 64
"""With a permit (facts: sota §5.6)."""
LEAST_UPLINK = 80e6
"""Bits per second that a miner must have."""
JOINER_UNITS = 4
"""Units that a joiner compares."""
LOOKS = 32
"""Pieces of states that the checks of one window look at, at most, but for whole matrices."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of what evidence of one stage consists of."""

    weights: int
    """The most that a window's weights travel as."""
    flat: int
    """The weights as they are."""
    state: int
    """Weights and moments."""
    looks: int
    """What checks of one window ask for beyond its states: pieces that several of them look at, and proofs."""
    forward: int
    """Tensors of a forward unit."""
    backward: int

    @classmethod
    def of(cls, plan: StagePlan, layout: Layout, shapes: Shapes) -> Sizes:
        weights, moments = delta.VALUE_BYTES * layout.values, delta.VALUE_BYTES * layout.moments
        larger = max(weights, moments)
        proof = HASH_BYTES * longest_proof(pieces_of(larger))
        return cls(
            weights=delta.limit_of(layout.values),
            flat=weights,
            state=weights + moments,
            looks=LOOKS * min(PIECE_BYTES, larger) + (LOOKS + 2 * pieces_of(moments)) * proof,
            forward=wire_bytes(shapes.unit(plan, backward=False)),
            backward=wire_bytes(shapes.unit(plan, backward=True)),
        )

    def window(self, head: WindowHead) -> int:
        """Both states of a window, its units, the weights before a merge, and what is looked at again."""
        previous = self.flat if head.merged else 0
        return 2 * self.state + self.looks + previous + head.forward * self.forward + head.backward * self.backward


def validators_part(sizes: Sizes, picked: Collection[WindowHead], *, tables: int, share: float) -> int:
    """Bytes that a validator with `share` of the stake at work asks for at most, tables included."""
    windows = [sizes.window(head) for head in picked]
    return tables + max(math.ceil(share * sum(windows)), max(windows, default=0))


def joiners_part(sizes: Sizes, *, tables: int) -> int:
    """Bytes that somebody else asks for at most: tables, weights of one window, and a few of its units."""
    return tables + sizes.weights + JOINER_UNITS * max(sizes.forward, sizes.backward)


def rates(shares: Mapping[str, float], *, uplink_bps: float) -> dict[str, float]:
    """Bytes per second for each validator at work; together with `others_rate` a tenth of the uplink."""
    weights = {hotkey: max(share, SMALLEST_SHARE) for hotkey, share in shares.items()}
    whole = _evidence_rate(uplink_bps) * (1 - OTHERS_SHARE)
    return {hotkey: whole * weight / sum(weights.values()) for hotkey, weight in weights.items()}


def others_rate(*, uplink_bps: float) -> float:
    """Bytes per second for everybody else together."""
    return _evidence_rate(uplink_bps) * OTHERS_SHARE


def least_rate(share: float) -> float:
    """Bytes per second that a validator with `share` of the stake at work can count on, from any miner."""
    crowd = 1 + (MOST_VALIDATORS - 1) * SMALLEST_SHARE
    return _evidence_rate(LEAST_UPLINK) * (1 - OTHERS_SHARE) * max(share, SMALLEST_SHARE) / crowd


def _evidence_rate(uplink_bps: float) -> float:
    return UPLINK_SHARE * uplink_bps / 8
