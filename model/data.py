"""From a sample id to tokens: a pure function of verified token files, so nobody has to be asked for data.

A corpus is a list of flat little-endian files of token ids, each known by its SHA-256 and memory-mapped.
Every file is cut into windows of T + 1 tokens that overlap by one, so each token is a target once. The last
windows are held out for validation, one more is left between the two parts, and the rest is visited in a
fresh order every epoch: an affine permutation i → (a·i + c) mod n seeded by (corpus seed, epoch). Any
stage, and any auditor, gets any batch in O(B).
"""

import bisect
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 1 << 22


class DataError(Exception):
    """Token data that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One file as a manifest names it: file name inside the folder, SHA-256 in hex, dtype of its ids."""

    name: str
    sha256: str
    dtype: Literal["uint16", "uint32"]


@dataclass(frozen=True, slots=True)
class TokenShard:
    """A verified, memory-mapped file of token ids."""

    entry: ShardEntry
    tokens: NDArray[np.uint16] | NDArray[np.uint32]

    @classmethod
    def open(cls, folder: Path, entry: ShardEntry, *, vocab: int) -> "TokenShard":
        """Maps the file and proves its hash and that every id is below `vocab`. Raises `DataError`."""
        path = folder / entry.name
        if Path(entry.name).name != entry.name:
            raise DataError(f"shard name '{entry.name}' leaves its folder: use a plain file name")
        if not path.is_file():
            raise DataError(f"shard {path} does not exist: put the file there or change the data folder")
        itemsize = np.dtype(entry.dtype).itemsize
        size = path.stat().st_size
        if size == 0 or size % itemsize:
            raise DataError(f"shard {path} has {size} bytes, no multiple of {itemsize}: fetch it again")
        tokens = np.memmap(path, dtype=np.dtype(entry.dtype).newbyteorder("<"), mode="r")
        digest = hashlib.sha256()
        largest = 0
        for start in range(0, len(tokens), _CHUNK):
            part = tokens[start : start + _CHUNK]
            digest.update(part.tobytes())
            largest = max(largest, int(part.max()))
        if digest.hexdigest() != entry.sha256:
            raise DataError(
                f"shard {path} has SHA-256 {digest.hexdigest()}, expected {entry.sha256}: delete it and fetch it again"
            )
        if largest >= vocab:
            raise DataError(f"shard {path} holds token {largest}, the vocabulary has {vocab}: use the data's own model")
        return cls(entry, tokens)


class Corpus:
    """Batches of B sequences of T + 1 tokens by number; immutable once opened."""

    def __init__(
        self, shards: Sequence[TokenShard], *, seed: int, batch: int, tokens: int, held_out: float = 0.05
    ) -> None:
        """`held_out` is the share of windows kept for validation. Raises `DataError` when a part is below a
        batch."""
        if batch < 1 or tokens < 1 or not 0 < held_out < 1:
            raise DataError(
                f"batch is {batch}, tokens {tokens} and held_out {held_out}; "
                "the first two must be at least 1 and held_out inside (0, 1): change them"
            )
        self.seed = seed
        self.batch = batch
        self.tokens = tokens
        self._shards = tuple(shards)
        self._ends = list(accumulate((len(shard.tokens) - 1) // tokens for shard in shards))
        windows = self._ends[-1] if self._ends else 0
        held = max(1, int(windows * held_out))
        self.training_windows = windows - held - 1
        self.validation_samples = held // batch
        if self.training_windows < batch or self.validation_samples < 1:
            raise DataError(
                f"{windows} windows of {tokens} tokens give {max(0, self.training_windows)} to train and "
                f"{held} held out, a batch needs {batch} of each: add data, lower batch or raise held_out"
            )
        self._first_held = windows - held

    @classmethod
    def open(
        cls,
        folder: Path,
        entries: Sequence[ShardEntry],
        *,
        seed: int,
        batch: int,
        tokens: int,
        vocab: int,
        held_out: float = 0.05,
    ) -> "Corpus":
        """Verifies and maps every shard of `folder`; reads each file once. Raises `DataError`."""
        shards = [TokenShard.open(folder, entry, vocab=vocab) for entry in entries]
        return cls(shards, seed=seed, batch=batch, tokens=tokens, held_out=held_out)

    def sample(self, sample_id: int) -> Tensor:
        """Training batch `sample_id` ≥ 0 as int64 (B, T+1): inputs are [:, :-1], targets [:, 1:]."""
        if sample_id < 0:
            raise DataError(f"sample id is {sample_id}; it must be at least 0")
        first = sample_id * self.batch
        return self._stack([self.training_window(first + row) for row in range(self.batch)])

    def training_window(self, visit: int) -> int:
        """The window seen at visit `visit` ≥ 0; each epoch's visits are a permutation of the training
        windows."""
        epoch, place = divmod(visit, self.training_windows)
        step, shift = _affine(self.seed, epoch, self.training_windows)
        return (step * place + shift) % self.training_windows

    def validation_sample(self, index: int) -> Tensor:
        """Held-out batch `index` in [0, validation_samples) as int64 (B, T+1), in the order of the corpus."""
        if not 0 <= index < self.validation_samples:
            raise DataError(f"validation sample is {index}; this corpus has 0 to {self.validation_samples - 1}")
        first = self._first_held + index * self.batch
        return self._stack(range(first, first + self.batch))

    def _stack(self, windows: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([self._window(window) for window in windows]))

    def _window(self, window: int) -> NDArray[np.int64]:
        shard = bisect.bisect_right(self._ends, window)
        start = (window - (self._ends[shard - 1] if shard else 0)) * self.tokens
        return self._shards[shard].tokens[start : start + self.tokens + 1].astype(np.int64)


def _affine(seed: int, epoch: int, n: int) -> tuple[int, int]:
    """Step (coprime to n) and shift of an epoch's permutation."""
    digest = hashlib.sha256(f"orion/epoch/{seed}/{epoch}".encode()).digest()
    step = 1 + int.from_bytes(digest[:8], "little") % max(1, n - 1)
    while math.gcd(step, n) != 1:
        step += 1
    return step, int.from_bytes(digest[8:16], "little") % n
