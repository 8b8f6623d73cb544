"""Checkpoints: named tensors in one safetensors file that is either complete and proven, or refused.

Writing goes to a temporary file in the same folder, is flushed to the disk and then renamed, so a crash
leaves the old file or the new one, never half of either. The metadata carries the digest of the content (a
hash tree over the tensors in order of name), the manifest's hash, the round and the weight version; `load`
recomputes the digest before it returns anything. The same `content_digest` names a stage's weights on
chain.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "orion-checkpoint-1"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the file is left as it is."""


class CheckpointMissingError(CheckpointError):
    """There is no file at the path."""


class CheckpointCorruptError(CheckpointError):
    """The file is truncated, altered or not a checkpoint."""


class CheckpointMismatchError(CheckpointError):
    """The file is sound but belongs to another run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says about itself: run (hex of the manifest's hash), round and optimizer steps
    done."""

    manifest_hash: str
    round: int
    version: int


def content_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """32 bytes that change with any name, dtype, shape or bit of the tensors, and with nothing else.

    SHA-256 tree over the tensors in order of name: a leaf hashes (name, dtype, shape, data), a node its two
    children, an odd one rises unchanged; leaves and nodes have different prefixes.
    """
    level = [_leaf(name, tensors[name]) for name in sorted(tensors)]
    if not level:
        return hashlib.sha256(b"").digest()
    while len(level) > 1:
        pairs = [hashlib.sha256(b"\x01" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + ([level[-1]] if len(level) % 2 else [])
    return level[0]


def save(path: Path, tensors: Mapping[str, Tensor], info: CheckpointInfo) -> bytes:
    """Writes the checkpoint atomically and returns its content digest (32 bytes)."""
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    digest = content_digest(held)
    metadata = {
        "format": FORMAT,
        "content_digest": digest.hex(),
        "manifest_hash": info.manifest_hash,
        "round": str(info.round),
        "version": str(info.version),
    }
    metadata["seal"] = _seal(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        save_file(held, temporary, metadata)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def load(path: Path, *, manifest_hash: str) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Reads and proves a checkpoint of the run `manifest_hash`; tensors come back on the CPU.

    Raises `CheckpointMissingError`, `CheckpointCorruptError` or `CheckpointMismatchError`; the file is
    never changed.
    """
    if not path.is_file():
        raise CheckpointMissingError(f"checkpoint {path} does not exist: give the path of a saved checkpoint")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointCorruptError(
            f"checkpoint {path} cannot be read ({error}): use an older checkpoint or fetch the weights from a peer"
        ) from error
    info, expected = _parse(path, metadata)
    found = content_digest(tensors).hex()
    if found != expected:
        raise CheckpointCorruptError(
            f"checkpoint {path} has content {found[:16]}… where its header says {expected[:16]}…: "
            "use an older checkpoint or fetch the weights from a peer"
        )
    if info.manifest_hash != manifest_hash:
        raise CheckpointMismatchError(
            f"checkpoint {path} belongs to manifest {info.manifest_hash[:16]}…, this run is "
            f"{manifest_hash[:16]}…: "
            "choose that run's manifest or another checkpoint folder"
        )
    return tensors, info


def _parse(path: Path, metadata: Mapping[str, str]) -> tuple[CheckpointInfo, str]:
    try:
        sealed = metadata["format"] == FORMAT and metadata["seal"] == _seal(metadata)
        info = CheckpointInfo(
            manifest_hash=metadata["manifest_hash"],
            round=int(metadata["round"]),
            version=int(metadata["version"]),
        )
        expected = metadata["content_digest"]
    except (KeyError, ValueError) as error:
        raise CheckpointCorruptError(
            f"checkpoint {path} has no {FORMAT} header ({error!r}): use a checkpoint that Orion wrote"
        ) from error
    if not sealed:
        raise CheckpointCorruptError(
            f"checkpoint {path} has an altered header: use an older checkpoint or fetch the weights from a peer"
        )
    return info, expected


def _seal(metadata: Mapping[str, str]) -> str:
    fields = ("format", "content_digest", "manifest_hash", "round", "version")
    return hashlib.sha256("\0".join(metadata[field] for field in fields).encode()).hexdigest()


def _leaf(name: str, tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    label = f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{','.join(map(str, tensor.shape))}\0"
    leaf = hashlib.sha256(b"\x00" + label.encode())
    leaf.update(flat.view(torch.uint8).numpy().data)
    return leaf.digest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
