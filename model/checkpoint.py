"""Checkpoints: named tensors in one safetensors file that is either complete and proven, or refused.

Writing goes to a temporary file in the same folder, is flushed to the disk and then renamed, so a crash
leaves the old file or the new one, never half of either. The metadata carries the digest of the content (a
hash tree over the tensors in order of name), the manifest's hash, the round, the weight version and whose
state it is (`subject`); `load` recomputes the digest before it returns anything. The same `content_digest`
names a stage's weights on chain. `dumps` and `loads` are the same file in memory, `encode` the same in
pieces for whoever writes it elsewhere; `read_header` tells what a file is from its first bytes. `mapped`
reads nothing before it is looked at, for readers that prove what they read in another way.
"""

import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from blake3 import blake3
from torch import Tensor

from model import hashing

FORMAT = "orion-checkpoint-3"
HEADER_LIMIT = 16 << 20
"""Bytes; a longer header is no checkpoint's."""
PIECE = 8 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_FIELDS = ("format", "content_digest", "manifest_hash", "round", "version", "subject")
_FALL_BACK = "use an older checkpoint or fetch the weights from a peer"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the file is left as it is."""


class CheckpointMissingError(CheckpointError):
    """There is no file at the path."""


class CheckpointCorruptError(CheckpointError):
    """The file is truncated, altered or not a checkpoint."""


class CheckpointMismatchError(CheckpointError):
    """The file is sound but belongs to another run, round or owner."""


class CheckpointContentError(CheckpointError):
    """The tensors cannot be written: a dtype has no name in the format, or they changed while they were written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says about itself: run (hex of the manifest's hash), round and optimizer steps
    done."""

    manifest_hash: str
    round: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file's first bytes promise; only reading it all proves the content."""

    info: CheckpointInfo
    subject: str
    digest: bytes
    """Content digest, 32 bytes."""
    size: int
    """Bytes of the whole file."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A checkpoint ready to be written: `pieces` in order are the file."""

    digest: bytes
    size: int
    head: bytes
    tensors: tuple[tuple[str, Tensor], ...]

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The file in pieces of at most `PIECE` bytes (the header may be longer), hashed on their way.

        Raises `CheckpointContentError` after the last piece if the tensors are no longer what the header says:
        whoever writes must take that as a failed write.
        """
        yield self.head
        leaves = {}
        for name, tensor in self.tensors:
            leaf = _leaf_start(name, tensor)
            data = _bytes_of(tensor)
            for start in range(0, len(data), PIECE):
                piece = data[start : start + PIECE]
                leaf.update(piece)
                yield piece
            leaves[name] = leaf.digest()
        if _tree(leaves) != self.digest:
            raise CheckpointContentError(
                "tensors changed while their checkpoint was written, which was given up: hand in a copy"
            )


def content_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """32 bytes that change with any name, dtype, shape or bit of the tensors, and with nothing else.

    BLAKE3 tree over the tensors in order of name: a leaf hashes (name, dtype, shape, data), a node its two
    children, an odd one rises unchanged; leaves and nodes have different prefixes.
    """
    return _tree({name: _leaf(name, tensor) for name, tensor in tensors.items()})


def encode(tensors: Mapping[str, Tensor], info: CheckpointInfo, *, subject: str = "") -> Encoded:
    """The checkpoint of `tensors`, which must not change until it is written. Raises `CheckpointContentError`.

    `subject` says whose state it is, in a few words, so that one file cannot stand in for another.
    """
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    digest = content_digest(held)
    metadata = {
        "format": FORMAT,
        "content_digest": digest.hex(),
        "manifest_hash": info.manifest_hash,
        "round": str(info.round),
        "version": str(info.version),
        "subject": subject,
    }
    metadata["seal"] = _seal(metadata)
    # Wide elements first, so that every tensor is aligned in the file.
    ordered = tuple(sorted(held.items(), key=lambda item: (-item[1].element_size(), item[0])))
    entries: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise CheckpointContentError(
                f"tensor '{name}' is {tensor.dtype}; a checkpoint takes "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}: convert it first"
            )
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return Encoded(digest, len(head) + end, head, ordered)


def dumps(tensors: Mapping[str, Tensor], info: CheckpointInfo, *, subject: str = "") -> bytes:
    """The bytes `save` would write."""
    return b"".join(encode(tensors, info, subject=subject).pieces())


def loads(
    data: bytes | bytearray, manifest_hash: str, *, subject: str | None = None, name: str = "in memory"
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """`load` for bytes; `name` is what errors call them. Tensors share the memory of a bytearray."""
    header = read_header(name, data)
    if header.size != len(data):
        raise CheckpointCorruptError(f"checkpoint {name} has {len(data)} bytes of {header.size}: {_FALL_BACK}")
    held = torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8)
    tensors = _tensors(name, held)
    found = content_digest(tensors)
    if found != header.digest:
        raise CheckpointCorruptError(
            f"checkpoint {name} has content {found.hex()[:16]}… where its header says {header.digest.hex()[:16]}…: "
            f"{_FALL_BACK}"
        )
    check_owner(name, header, manifest_hash=manifest_hash, subject=subject)
    return tensors, header.info


def save(path: Path, tensors: Mapping[str, Tensor], info: CheckpointInfo, *, subject: str = "") -> bytes:
    """Writes the checkpoint atomically and returns its content digest (32 bytes).

    Raises `OSError` (a full disk, say) or `CheckpointContentError`; what was at `path` is then as it was.
    """
    encoded = encode(tensors, info, subject=subject)
    write(path, encoded)
    return encoded.digest


def write(path: Path, encoded: Encoded) -> None:
    """`save` for what is encoded already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = _temporary(path)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for piece in encoded.pieces():
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]
            _flush(temporary)
            temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> int:
    """Removes what killed writers left in `folder`, never what a living one is writing; returns how many."""
    removed = 0
    for path in folder.glob(".*.safetensors.*"):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its writer finished
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed += 1
        except BlockingIOError:
            continue  # its writer lives
        finally:
            os.close(descriptor)
    return removed


