"""What one replica holds between rounds: its stage's public state, and what of its own is sent but not merged.

The arithmetic of a round's end, apart from who fetches what. θ is the public state, W the replica's weights, Δ = θ - W
its pseudo-gradient (facts: sota §4).

* Cut. The codec turns Δ (plus what error feedback owes) into a payload that says `sent`. The weights are re-based on
  public state: W ← θ - sent. So the next round starts from weights that anybody can derive from θ and the payload.
* Merged. θ becomes θ'. W ← W + (θ' - θ) + sent: the replica's own contribution leaves its weights, since θ' holds it.
  Where the merge did not take it, error feedback owes it again; without feedback it stays in the weights, and the next
  Δ holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from subnet.swarm.codec import Feedback
from subnet.swarm.merge import Merged, taken_over

Change = Callable[[torch.Tensor], torch.Tensor]
"""From a replica's weights to others (fp32 (n,))."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One replica's part in one round's merge, from its cut to its merge."""

    round: int
    sent: torch.Tensor
    """What the payload says, fp32 (n,)."""


class Replica:
    """One replica of one stage. `held` rounds are merged into `public`."""

    def __init__(self, public: Merged, held: int, feedback: Feedback) -> None:
        self.public = public
        self.held = held
        self.feedback = feedback
        self.pending: Contribution | None = None

    @property
    def parameters(self) -> int:
        return self.public.theta.numel()

    @property
    def base(self) -> torch.Tensor:
        """The weights that follow from public state and the pending contribution, fp32 (n,): θ - sent."""
        return self.public.theta if self.pending is None else self.public.theta - self.pending.sent

    def pseudo_gradient(self, weights: torch.Tensor) -> torch.Tensor:
        """Δ of a round that ends with `weights`, fp32 (n,)."""
        return self.public.theta - weights

    def cut(self, number: int, sent: torch.Tensor, feedback: Feedback) -> torch.Tensor:
        """Fix this replica's contribution to round `number`; returns the weights it goes on with."""
        self.pending = Contribution(number, sent)
        self.feedback = feedback
        return self.base

    def merged(self, after: Merged, taken: Sequence[range]) -> Change:
        """Take over the next public state; `taken` are the ranges of this replica's contribution that are in it.

        Returns what to do to the weights at the next step boundary, see `subnet.swarm.merge.taken_over`.
        """
        start, contribution = self.base, self.pending
        self.public, self.held, self.pending = after, self.held + 1, None
        target = after.theta
        if contribution is not None:
            left = contribution.sent.clone()
            for part in taken:
                left[part.start : part.stop] = 0
            if self.feedback.residual.numel():
                self.feedback = Feedback(self.feedback.residual + left, self.feedback.decay)
            else:
                target = target - left
        return lambda weights: taken_over(weights, start, target)

    def replaced(self, public: Merged, held: int) -> None:
        """A public state from elsewhere; what this replica had sent belongs to another one and is forgotten."""
        self.public, self.held, self.pending = public, held, None
