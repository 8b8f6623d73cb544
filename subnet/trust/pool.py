"""What a picked window's seed leaves to be asked for of its states: what its miner keeps, and all that others see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from model.layout import Layout
from subnet.trust.audit import select_pool
from subnet.trust.polar import select_look
from subnet.trust.step import moments_beside
from subnet.trust.tree import pieces_in, pieces_of


@dataclass(frozen=True, slots=True)
class Pool:
    """Numbers of pieces, ascending."""

    weights: tuple[int, ...]
    moments: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout, *, seed: bytes, hotkey: str, version: int) -> Self:
        """Pieces of weights with the moments beside them, and of one of Muon's matrices all momentum and one piece."""
        weights = set(select_pool(pieces_of(4 * layout.values), seed=seed, hotkey=hotkey, version=version))
        moments = set(moments_beside(weights, layout))
        look = select_look(layout, seed=seed, hotkey=hotkey, version=version)
        if look is not None:
            weights.add(look.piece)
            moments |= {*pieces_in(look.place.span)}
        return cls(tuple(sorted(weights)), tuple(sorted(moments)))