def load(path: Path, *, manifest_hash: str, subject: str | None = None) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Reads and proves a checkpoint of the run `manifest_hash`; tensors come back on the CPU.

    Raises `CheckpointMissingError`, `CheckpointCorruptError` or `CheckpointMismatchError`; the file is
    never changed. With `subject`, a file of another one is a mismatch.
    """
    if not path.is_file():
        raise CheckpointMissingError(f"checkpoint {path} does not exist: give the path of a saved checkpoint")
    try:
        # Read, not mapped: what is proven must stay so when the file is changed in its place.
        data = bytearray(path.stat().st_size)
        with path.open("rb") as file:
            del data[_fill(file, data) :]
    except OSError as error:
        raise _unreadable(str(path), error) from error
    return loads(data, manifest_hash, subject=subject, name=str(path))


def mapped(path: Path, *, manifest_hash: str, subject: str | None = None) -> dict[str, Tensor]:
    """`load` of a file that nobody writes to any more, mapped into memory: its bytes are read when they are looked at,
    and nothing says that they are those which were written. The file may be deleted meanwhile."""
    if not path.is_file():
        raise CheckpointMissingError(f"checkpoint {path} does not exist: give the path of a saved checkpoint")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            first += file.read(min(header_length(first), HEADER_LIMIT) - len(first))
    except OSError as error:
        raise _unreadable(str(path), error) from error
    header = read_header(str(path), first)
    if header.size != size:
        raise CheckpointCorruptError(f"checkpoint {path} has {size} bytes of {header.size}: {_FALL_BACK}")
    check_owner(str(path), header, manifest_hash=manifest_hash, subject=subject)
    try:
        held = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise _unreadable(str(path), error) from error
    return _tensors(str(path), held)


def header_length(first: bytes | bytearray) -> int:
    """Bytes from the start of a file that `read_header` needs, from its first eight."""
    return 8 + int.from_bytes(first[:8], "little")


def read_header(name: str, first: bytes | bytearray) -> Header:
    """What the file that begins with `first` says about itself. Raises `CheckpointCorruptError`."""
    end = header_length(first)
    if len(first) < 8 or end > min(len(first), HEADER_LIMIT):
        raise CheckpointCorruptError(
            f"checkpoint {name} has no whole header in its first {min(len(first), HEADER_LIMIT)} bytes: {_FALL_BACK}"
        )
    try:
        entries = json.loads(first[8:end])
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        size = end + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _unreadable(name, error) from error
    return _parse(name, metadata, size=size)


def _parse(name: str, metadata: Mapping[str, str], *, size: int) -> Header:
    try:
        sealed = metadata["format"] == FORMAT and metadata["seal"] == _seal(metadata)
        header = Header(
            info=CheckpointInfo(
                manifest_hash=metadata["manifest_hash"],
                round=int(metadata["round"]),
                version=int(metadata["version"]),
            ),
            subject=metadata["subject"],
            digest=bytes.fromhex(metadata["content_digest"]),
            size=size,
        )
    except (KeyError, ValueError) as error:
        raise CheckpointCorruptError(
            f"checkpoint {name} has no {FORMAT} header ({error!r}): use a checkpoint that Orion wrote"
        ) from error
    if not sealed:
        raise CheckpointCorruptError(f"checkpoint {name} has an altered header: {_FALL_BACK}")
    return header


def _tensors(name: str, held: Tensor) -> dict[str, Tensor]:
    """Views of a whole file, uint8 (size,)."""
    start = header_length(held[:8].numpy().tobytes())
    tensors = {}
    try:
        for key, entry in json.loads(held[8:start].numpy().tobytes()).items():
            if key == "__metadata__":
                continue
            dtype, shape = _BY_NAME[entry["dtype"]], [int(length) for length in entry["shape"]]
            first, last = (int(offset) for offset in entry["data_offsets"])
            if (
                (start + first) % dtype.itemsize
                or min(first, *shape, 0) < 0
                or last - first != math.prod(shape) * dtype.itemsize
            ):
                raise ValueError(f"'{key}' has impossible bounds")
            tensors[str(key)] = held[start + first : start + last].view(dtype).reshape(shape)
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(name, error) from error
    return tensors


def check_owner(name: str, header: Header, *, manifest_hash: str, subject: str | None) -> None:
    """Raises `CheckpointMismatchError` unless the file is of this run and, if given, of this subject."""
    info = header.info
    if info.manifest_hash != manifest_hash:
        raise CheckpointMismatchError(
            f"checkpoint {name} belongs to manifest {info.manifest_hash[:16]}…, this run is {manifest_hash[:16]}…: "
            "choose that run's manifest or another checkpoint folder"
        )
    if subject is not None and header.subject != subject:
        raise CheckpointMismatchError(
            f"checkpoint {name} is of '{header.subject}', not of '{subject}': put the right file in its place"
        )


def _fill(file: BinaryIO, data: bytearray) -> int:
    """Reads into `data` until it is full or the file ends; returns how many bytes came."""
    came = 0
    with memoryview(data) as view:
        while came < len(data) and (count := file.readinto(view[came : came + PIECE])):  # type: ignore[attr-defined]
            came += count
    return came


def _unreadable(name: str, error: Exception) -> CheckpointCorruptError:
    return CheckpointCorruptError(f"checkpoint {name} cannot be read ({error}): {_FALL_BACK}")


def _seal(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256("\0".join(metadata[field] for field in _FIELDS).encode()).hexdigest()


def _tree(leaves: Mapping[str, bytes]) -> bytes:
    level = [leaves[name] for name in sorted(leaves)]
    if not level:
        return hashing.digest()
    while len(level) > 1:
        pairs = [hashing.digest(b"\x01", a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + ([level[-1]] if len(level) % 2 else [])
    return level[0]


def _leaf(name: str, tensor: Tensor) -> bytes:
    leaf = _leaf_start(name, tensor)
    leaf.update(_bytes_of(tensor))
    return leaf.digest()


def _leaf_start(name: str, tensor: Tensor) -> blake3:
    label = f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{','.join(map(str, tensor.shape))}\0"
    return hashing.hasher(b"\x00" + label.encode())


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)


def _temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, locked for as long as its descriptor is open: the sign of a living writer."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if os.fstat(descriptor).st_ino == os.stat(name).st_ino:  # noqa: PTH116 (twin of fstat)
                return descriptor, Path(name)
        except FileNotFoundError:
            pass  # taken for a dead writer's before it was locked
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
