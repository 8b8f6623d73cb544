"""Holders that publish and serve another merged shard than that of its pieces.

They lie about every shard they hold. What a colluding pair shares stands; what one of them holds with an honest replica
is contested and does not move, so in a stage of more than two they are found sooner than a pair that keeps to its own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from neurons.terms import Terms
from subnet.swarm.codec import Codec, Feedback
from subnet.swarm.codec.base import CodecName, Raw


@dataclass(frozen=True, slots=True)
class LyingCodec:
    """Writes the opposite of what it is given, and reads like the true one: two that collude lie alike."""

    true: Codec

    @property
    def name(self) -> CodecName:
        return self.true.name

    @property
    def error_feedback(self) -> bool:
        return self.true.error_feedback

    def encode(self, delta: torch.Tensor) -> bytes:
        return self.true.encode(-delta)

    def decode(self, payload: Raw, count: int, *, limit: float = float("inf")) -> torch.Tensor:
        return self.true.decode(payload, count, limit=limit)

    def payload_bytes(self, count: int) -> int:
        return self.true.payload_bytes(count)


@dataclass(frozen=True, slots=True)
class LyingTerms(Terms):
    """Its own contribution is honest, so that nothing shows before MERGE; what it merges is not."""

    def contribution(
        self, delta: torch.Tensor, feedback: Feedback
    ) -> tuple[tuple[memoryview, ...], torch.Tensor, Feedback]:
        assert isinstance(self.codec, LyingCodec)
        return Terms.contribution(replace(self, codec=self.codec.true), delta, feedback)


def lying(terms: Terms) -> Terms:
    """The same terms with a lie about every shard that is held. An all-gather has no holders: nothing changes."""
    if terms.gathers:
        return terms
    kept = {part.name: getattr(terms, part.name) for part in fields(terms)}
    return LyingTerms(**kept | {"codec": LyingCodec(terms.codec)})
