"""Documents packed into shards of bounded size, so that a killed writer can be followed by one that goes on.

A shard is written as `.NAME.part` and named when it is full and the journal says so. The journal (`.progress.json`) is
replaced once per window, after what it speaks of is on the disk; whatever lies beyond it is cut off by who goes on. Its
order of effects is all there is to trust: flush parts, write the journal, name full parts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from model.corpora.folder import Count, Counts, Dtype, Shard, Strict, part_name, read_model, sync_folder, write_whole
from model.corpora.order import Cursor
from model.data import DataError

JOURNAL = ".progress.json"
PIECE = 1 << 22


class OpenShard(Strict):
    """How much of the shard being written counts."""

    tokens: Count = 0
    documents: Count = 0


class Progress(Strict):
    """The content of the journal: everything up to the end of a window."""

    version: Literal[1] = 1
    place: Count = 0
    taken: Count = 0
    windows: Count = 0
    counts: Counts = Counts()
    full: list[Shard] = Field(default_factory=list)
    """Shards that have their name, or are about to get it."""
    training: OpenShard = OpenShard()
    held_out: OpenShard = OpenShard()

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.place, self.taken, self.windows)


class Part:
    """Writes the shards of one part of the data, to train on or held out."""

    def __init__(self, folder: Path, *, held_out: bool, dtype: Dtype, most: int, progress: Progress) -> None:
        """Goes on where `progress` ends. Raises `DataError` if the folder holds less, or `OSError`."""
        self._folder = folder
        self._held_out = held_out
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._most = most
        self.full = [shard for shard in progress.full if shard.held_out is held_out]
        begun = progress.held_out if held_out else progress.training
        self._tokens, self._documents = begun.tokens, begun.documents
        self._digest = hashlib.sha256()
        path = folder / part_name(self._name)
        length = self._tokens * self._dtype.itemsize
        there = path.stat().st_size if path.exists() else 0
        if there < length:
            raise DataError(f"{path} has {there} of {length} bytes: delete {folder} and prepare it again")
        self._file = path.open("r+b" if length else "wb", buffering=1 << 20)
        for start in range(0, length, PIECE):
            self._digest.update(self._file.read(min(PIECE, length - start)))
        self._file.seek(length)
        self._file.truncate()

    @property
    def _name(self) -> str:
        return f"{'held-out' if self._held_out else 'training'}-{len(self.full):05d}.bin"

    @property
    def open(self) -> OpenShard:
        return OpenShard(tokens=self._tokens, documents=self._documents)

    def add(self, ids: NDArray[np.uint32]) -> bool:
        """Appends a document, to a new shard if this one has no room; False if no shard has. Raises `OSError`."""
        if len(ids) > self._most:
            return False
        if self._tokens + len(ids) > self._most:
            self.fill()
            self._file = (self._folder / part_name(self._name)).open("wb", buffering=1 << 20)
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._tokens += len(ids)
        self._documents += 1
        return True

    def fill(self) -> None:
        """Declares the open shard full, if anything is in it. Raises `OSError`."""
        self.flush()
        self._file.close()
        if not self._tokens:
            (self._folder / part_name(self._name)).unlink()
            return
        shard = Shard(
            name=self._name,
            sha256=self._digest.hexdigest(),
            tokens=self._tokens,
            documents=self._documents,
            held_out=self._held_out,
        )
        self.full.append(shard)
        self._tokens, self._documents = 0, 0
        self._digest = hashlib.sha256()

    def flush(self) -> None:
        """Puts what was added on the disk. Raises `OSError`."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets go of the file; what was not flushed counts for nothing."""
        self._file.close()


def read_progress(folder: Path) -> Progress:
    """The journal of `folder`, or that of a beginning. Raises `DataError`."""
    path = folder / JOURNAL
    return read_model(path, Progress) if path.exists() else Progress()


def keep(folder: Path, progress: Progress) -> None:
    """Makes `progress` the truth: all that it speaks of has to be on the disk already. Raises `OSError`."""
    write_whole(folder / JOURNAL, (progress.model_dump_json() + "\n").encode())


def name_full(folder: Path, shards: Sequence[Shard]) -> None:
    """Names shards that the journal calls full. Raises `DataError` if one is in neither place, or `OSError`."""
    for shard in shards:
        part = folder / part_name(shard.name)
        if part.exists():
            part.replace(folder / shard.name)
        elif not (folder / shard.name).exists():
            raise DataError(f"shard {folder / shard.name} is gone: delete {folder} and prepare it again")
    if shards:
        sync_folder(folder)
