"""Merkle trees: every piece is proven, nothing else is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from subnet.trust.tree import PIECE_BYTES, PROOF_LIMIT, Tree, pieces_of, proven


def data_of(pieces: int, short: int) -> bytes:
    return b"".join(index.to_bytes(4, "little") * (PIECE_BYTES // 4) for index in range(pieces))[: -short or None]


@given(pieces=st.integers(1, 40), short=st.integers(0, 100), draw=st.data())
def test_a_piece_is_proven_at_its_place_only(pieces: int, short: int, draw: st.DataObject) -> None:
    data = data_of(pieces, short)
    tree = Tree.of(data)
    assert tree.count == pieces == pieces_of(len(data))
    index = draw.draw(st.integers(0, pieces - 1))
    piece, proof = data[index * PIECE_BYTES : (index + 1) * PIECE_BYTES], tree.proof(index)
    assert proven(tree.root, count=pieces, index=index, piece=piece, proof=proof)
    assert not proven(tree.root, count=pieces + 1, index=index, piece=piece, proof=proof)
    assert not proven(tree.root, count=pieces, index=index, piece=piece + b"\x00", proof=proof)
    assert not proven(tree.root, count=pieces, index=index, piece=piece, proof=(*proof, bytes(32)))
    assert not proven(tree.root, count=pieces, index=-1, piece=piece, proof=proof)
    other = draw.draw(st.integers(0, pieces - 1).filter(lambda place: place != index)) if pieces > 1 else None
    if other is not None:
        assert not proven(tree.root, count=pieces, index=other, piece=piece, proof=tree.proof(other))
    for place in range(len(proof)):
        spoilt = (*proof[:place], bytes(32), *proof[place + 1 :])
        assert not proven(tree.root, count=pieces, index=index, piece=piece, proof=spoilt)
        assert not proven(tree.root, count=pieces, index=index, piece=piece, proof=proof[:place])


def test_a_giant_proof_is_refused_unread() -> None:
    tree = Tree.of(b"x")
    assert not proven(tree.root, count=2**60, index=0, piece=b"x", proof=[bytes(32)] * (PROOF_LIMIT + 1))


def test_trees_of_other_data_have_other_roots() -> None:
    roots = {Tree.of(data_of(pieces, short)).root for pieces in range(1, 6) for short in (0, 1, 2)}
    assert len(roots | {Tree.of(b"").root}) == 16
