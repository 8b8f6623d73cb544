"""A tokenizer.json as preparation uses it: known by its hash, nothing cut off, every document behind a mark."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from model.corpus import END_OF_TEXT
from model.data import DataError
from model.nearest import nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MARKS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
"""End-of-text marks of well-known families, tried in this order."""
BATCH = 1 << 20
"""Characters encoded at once: an encoding takes a hundred times its tokens in memory."""


class DocumentTokenizer:
    """Encodes documents as ids below `vocab`, each behind `mark`, the end-of-text mark whose id is `end`."""

    def __init__(self, raw: bytes, name: str, mark: str | None) -> None:
        """`raw` is the content of a tokenizer.json. Without `mark` the first known one serves. Raises `DataError`."""
        from tokenizers import Tokenizer, __version__  # noqa: PLC0415 - heavy, and only preparation needs it

        try:
            tokenizer: Tokenizer = Tokenizer.from_buffer(raw)
        except ValueError as error:
            raise DataError(f"{name} is no tokenizer.json ({error}): give one with --tokenizer") from error
        ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.raw = raw
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.version: str = __version__
        self.vocab = max(ids.values(), default=-1) + 1
        self.mark = _mark(ids, name, mark)
        self.end = ids[self.mark]
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a document that spells a mark is text about marks
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, path: Path, mark: str | None) -> DocumentTokenizer:
        """Raises `DataError`."""
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read ({error.strerror}): check --tokenizer") from error
        return cls(raw, f"tokenizer {path}", mark)

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """The smallest that holds every id."""
        return "uint16" if self.vocab <= 1 << 16 else "uint32"

    def encode(self, texts: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        """Ids of each document in turn: the mark, then its tokens."""
        batch: list[str] = []
        held = 0
        for text in texts:
            batch.append(text)
            held += len(text)
            if held >= BATCH:
                yield from self._encoded(batch)
                batch, held = [], 0
        yield from self._encoded(batch)

    def _encoded(self, batch: list[str]) -> Iterator[NDArray[np.uint32]]:
        for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array([self.end, *encoding.ids], dtype=np.uint32)


def _mark(ids: dict[str, int], name: str, wanted: str | None) -> str:
    if wanted is None:
        known = [mark for mark in MARKS if mark in ids]
        if not known:
            raise DataError(
                f"{name} has no end-of-text token (none of {', '.join(MARKS)}): name its own with --end-of-text"
            )
        return known[0]
    if wanted not in ids:
        hint = f"did you mean '{nearest(wanted, ids)}'? " if ids else ""
        raise DataError(f"{name} has no token '{wanted}': {hint}Change --end-of-text or --tokenizer")
    return wanted
