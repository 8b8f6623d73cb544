"""Who is down, against a model that keeps every sign and looks through all of them."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from neurons.reach import DOWN_SECONDS, Reach

HOPS = ("a", "b")
Sign = tuple[str, float]
"""What was seen of a neighbour, and when."""


class Neighbours(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.reach = Reach()
        self.now = 0.0
        self.signs: dict[str, list[Sign]] = {hop: [] for hop in HOPS}
        self.failures: dict[str, tuple[float, float]] = {}
        """The last call that failed: when it began and ended."""

    @rule(seconds=st.floats(0.0, 8.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(hop=st.sampled_from(HOPS), took=st.floats(0.0, 4.0))
    def fails(self, hop: str, took: float) -> None:
        self.reach.failed(hop, since=self.now - took, now=self.now)
        self.failures[hop] = self.now - took, self.now
        self.signs[hop].append(("failed", self.now))

    @rule(hop=st.sampled_from(HOPS))
    def answers(self, hop: str) -> None:
        self.reach.answered(hop)
        self.signs[hop].append(("answered", self.now))

    @rule(hop=st.sampled_from(HOPS))
    def calls(self, hop: str) -> None:
        self.reach.heard(hop, now=self.now)
        self.signs[hop].append(("called", self.now))

    @rule(hop=st.sampled_from(HOPS))
    def is_set_aside(self, hop: str) -> None:
        self.reach.set_aside(hop, now=self.now)
        self.signs[hop].append(("set aside", self.now))

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "reach"):
            return
        down = {hop: self._down(hop) for hop in HOPS}
        aside = {hop: self._aside(hop) for hop in HOPS}
        assert {hop: self.reach.is_down(hop, now=self.now) for hop in HOPS} == {
            hop: down[hop] or aside[hop] for hop in HOPS
        }
        assert set(self.reach.missing(now=self.now)) == {hop for hop in HOPS if down[hop]}

    def _down(self, hop: str) -> bool:
        """It failed within the last seconds, and has neither answered since nor called, unless it also called while the
        failing call was made: then it speaks and does not answer."""
        signs = self.signs[hop]
        last = max((index for index, (kind, _) in enumerate(signs) if kind == "failed"), default=None)
        if last is None or self.now >= signs[last][1] + DOWN_SECONDS:
            return False
        since, _ = self.failures[hop]
        heard = max((at for kind, at in signs[:last] if kind == "called"), default=-math.inf)
        spoke = heard >= since
        return not any(kind == "answered" or (kind == "called" and not spoke) for kind, _ in signs[last + 1 :])

    def _aside(self, hop: str) -> bool:
        return any(kind == "set aside" and self.now < at + DOWN_SECONDS for kind, at in self.signs[hop])


TestReach = Neighbours.TestCase
TestReach.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
