"""The chain on disk: every block durable before anyone hears of it, in one SQLite file.

A block, its hash and what it changes in the state are one transaction of a write-ahead log that is synced at each
commit, so a process killed at any instant leaves whole blocks and nothing else, and so does a power cut on a disk
that honours fsync. What is kept is what the running chain keeps: bodies and versions of the state within the
history, the hash of every block (32 bytes each). The file is locked for as long as it is open.

Opening trusts nothing: the pages are checked by SQLite, every stored value by its checksum, and within the history
each block must hash to its name, follow its parent and have the state root that its changes lead to.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from subnet.localchain.block import Block, next_root
from subnet.localchain.metadata import read_compact

FILE = "chain.sqlite"
FORMAT = 1

_SCHEMA = """
CREATE TABLE chain (identity TEXT NOT NULL);
CREATE TABLE hashes (number INTEGER PRIMARY KEY, hash BLOB NOT NULL);
CREATE TABLE bodies (number INTEGER PRIMARY KEY, state_root BLOB NOT NULL, extrinsics BLOB NOT NULL);
CREATE TABLE versions (key BLOB NOT NULL, number INTEGER NOT NULL, value BLOB, checksum INTEGER NOT NULL,
                       PRIMARY KEY (key, number)) WITHOUT ROWID;
"""
# Versions that no block of the history reads any more: those before the one that the oldest block reads.
_PRUNE = "DELETE FROM versions WHERE key = ?1 AND number < (SELECT max(number) FROM versions WHERE key = ?1 AND number <= ?2)"  # noqa: E501

Identity = Mapping[str, object]


class StoreError(Exception):
    """A state folder that cannot be used. One line: the file, what is wrong with it, what to do."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a store holds: all hashes, the blocks of the history, and per key its versions in order."""

    hashes: list[bytes]
    blocks: list[Block]
    versions: dict[bytes, list[tuple[int, bytes | None]]]


