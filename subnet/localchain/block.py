"""One block: its header's parts, its hash, its extrinsics; and how a state root follows from the last one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from subnet.localchain.codec import blake2_256
from subnet.localchain.metadata import compact, read_compact


@dataclass(frozen=True, slots=True)
class Block:
    """A block: its header's parts, its hash and its extrinsics as they were submitted."""

    number: int
    parent: bytes
    state_root: bytes
    extrinsics_root: bytes
    extrinsics: tuple[bytes, ...]
    timestamp_ms: int
    hash: bytes

    @classmethod
    def seal(
        cls,
        *,
        number: int,
        parent: bytes,
        state_root: bytes,
        extrinsics: tuple[bytes, ...],
    ) -> Block:
        """ValueError unless the first extrinsic, if there is one, is the timestamp's."""
        root = blake2_256(b"".join(extrinsics))
        header = parent + compact(number) + state_root + root + compact(0)
        return cls(number, parent, state_root, root, extrinsics, _timestamp(extrinsics), blake2_256(header))


def _timestamp(extrinsics: tuple[bytes, ...]) -> int:
    """What the inherent that opens a block says: length, version, pallet and call, then the time; 0 at genesis."""
    if not extrinsics:
        return 0
    _, at = read_compact(extrinsics[0], 0)
    return read_compact(extrinsics[0], at + 3)[0]


def next_root(root: bytes, changes: Mapping[bytes, bytes | None]) -> bytes:
    """The state root after `changes`: the last one and every key that changed, in order."""
    parts = [root]
    for key in sorted(changes):
        value = changes[key]
        parts += [compact(len(key)), key, b"\0" if value is None else b"\1" + compact(len(value)) + value]
    return blake2_256(b"".join(parts))
