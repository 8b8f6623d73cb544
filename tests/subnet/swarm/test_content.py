"""Content-addressed pieces: any change of any byte, of the order or of the number changes the root."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from subnet.swarm.content import cut, leaf, leaves, root


@given(st.binary(max_size=100), st.integers(1, 40))
def test_pieces_are_the_data(data: bytes, size: int) -> None:
    pieces = cut(data, piece_bytes=size)
    assert b"".join(pieces) == data
    assert all(len(piece) == size for piece in pieces[:-1])


@given(st.lists(st.binary(max_size=8), max_size=6), st.lists(st.binary(max_size=8), max_size=6))
def test_the_root_names_pieces_order_and_number(one: list[bytes], other: list[bytes]) -> None:
    assert (root(leaves(one)) == root(leaves(other))) == (one == other)


def test_a_view_hashes_like_its_bytes() -> None:
    assert leaf(memoryview(b"abc")) == leaf(b"abc") != leaf(b"abd")
