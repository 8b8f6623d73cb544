"""A worker that enters units nobody computed, with receipts that a colluding neighbour signs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from neurons.pipeline import StageWorker
from neurons.training import TrainingRound
from neurons.windows import Stepped
from subnet.identity import Identity
from subnet.swarm.roster import Roster
from subnet.trust.ledger import Direction, Leaf, UnitKey, receipt_message

Colluder = Callable[[Roster], Identity | None]
"""Whose keys sign receipts in a round; None while nobody does."""


class ForgingWorker(StageWorker):
    """Each of its units is entered once more, under a sample that a sibling has: with the same tensors, so that a
    replay of the copy passes, and a receipt from the colluder, who computed nothing either."""

    colluder: Colluder

    def _enter_step(self, current: TrainingRound, stepped: Stepped) -> None:
        self._forge(current, self._opened()._current.version)
        super()._enter_step(current, stepped)

    def _forge(self, current: TrainingRound, version: int) -> None:
        identity = self.colluder(current.roster)
        if identity is None:
            return
        index = current.roster.stages[self.plan.index + 1].index(identity.hotkey)
        for leaf in current.ledger.window(version):
            sample = self._unused(current, leaf)
            if leaf.direction is Direction.FORWARD and sample is not None:
                copy = replace(leaf, sample=sample)
                current.ledger.add(copy)
                unit = current.archive.unit(leaf.key)
                assert unit is not None, "its window is open"
                current.archive.add(version, copy.key, unit)
                message = receipt_message(
                    self._run,
                    current.number,
                    producer=self._identity.hotkey,
                    key=copy.key,
                    stage=copy.stage,
                    output=copy.output,
                )
                current.ledger.receipt(copy.key, sink=index, signature=identity.sign(message))

    def _unused(self, current: TrainingRound, leaf: Leaf) -> int | None:
        """A sample of the round that has no unit here: the first from the end, which is reached last."""
        samples, entered = self._manifest.samples(current.number), current.ledger._leaves
        return next(
            (
                sample
                for sample in reversed(samples)
                if UnitKey(sample, leaf.direction) not in entered and sample not in current.open
            ),
            None,
        )
