"""Error feedback: what a payload leaves out of a pseudo-gradient waits for the next one, in place of an outer momentum.

    e = decay · residual + delta;   payload = encode(e);   sent = decode(payload);   residual' = e - sent

(SparseLoCo, arXiv 2508.15706). Only its owner computes a residual, so it need not have the same bits anywhere else. A
codec without error feedback has none: its residual is empty, e is the delta and its rounding is lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subnet.swarm.codec.base import Codec


@dataclass(frozen=True, slots=True)
class Feedback:
    """What one replica still owes the merge."""

    residual: Tensor
    """fp32 (n,), or empty (0,) for a codec without error feedback."""
    decay: float
    """What is left of the residual after a round, in (0, 1]."""


def no_residual(codec: Codec, count: int, decay: float) -> Feedback:
    """The feedback of a replica that has sent nothing yet. Raises `ValueError` for a decay outside (0, 1]."""
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}; it must be in (0, 1]: change merge.decay")
    return Feedback(torch.zeros(count if codec.error_feedback else 0), decay)


def compress(codec: Codec, delta: Tensor, feedback: Feedback) -> tuple[bytes, Tensor, Feedback]:
    """The payload of `delta` (fp32 (n,)), what it says (fp32 (n,)), and what stays owed.

    Raises `DeltaError` for a delta that is not finite, before anything is encoded, and `ValueError` for a residual of
    another size.
    """
    expected = delta.numel() if codec.error_feedback else 0
    if feedback.residual.numel() != expected:
        raise ValueError(
            f"residual has {feedback.residual.numel()} values, {codec.name} needs {expected} for this delta"
        )
    if not codec.error_feedback:
        payload = codec.encode(delta)
        return payload, codec.decode(payload, delta.numel()).to(delta.device), feedback
    wanted = torch.mul(feedback.residual, feedback.decay).add_(delta)
    payload = codec.encode(wanted)
    sent = codec.decode(payload, delta.numel()).to(delta.device)
    return payload, sent, replace(feedback, residual=wanted.sub_(sent))


def rejected(feedback: Feedback, sent: Tensor) -> Feedback:
    """The feedback after a merge that left `sent` out, for a replica whose weights were set to the public ones: all it
    wanted to send is owed again.

    A replica that keeps its own progress in its weights keeps the feedback from before `compress` instead: its next
    delta holds the contribution already, and owing it too would send it twice.
    """
    return replace(feedback, residual=feedback.residual + sent) if feedback.residual.numel() else feedback


def reach(codec: Codec, decay: float) -> float:
    """How far a payload may reach beyond the largest magnitude of any delta, as a factor.

    With feedback a value may gather for as long as its residual lasts, 1 / (1 - decay) rounds; the rest is rounding.
    """
    if not codec.error_feedback:
        return 1 + 2**-8
    return math.inf if decay == 1 else (1 + 2**-8) / (1 - decay)
