"""Where the values of a stage lie in the flat vectors of its weights and of its optimizer's moments.

The moments of n values are one vector: n first moments in the order of `stage.flatten`, then the second moments of
those values that have one, in the same order. AdamW and NAdam keep one for every value; Muon keeps none for matrices
inside a stage, which at 100B are 97 % of it, so a third of what evidence hashes, keeps and copies is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from math import prod

import torch

from model.config import ModelConfig
from model.optimizer import Kind, takes_muon
from model.split import StagePlan
from model.stage import Stage


@dataclass(frozen=True, slots=True)
class Place:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    """Of its values in `stage.flatten`."""
    second: int
    """Of its second moments among all second moments; where those of the next one begin, if it has none."""
    adaptive: bool
    """Whether it has second moments."""

    @property
    def span(self) -> range:
        """Its values."""
        return range(self.start, self.start + prod(self.shape))


@dataclass(frozen=True)
class Layout:
    """One stage and one kind of optimizer."""

    places: tuple[Place, ...]
    """In the order of `stage.flatten`."""

    @classmethod
    def of(cls, stage: Stage, kind: Kind) -> Layout:
        named = sorted(stage.named_parameters())
        adaptive = [not takes_muon(kind, name, parameter) for name, parameter in named]
        sizes = [parameter.numel() for _, parameter in named]
        starts = accumulate(sizes, initial=0)
        seconds = accumulate((size if has else 0 for size, has in zip(sizes, adaptive, strict=True)), initial=0)
        return cls(
            tuple(
                Place(name, tuple(parameter.shape), start, second, has)
                for (name, parameter), start, second, has in zip(named, starts, seconds, adaptive, strict=False)
            )
        )

    @classmethod
    def planned(cls, config: ModelConfig, plan: StagePlan, kind: Kind) -> Layout:
        """Of a stage that is not built: nothing is allocated for its weights."""
        return _planned(config, plan, kind)

    @cached_property
    def values(self) -> int:
        """n."""
        return self.places[-1].span.stop

    @cached_property
    def moments(self) -> int:
        """First and second ones together."""
        return self.values + self._seconds_before(self.values)

    @property
    def matrices(self) -> tuple[Place, ...]:
        """The parameters that Muon moves."""
        return tuple(place for place in self.places if not place.adaptive)

    def second(self, span: range) -> range:
        """Of a stretch of values: where those second moments lie in the moments that there are of it, which are without
        a gap, and none where it is empty."""
        start, stop = self._seconds_before(span.start), self._seconds_before(span.stop)
        return range(self.values + start, self.values + stop)

    def within(self, span: range) -> Iterator[tuple[Place, range]]:
        """The parameters that a stretch of values touches, each with its values inside."""
        for place in self.places:
            inside = range(max(span.start, place.span.start), min(span.stop, place.span.stop))
            if inside:
                yield place, inside

    def _seconds_before(self, value: int) -> int:
        total = 0
        for place in self.places:
            if place.start >= value:
                break
            if place.adaptive:
                total = place.second + min(value, place.span.stop) - place.start
        return total


@cache  # a plan asks for the same one in every step of its search
def _planned(config: ModelConfig, plan: StagePlan, kind: Kind) -> Layout:
    with torch.device("meta"):
        return Layout.of(Stage(config, plan), kind)
