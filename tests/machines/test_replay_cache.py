"""The replay cache against a model that remembers everything, under clocks that jump."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from subnet.transport.admission import ReplayCache
from subnet.transport.errors import ReplayedRequest, StaleRequest

WINDOW = 12
"""Nanoseconds in which a nonce may be used: small, so that generations turn often."""


class Cache(RuleBasedStateMachine):
    """What was accepted once is never accepted again; what is fresh and new is, while the clock does not go back."""

    @initialize(now=st.integers(100, 200))
    def begin(self, now: int) -> None:
        self.cache = ReplayCache(window_ns=WINDOW, now_ns=now)
        self.began = self.now = self.latest = now
        self.accepted: set[tuple[str, int]] = set()

    @rule(by=st.integers(-30, 40))
    def clock(self, by: int) -> None:
        self.now = max(0, self.now + by)

    @rule(hotkey=st.sampled_from("ab"), age=st.integers(-WINDOW, WINDOW))
    def offer(self, hotkey: str, age: int) -> None:
        """As `Admission` does, which refuses by age first."""
        nonce = self.now - age
        key = hotkey, nonce
        try:
            self.cache.accept(hotkey, nonce, now_ns=self.now)
        except ReplayedRequest:
            assert key in self.accepted
        except StaleRequest:
            assert nonce < self.began or self.now < self.latest or nonce <= max(n for _, n in self.accepted)
        else:
            assert key not in self.accepted
            self.accepted.add(key)
        self.latest = max(self.latest, self.now)

    @rule(back=st.integers(0, 5))
    def repeat(self, back: int) -> None:
        for hotkey, nonce in sorted(self.accepted)[-1 - back :]:
            with pytest.raises((ReplayedRequest, StaleRequest)):
                self.cache.accept(hotkey, nonce, now_ns=self.now)
        self.latest = max(self.latest, self.now)

    @invariant()
    def forgets(self) -> None:
        """What it remembers is bounded by what is accepted within two windows."""
        if hasattr(self, "cache"):
            assert len(self.cache._young | self.cache._old) <= len(self.accepted)


TestReplayCache = Cache.TestCase
TestReplayCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
