"""A replica's arithmetic at the end of a round: nothing of a contribution is lost, nothing is counted twice."""

from __future__ import annotations

import pytest
import torch

from neurons.replica import Replica
from subnet.swarm.codec import codec_of, compress, no_residual
from subnet.swarm.merge import Merged

N = 5000


def vector(seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * scale


def after_cut(codec: str) -> tuple[Replica, torch.Tensor, torch.Tensor]:
    """A replica that trained and cut: itself, its pseudo-gradient, its weights after the cut."""
    kind = codec_of(codec)
    replica = Replica(Merged(vector(0), torch.empty(0)), 3, no_residual(kind, N, 0.95))
    weights = vector(0) + vector(1, 0.01)
    delta = replica.pseudo_gradient(weights)
    _, sent, feedback = compress(kind, delta, replica.feedback)
    return replica, delta, replica.cut(3, sent, feedback)


@pytest.mark.parametrize("codec", ["topk2bit", "int8", "bf16"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_merge_that_took_everything_leaves_the_public_state_and_later_progress(codec: str, moved: bool) -> None:
    replica, delta, weights = after_cut(codec)
    assert torch.equal(weights, replica.base)
    progress = vector(2, 0.01) if moved else torch.zeros(N)
    after = Merged(vector(0) + vector(3, 0.01), torch.empty(0))
    assert replica.pending is not None
    sent = replica.pending.sent
    change = replica.merged(after, [range(N)])
    landed = change(weights + progress)
    torch.testing.assert_close(landed, after.theta + progress, rtol=0, atol=2e-6)
    if not moved:
        assert torch.equal(landed, after.theta)
    assert replica.held == 4
    if codec == "topk2bit":
        torch.testing.assert_close(replica.feedback.residual + sent, delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("codec", ["topk2bit", "int8"])
def test_what_a_merge_did_not_take_is_in_the_next_contribution(codec: str) -> None:
    replica, delta, weights = after_cut(codec)
    after = Merged(vector(0) + vector(3, 0.01), torch.empty(0))
    assert replica.pending is not None
    sent = replica.pending.sent
    change = replica.merged(after, [range(1000, 2000), range(3000, 3500)])
    taken = torch.zeros(N)
    taken[1000:2000], taken[3000:3500] = sent[1000:2000], sent[3000:3500]
    owed = replica.pseudo_gradient(change(weights)) + (
        replica.feedback.residual if codec == "topk2bit" else delta - sent
    )
    torch.testing.assert_close(owed, delta - taken, rtol=0, atol=3e-6)


def test_a_void_merge_loses_nothing() -> None:
    replica, delta, weights = after_cut("topk2bit")
    landed = replica.merged(replica.public, [])(weights)
    assert torch.equal(landed, replica.public.theta)
    torch.testing.assert_close(replica.feedback.residual, delta, rtol=0, atol=1e-6)
