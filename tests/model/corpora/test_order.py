"""The order of documents is a seeded permutation, and the stream goes on from anywhere."""

from collections import Counter
from collections.abc import Iterator
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.corpora.documents import Block, LeftOut
from model.corpora.order import Cursor, ahead, permutation, windows


@given(seed=st.integers(0, 2**63), count=st.integers(0, 60))
def test_a_permutation_is_one_and_follows_from_its_seed(seed: int, count: int) -> None:
    order = permutation(seed, "blocks", count)
    assert sorted(order) == list(range(count))
    assert order == permutation(seed, "blocks", count)


def test_seeds_and_purposes_give_different_orders() -> None:
    orders = [permutation(seed, purpose, 50) for seed in range(3) for purpose in ("blocks", "window/1")]
    assert len({tuple(order) for order in orders}) == 6
    # The order is part of what shards are: another one here is another data set for every recipe.
    assert permutation(3, "blocks", 8) == [1, 6, 0, 5, 7, 4, 3, 2]


@given(
    blocks=st.lists(
        st.lists(st.sampled_from([LeftOut.BROKEN, LeftOut.TOO_LONG, "", " \n", "a", "bcd", "e" * 30]), max_size=6)
    ),
    size=st.integers(1, 50),
    stop=st.integers(0, 40),
)
def test_windows_hold_every_document_once_wherever_one_begins(
    blocks: list[list[str | LeftOut]], size: int, stop: int
) -> None:
    cut = [Block(number, 0, 1, 1) for number in range(len(blocks))]

    def documents(block: Block) -> Iterator[str | LeftOut]:
        return iter(blocks[block.source])

    whole = list(windows(cut, documents, seed=1, size=size, start=Cursor()))
    every = [text for block in blocks for text in block]
    texts = [text for text in every if isinstance(text, str)]
    kept = [text for text in texts if text.strip()]
    assert sorted(text for window, _ in whole for text in window.texts) == sorted(kept)
    left_out = sum((window.left_out for window, _ in whole), Counter())
    assert left_out[LeftOut.EMPTY] == len(texts) - len(kept)
    assert all(left_out[why] == every.count(why) for why in (LeftOut.TOO_LONG, LeftOut.BROKEN))
    assert all(window.size >= size for window, _ in whole[:-1])
    if whole:
        begun, cursor = whole[stop % len(whole)]
        rest = list(windows(cut, documents, seed=1, size=size, start=cursor))
        assert rest == whole[whole.index((begun, cursor)) + 1 :]


def test_documents_of_a_window_are_shuffled() -> None:
    cut = [Block(0, 0, 1, 1)]
    names = [str(number) for number in range(100)]
    [(window, cursor)] = windows(cut, lambda _block: iter(names), seed=1, size=10_000, start=Cursor())
    assert sorted(window.texts) == sorted(names)
    assert sum(text == name for text, name in zip(window.texts, names, strict=True)) < 10
    assert cursor == Cursor(1, 0, 1)


def test_the_next_item_is_made_while_one_is_worked_on() -> None:
    begun = [Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(begun):
            event.set()
            yield number

    found = ahead(items())
    assert next(found) == 0
    assert begun[1].wait(10)
    assert not begun[2].is_set(), "one ahead, not all"
    assert list(found) == [1, 2]


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="broken"):
        next(found)
