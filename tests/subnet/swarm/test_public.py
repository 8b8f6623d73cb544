"""The digest of a public state: every bit of both parts is in it, and nothing else."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet.swarm import content
from subnet.swarm.codec import codec_of
from subnet.swarm.merge import Merged
from subnet.swarm.public import PARTS, VALUE_BYTES, PublicTree, counts_of, digest_of, part_of, pieces_of, span_of

PIECE = content.PIECE_BYTES // VALUE_BYTES


def test_every_bit_of_both_parts_counts() -> None:
    theta, momentum = torch.randn(1000, generator=torch.Generator().manual_seed(1)), torch.zeros(1000)
    digest = digest_of(Merged(theta, momentum))
    assert digest == digest_of(Merged(theta.clone(), momentum.clone()))
    for place in (0, 500, 999):
        for part in (theta, momentum):
            bits = part.view(torch.int32)
            bits[place] ^= 1
            assert digest_of(Merged(theta, momentum)) != digest
            bits[place] ^= 1
    assert digest_of(Merged(momentum, theta)) != digest
    assert digest_of(Merged(theta, momentum[:0])) != digest
    assert digest_of(Merged(theta[:999], momentum)) != digest
    assert digest_of(Merged(theta, momentum)) == digest


def test_the_tree_has_a_leaf_a_piece() -> None:
    state = Merged(torch.arange(2 * PIECE + 5, dtype=torch.float32), torch.empty(0))
    tree = PublicTree.of(state)
    assert (len(tree.theta), len(tree.momentum)) == (3, 0)
    for part in PARTS:
        raw = part_of(state, part).view(torch.uint8)
        for index, leaf in enumerate(tree.leaves(part)):
            start, end = span_of(part_of(state, part).numel(), index)
            assert content.leaf(raw[start:end].numpy().tobytes()) == leaf
    assert tree.digest == digest_of(state)


@given(st.integers(0, 10 * PIECE + 1))
@settings(max_examples=50, deadline=None)
def test_spans_tile_a_part(count: int) -> None:
    spans = [span_of(count, index) for index in range(pieces_of(count))]
    ends = [0, *(end for _, end in spans)]
    assert [start for start, _ in spans] == ends[:-1]
    assert ends[-1] == count * VALUE_BYTES
    assert all(0 < end - start <= content.PIECE_BYTES for start, end in spans)


def test_error_feedback_takes_the_momentum_s_place() -> None:
    assert counts_of(7, codec_of("topk2bit")) == {"theta": 7, "momentum": 0}
    assert counts_of(7, codec_of("int8")) == counts_of(7, codec_of("bf16")) == {"theta": 7, "momentum": 7}
