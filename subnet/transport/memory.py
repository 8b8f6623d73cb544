"""Memory for bodies, used again: fresh pages cost the kernel as much to clear as a body costs to receive.

What is handed out is a view; the tensors made of it keep it alive. When the last of them is gone, in whatever thread,
the pages behind it go back here and serve the next body of about that size.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt

POOLED: Final = 1024 * 1024
"""Bytes from which on a body's memory is kept; sizes are rounded up to multiples of it."""


class Memory:
    """Buffers for bodies, taken by one thread. Of those nobody uses, each take leaves at most `spare_bytes`: what is in
    flight at a stage comes and goes with each round."""

    def __init__(self, spare_bytes: int = 512 << 20) -> None:
        self._spare_bytes = spare_bytes
        self._spare: deque[npt.NDArray[np.uint8]] = deque()
        self._watched: dict[int, weakref.ref[npt.NDArray[np.uint8]]] = {}

    @property
    def spare(self) -> int:
        """Bytes kept for the next bodies."""
        return sum(pages.nbytes for pages in tuple(self._spare))

    def take(self, size: int) -> memoryview:
        """`size` bytes, aligned for any tensor, with anything in them."""
        while self.spare > self._spare_bytes:
            self._spare.popleft()  # what has been lying there longest
        if size < POOLED:
            return np.empty(size, dtype=np.uint8).data
        room = -(-size // POOLED) * POOLED
        pages = self._of(room)
        if pages is None:
            pages = self._new(room)
        view = pages[:size]
        self._watched[id(pages)] = weakref.ref(view, lambda _, pages=pages: self._give_back(pages))  # type: ignore[misc]
        return view.data

    def _new(self, room: int) -> npt.NDArray[np.uint8]:
        """numpy's, because its large arrays use huge pages and are not zeroed."""
        return np.empty(room, dtype=np.uint8)

    def _of(self, room: int) -> npt.NDArray[np.uint8] | None:
        for _ in range(len(self._spare)):
            pages = self._spare.popleft()
            if pages.nbytes == room:
                return pages
            self._spare.append(pages)
        return None

    def _give_back(self, pages: npt.NDArray[np.uint8]) -> None:
        """Called in whatever thread drops the last view, at any point of another's work: only `take` takes away."""
        self._watched.pop(id(pages), None)
        self._spare.append(pages)
