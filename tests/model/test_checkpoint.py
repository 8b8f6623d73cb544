"""Checkpoints come back bit for bit or not at all, and a failed write or read harms nothing."""

import json
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.checkpoint import (
    CheckpointContentError,
    CheckpointCorruptError,
    CheckpointInfo,
    CheckpointMismatchError,
    CheckpointMissingError,
    content_digest,
    dumps,
    header_length,
    load,
    loads,
    read_header,
    save,
)

_RUN = "ab" * 32
_INFO = CheckpointInfo(manifest_hash=_RUN, round=3, version=41)


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weights.a": torch.randn(7, 5, generator=generator),
        "weights.b": torch.randn(3, generator=generator).bfloat16(),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "version": torch.tensor(41),
        "empty": torch.zeros(0, 2),
    }


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "stage-0.safetensors"
    digest = save(path, _tensors(), _INFO)
    tensors, info = load(path, manifest_hash=_RUN)
    assert info == _INFO
    assert content_digest(tensors) == digest == content_digest(_tensors())
    for name, value in _tensors().items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_every_altered_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, _tensors(), _INFO)
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        with pytest.raises((CheckpointCorruptError, CheckpointMismatchError), match=r"c\.safetensors"):
            load(path, manifest_hash=_RUN)


@pytest.mark.parametrize("keep", [0, 4, 60, 600, -1])
def test_a_truncated_file_is_refused_and_left_alone(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "c.safetensors"
    save(path, _tensors(), _INFO)
    cut = path.read_bytes()[:keep]
    path.write_bytes(cut)
    with pytest.raises(CheckpointCorruptError, match=r"c\.safetensors .*: use an older checkpoint"):
        load(path, manifest_hash=_RUN)
    assert path.read_bytes() == cut


def test_another_runs_checkpoint_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, _tensors(), _INFO)
    with pytest.raises(CheckpointMismatchError, match="belongs to manifest abababababababab…, this run is cdcd"):
        load(path, manifest_hash="cd" * 32)
    with pytest.raises(CheckpointMissingError, match=r"other\.safetensors does not exist"):
        load(tmp_path / "other.safetensors", manifest_hash=_RUN)


def test_a_safetensors_file_of_someone_else_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointCorruptError, match="use a checkpoint that Orion wrote"):
        load(path, manifest_hash=_RUN)


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    save(path, _tensors(), _INFO)

    def full_disk(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(path, {"a": torch.zeros(1)}, _INFO)
    assert load(path, manifest_hash=_RUN)[1] == _INFO
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_digest_sees_name_dtype_shape_and_data() -> None:
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    variants = [
        base,
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.zeros(4), "b": torch.tensor([1.0, -1.0])},
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4), "a": torch.ones(2)},
        {},
    ]
    assert len({content_digest(variant) for variant in variants}) == len(variants)
    assert content_digest(dict(reversed(base.items()))) == content_digest(base)


def test_memory_and_file_are_one_format(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    digest = save(path, _tensors(), _INFO, subject="stage 1")
    data = dumps(_tensors(), _INFO, subject="stage 1")
    assert data == path.read_bytes()
    tensors, info = loads(data, _RUN, subject="stage 1")
    assert info == _INFO
    assert content_digest(tensors) == digest
    header = read_header("c", data[: header_length(data)])
    assert (header.info, header.subject, header.digest, header.size) == (_INFO, "stage 1", digest, len(data))
    for position in range(0, len(data), 11):
        altered = data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]
        with pytest.raises((CheckpointCorruptError, CheckpointMismatchError)):
            loads(altered, _RUN, subject="stage 1")
        with pytest.raises(CheckpointCorruptError):
            loads(data[:position], _RUN)


def test_one_files_place_is_not_anothers(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, _tensors(), _INFO, subject="stage 1")
    assert load(path, manifest_hash=_RUN)[1] == _INFO
    with pytest.raises(CheckpointMismatchError, match=r"c\.safetensors is of 'stage 1', not of 'stage 2'"):
        load(path, manifest_hash=_RUN, subject="stage 2")


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointContentError, match=r"'a' is torch\.complex64; a checkpoint takes float64"):
        save(tmp_path / "c.safetensors", {"a": torch.zeros(1, dtype=torch.complex64)}, _INFO)
    assert list(tmp_path.iterdir()) == []


def test_what_is_proven_stays_so_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    digest = save(path, _tensors(), _INFO)
    tensors, _ = load(path, manifest_hash=_RUN)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert content_digest(tensors) == digest


def test_others_read_the_file_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save(tmp_path / "c.safetensors", _tensors(), _INFO)
    assert content_digest(load_file(tmp_path / "c.safetensors")) == content_digest(_tensors())


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
        {"dtype": "F33", "shape": [3], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0]},
        [],
    ],
)
def test_a_header_with_impossible_bounds_is_refused(entry: object) -> None:
    good = dumps({"a": torch.ones(3)}, _INFO)
    header = json.loads(good[8 : header_length(good)])
    text = json.dumps(header | {"a": entry}).encode()
    with pytest.raises(CheckpointCorruptError):
        loads(len(text).to_bytes(8, "little") + text + good[header_length(good) :], _RUN)
