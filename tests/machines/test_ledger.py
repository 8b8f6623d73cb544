"""The ledger against lists: what is entered once is in the evidence once, in order, and the evidence proves itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from subnet.trust.heads import WindowHead
from subnet.trust.ledger import (
    NO_ROOT,
    Closing,
    Direction,
    Evidence,
    Leaf,
    Ledger,
    LedgerError,
    UnitKey,
    units_hash,
)

SAMPLES = range(40, 60)
STAGE = 1


class Book(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.ledger = Ledger()
        self.leaves: dict[UnitKey, Leaf] = {}
        self.heads: list[WindowHead] = []
        self.version = 0

    @rule(sample=st.sampled_from(SAMPLES), direction=st.sampled_from(Direction))
    def compute(self, sample: int, direction: Direction) -> None:
        leaf = Leaf(
            direction=direction,
            stage=STAGE,
            sample=sample,
            version=self.version,
            source=0,
            input=bytes([sample]) * 32,
            output=bytes([sample + 1]) * 32,
        )
        if leaf.key in self.leaves:
            with pytest.raises(LedgerError, match="computed twice"):
                self.ledger.add(leaf)
        else:
            self.ledger.add(leaf)
            self.leaves[leaf.key] = leaf

    @precondition(lambda self: self.leaves)
    @rule(which=st.integers(0, 1000), sink=st.integers(0, 2))
    def accept(self, which: int, sink: int) -> None:
        key = list(self.leaves)[which % len(self.leaves)]
        self.ledger.receipt(key, sink=sink, signature=bytes([which % 256]) * 64)
        self.leaves[key] = replace(self.leaves[key], sink=sink, receipt=bytes([which % 256]) * 64)

    @rule(slots=st.integers(0, 1))
    def step(self, slots: int) -> None:
        units = [leaf for leaf in self.leaves.values() if leaf.version == self.version]
        if not units:
            return
        assert list(self.ledger.window(self.version)) == units
        backward = sum(leaf.direction is Direction.BACKWARD for leaf in units)
        head = WindowHead(
            version=self.version,
            steps=self.version,
            slot=(self.heads[-1].slot if self.heads else 0) + slots,
            forward=len(units) - backward,
            backward=backward,
            merged=0,
            weights=NO_ROOT,
            optimizer=NO_ROOT,
            units=units_hash(units),
            next_weights=NO_ROOT,
            next_optimizer=NO_ROOT,
        )
        self.ledger.close_window(head)
        self.heads.append(head)
        self.version += 1

    @rule(which=st.integers(0, 10_000), to=st.binary(min_size=32, max_size=32))
    def close(self, which: int, to: bytes) -> None:
        """Anybody can check it; nobody can change it unseen."""
        evidence = self.ledger.close(Closing(NO_ROOT, NO_ROOT, NO_ROOT))
        assert list(evidence.leaves) == list(self.leaves.values())
        assert Evidence.parse(evidence.tables()) == evidence
        ended = replace(evidence, leaves=tuple(leaf for leaf in evidence.leaves if leaf.version < self.version))
        ended.check(stage=STAGE, samples=SAMPLES)
        if not ended.leaves:
            return
        at = which % len(ended.leaves)
        victim = ended.leaves[at]
        others = ended.leaves[:at] + ended.leaves[at + 1 :]
        broken = {
            "twice": (*ended.leaves, victim),
            "left out": others,
            "changed": (*ended.leaves[:at], replace(victim, input=to), *ended.leaves[at + 1 :]),
            "elsewhere": (*ended.leaves[:at], replace(victim, stage=2), *ended.leaves[at + 1 :]),
        }
        for what, leaves in broken.items():
            if leaves == ended.leaves:
                continue
            forged = replace(ended, leaves=leaves)
            assert forged.root != ended.root, what
            with pytest.raises(LedgerError):
                forged.check(stage=STAGE, samples=SAMPLES)


TestLedger = Book.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
