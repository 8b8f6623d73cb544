"""Versioned chain state: a map from storage key to SCALE bytes, readable as it was at any recent block.

`History` keeps, per key, the values it has had and the block that wrote each; a read at block n takes the
last one written at or before n. Versions older than the configured number of blocks are dropped as their key
is written again, so memory is bounded by (live keys + history x keys written per block). `Snapshot` is the
read-only view of one block. `Working` is the view that a block is built on: writes go into a stack of layers,
one per open transaction, so a failing call leaves no trace. Both decode through the codec; names are the
metadata's `Pallet.Item`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from subnet.localchain.codec import Codec

_Version = tuple[int, bytes | None]


class StateDiscarded(Exception):  # noqa: N818 - the words that Substrate has for it
    """A read at a block whose state is older than the history that is kept."""


class History:
    """All versions of all keys within the last `keep` blocks."""

    def __init__(self, *, keep: int) -> None:
        self.keep = keep
        self.head = -1
        self._versions: dict[bytes, list[_Version]] = {}
        self._sorted: list[bytes] = []

    @property
    def oldest(self) -> int:
        """The first block whose state can still be read."""
        return max(0, self.head - self.keep)

    def commit(self, number: int, changes: Mapping[bytes, bytes | None]) -> None:
        """Make `changes` the difference between block `number` and the one before it."""
        if number != self.head + 1:
            raise ValueError(f"block {number} cannot follow block {self.head}")
        self.head = number
        for key, value in changes.items():
            versions = self._versions.get(key)
            if versions is None:
                self._versions[key] = [(number, value)]
                insort(self._sorted, key)
                continue
            versions.append((number, value))
            if len(versions) > 32 and versions[16][0] <= self.oldest:
                del versions[: bisect_right(versions, self.oldest, key=_block) - 1]

    def restore(self, head: int, versions: dict[bytes, list[_Version]]) -> None:
        """Become what a history was after block `head`, from its keys in order and their versions in order."""
        self.head = head
        self._versions = versions
        self._sorted = list(versions)

    def get(self, key: bytes, number: int) -> bytes | None:
        """The bytes stored under `key` after block `number`, or None."""
        versions = self._versions.get(key)
        if versions is None:
            return None
        if versions[-1][0] <= number:
            return versions[-1][1]
        at = bisect_right(versions, number, key=_block)
        return versions[at - 1][1] if at else None

    def keys(self, prefix: bytes, number: int, *, after: bytes | None = None) -> Iterator[bytes]:
        """Keys with `prefix` that hold a value at block `number`, in order, strictly after `after`."""
        at = bisect_left(self._sorted, prefix)
        if after is not None:
            at = max(at, bisect_right(self._sorted, after))
        while at < len(self._sorted) and self._sorted[at].startswith(prefix):
            if self.get(self._sorted[at], number) is not None:
                yield self._sorted[at]
            at += 1


def _block(version: _Version) -> int:
    return version[0]


class Reader:
    """Typed reads of storage items. A missing value reads as the item's default in the metadata."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def raw(self, key: bytes) -> bytes | None:
        raise NotImplementedError

    def value(self, name: str, *keys: object) -> object:
        return self.codec.decode_value(name, self.raw(self.codec.key(name, keys)))

    def exists(self, name: str, *keys: object) -> bool:
        return self.raw(self.codec.key(name, keys)) is not None

    def number(self, name: str, *keys: object) -> int:
        """An integer item; an optional one that is absent reads as 0 (use `exists` to tell)."""
        return cast("int", self.value(name, *keys) or 0)

    def flag(self, name: str, *keys: object) -> bool:
        return bool(self.value(name, *keys))

    def account(self, name: str, *keys: object) -> str | None:
        """An account as ss58, None where none is stored."""
        raw = self.raw(self.codec.key(name, keys))
        return None if raw is None else cast("str", self.codec.decode_value(name, raw))

    def numbers(self, name: str, *keys: object) -> list[int]:
        return list(cast("list[int]", self.value(name, *keys) or []))

    def flags(self, name: str, *keys: object) -> list[bool]:
        return list(cast("list[bool]", self.value(name, *keys) or []))

    def accounts(self, name: str, *keys: object) -> list[str]:
        return list(cast("list[str]", self.value(name, *keys) or []))

    def pairs(self, name: str, *keys: object) -> list[tuple[int, int]]:
        """A sparse row: (uid, u16 value)."""
        return [(int(uid), int(w)) for uid, w in cast("list[tuple[int, int]]", self.value(name, *keys) or [])]

    def struct(self, name: str, *keys: object) -> dict[str, object] | None:
        found = self.value(name, *keys)
        return None if found is None else dict(cast("Mapping[str, object]", found))


class Snapshot(Reader):
    """State as it was after one block. StateDiscarded when that block has left the history."""

    def __init__(self, codec: Codec, history: History, number: int) -> None:
        super().__init__(codec)
        if number < history.oldest:
            raise StateDiscarded(number)
        self.block = number
        self._history = history

    def raw(self, key: bytes) -> bytes | None:
        return self._history.get(key, self.block)

    def keys(self, prefix: bytes, *, after: bytes | None = None) -> Iterator[bytes]:
        return self._history.keys(prefix, self.block, after=after)


class Working(Reader):
    """The state of the block under construction: the parent's, with layers of changes on top."""

    def __init__(self, codec: Codec, history: History) -> None:
        super().__init__(codec)
        self._history = history
        self._layers: list[dict[bytes, bytes | None]] = [{}]

    @property
    def changes(self) -> Mapping[bytes, bytes | None]:
        """What differs from the parent block; call it outside transactions."""
        return self._layers[0]

    def raw(self, key: bytes) -> bytes | None:
        for layer in reversed(self._layers):
            if key in layer:
                return layer[key]
        return self._history.get(key, self._history.head)

    def put(self, name: str, keys: tuple[object, ...], value: object) -> None:
        self._layers[-1][self.codec.key(name, keys)] = self.codec.encode_value(name, value)

    def delete(self, name: str, *keys: object) -> None:
        self._layers[-1][self.codec.key(name, keys)] = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Changes made inside are kept if the block ends normally and dropped if it raises."""
        self._layers.append({})
        try:
            yield
        except BaseException:
            self._layers.pop()
            raise
        changes = self._layers.pop()
        self._layers[-1].update(changes)
