"""In which order documents are read: blocks by a seeded permutation, then documents within windows of bounded size.

Permutations sort by a hash of (seed, purpose, number), so that they are the same with every version of every library.
A window holds many blocks' documents, which come from all over the sources; a global shuffle of documents would have to
hold or seek all of them, and the order in which training visits the tokens is another permutation anyway
(`model/data.py`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from model.corpora.documents import Block, LeftOut

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the stream has been read: up to `taken` documents of the block at `place`, in `windows` windows."""

    place: int = 0
    taken: int = 0
    windows: int = 0


@dataclass(slots=True)
class Window:
    """Documents that are shuffled, tokenised and kept together."""

    texts: list[str] = field(default_factory=list)
    left_out: Counter[LeftOut] = field(default_factory=Counter)
    size: int = 0
    """Characters, and one for each document."""

    def add(self, text: str | LeftOut) -> None:
        """Takes the next document of the stream."""
        self.size += 1
        if isinstance(text, LeftOut):
            self.left_out[text] += 1
        elif not text or text.isspace():
            self.left_out[LeftOut.EMPTY] += 1
        else:
            self.texts.append(text)
            self.size += len(text)


def permutation(seed: int, purpose: str, count: int) -> list[int]:
    """The numbers 0 to `count` - 1 in an order that follows from `seed` and `purpose`."""

    def key(number: int) -> bytes:
        return hashlib.sha256(f"orion/{purpose}/{seed}/{number}".encode()).digest()

    return sorted(range(count), key=key)


def windows(
    blocks: Sequence[Block],
    documents: Callable[[Block], Iterator[str | LeftOut]],
    *,
    seed: int,
    size: int,
    start: Cursor,
) -> Iterator[tuple[Window, Cursor]]:
    """The stream from `start` on in windows of `size` characters, each shuffled, with the cursor behind it.

    `blocks` are in the order in which they are read. Windows do not depend on where one starts.
    """
    window, number = Window(), start.windows
    for place in range(start.place, len(blocks)):
        skip = start.taken if place == start.place else 0
        for taken, text in enumerate(documents(blocks[place]), 1):
            if taken <= skip:
                continue
            window.add(text)
            if window.size >= size:
                number += 1
                yield _shuffled(window, seed, number), Cursor(place, taken, number)
                window = Window()
    if window.size:
        yield _shuffled(window, seed, number + 1), Cursor(len(blocks), 0, number + 1)


def _shuffled(window: Window, seed: int, number: int) -> Window:
    texts = window.texts
    window.texts = [texts[index] for index in permutation(seed, f"window/{number}", len(texts))]
    return window


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made by a thread while whoever took the one before works on it."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