class Store:
    """The blocks of one chain in `folder`, which is made when it is missing. Close it to release the folder.

    identity: what makes the chain this one and no other, as JSON values by name. StoreError when the folder is in use,
    holds something else or another chain, or is damaged.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.path = folder / FILE
        text = json.dumps({"format": FORMAT, **identity})
        self._identity = cast("dict[str, object]", json.loads(text))  # as it will be read back: lists, not tuples
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.path.exists() and any(folder.iterdir()):
                raise StoreError(f"{folder} holds other files and no {FILE}; choose an empty --state folder")
        except OSError as error:
            raise StoreError(f"{folder} cannot be used: {error.strerror}; choose another --state folder") from error
        with self._explained():
            self._db = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        try:
            with self._explained():
                # Exclusive before anything is read: the lock is then held from the first access to the last. And what
                # is not ours is looked at before it is written to.
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
                with self._transaction():
                    self._is_new = self._check_identity()
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                with self._transaction():
                    pass
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Release the folder."""
        self._db.close()

    # writing --------------------------------------------------------------------------------------

    def append(self, block: Block, changes: Mapping[bytes, bytes | None], *, oldest: int) -> None:
        """Make `block` durable, and forget what only blocks before `oldest` needed. StoreError if it cannot be."""
        number = block.number
        rows = [(key, number, value, _checksum(key, number, value)) for key, value in changes.items()]
        with self._explained(), self._transaction():
            if self._is_new:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO chain VALUES (?)", (json.dumps(self._identity),))
            self._db.execute("INSERT INTO hashes VALUES (?, ?)", (number, block.hash))
            body = (number, block.state_root, b"".join(block.extrinsics))
            self._db.execute("INSERT INTO bodies VALUES (?, ?, ?)", body)
            self._db.executemany("INSERT INTO versions VALUES (?, ?, ?, ?)", rows)
            if oldest > 0:
                self._db.execute("DELETE FROM bodies WHERE number < ?", (oldest,))
                self._db.executemany(_PRUNE, [(key, oldest) for key in changes])
        self._is_new = False

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite has taken it back itself when the disk is full
                self._db.execute("ROLLBACK")
            raise

    # reading --------------------------------------------------------------------------------------

    def load(self) -> Saved | None:
        """Everything that is stored, checked; None for a folder that holds no block yet."""
        if self._is_new:
            return None
        with self._explained():
            problem = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise self._damaged(str(problem).splitlines()[0])
            saved = Saved(self._hashes(), self._blocks(), self._versions())
        self._check_blocks(saved)
        return saved

    def _hashes(self) -> list[bytes]:
        rows = cast("list[tuple[int, bytes]]", self._db.execute("SELECT * FROM hashes ORDER BY number").fetchall())
        if not rows or rows[-1][0] != len(rows) - 1:
            raise self._damaged(f"{len(rows)} block hashes are not those of blocks 0, 1, 2 ...")
        return [block_hash for _, block_hash in rows]

    def _blocks(self) -> list[Block]:
        blocks = []
        rows = self._db.execute(
            "SELECT bodies.number, state_root, extrinsics, hash FROM bodies"
            " LEFT JOIN hashes ON hashes.number = bodies.number - 1 ORDER BY bodies.number"
        )
        for number, state_root, extrinsics, parent in rows:
            try:
                parts = tuple(_split(extrinsics))
                block = Block.seal(number=number, parent=parent or bytes(32), state_root=state_root, extrinsics=parts)
            except ValueError as error:
                raise self._damaged(f"the extrinsics of block {number} cannot be read") from error
            blocks.append(block)
        return blocks

    def _versions(self) -> dict[bytes, list[tuple[int, bytes | None]]]:
        versions: dict[bytes, list[tuple[int, bytes | None]]] = {}
        for key, number, value, checksum in self._db.execute("SELECT * FROM versions ORDER BY key, number"):
            if checksum != _checksum(key, number, value):
                raise self._damaged(f"a value of block {number} does not match its checksum")
            versions.setdefault(key, []).append((number, value))
        return versions

    # checking -------------------------------------------------------------------------------------

    def _check_identity(self) -> bool:
        """True for a file that holds nothing yet; StoreError for one that holds something else."""
        tables = {str(row[0]) for row in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return True
        if "chain" not in tables:
            raise StoreError(f"{self.path} is not a chain of this program; choose another --state folder")
        rows = self._db.execute("SELECT identity FROM chain").fetchall()
        try:
            found = cast("dict[str, object]", json.loads(rows[0][0]))
        except (IndexError, ValueError, TypeError) as error:
            raise self._damaged("it does not say which chain it is") from error
        for name, value in self._identity.items():
            if found.get(name) != value:
                raise StoreError(
                    f"{self.path} holds a chain with {name} {found.get(name)}, not {value}; "
                    "start with the options that it was made with or choose another --state folder"
                )
        return False

    def _check_blocks(self, saved: Saved) -> None:
        head = len(saved.hashes) - 1
        if not saved.blocks or saved.blocks[-1].number != head:
            raise self._damaged(f"its newest block {head} has no body")
        changes: dict[int, dict[bytes, bytes | None]] = {}
        first = saved.blocks[0].number
        for key, versions in saved.versions.items():
            for number, value in versions:
                if number > first:
                    changes.setdefault(number, {})[key] = value
        previous: Block | None = None
        for block in saved.blocks:
            if block.hash != saved.hashes[block.number]:
                raise self._damaged(f"block {block.number} does not match its hash")
            if previous is not None:
                root = next_root(previous.state_root, changes.get(block.number, {}))
                if block.number != previous.number + 1 or block.state_root != root:
                    raise self._damaged(
                        f"the state of block {block.number} does not follow from block {previous.number}"
                    )
            previous = block

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"{self.path} is damaged: {what}; move the folder away or choose another --state folder")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors in one line that names the file and the remedy."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise StoreError(
                    f"{self.path} is in use by another process; stop it or choose another --state folder"
                ) from error
            raise StoreError(f"{self.path}: {error}; check space and permissions, or choose another --state") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error


def _split(joined: bytes) -> Iterator[bytes]:
    """Extrinsics start with their own length, so they are stored end to end."""
    at = 0
    while at < len(joined):
        length, body = read_compact(joined, at)
        yield joined[at : body + length]
        at = body + length


def _checksum(key: bytes, number: int, value: bytes | None) -> int:
    return zlib.crc32(b"\0" if value is None else b"\1" + value, zlib.crc32(key, number & 0xFFFFFFFF))
