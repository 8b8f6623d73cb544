"""Samples are a pure function of verified files; epochs are permutations; held-out tokens stay out."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.data import Corpus, DataError, ShardEntry


def _shard(folder: Path, name: str, ids: list[int] | np.ndarray, dtype: str = "uint16") -> ShardEntry:
    data = np.asarray(ids, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
    (folder / name).write_bytes(data)
    return ShardEntry(name=name, sha256=hashlib.sha256(data).hexdigest(), dtype=dtype)  # type: ignore[arg-type]


def _corpus(folder: Path, entries: list[ShardEntry], *, batch: int = 2, tokens: int = 4, seed: int = 1) -> Corpus:
    return Corpus.open(folder, entries, seed=seed, batch=batch, tokens=tokens, vocab=10_000, held_out=0.1)


def test_samples_are_pure_and_targets_follow_inputs(tmp_path: Path) -> None:
    entry = _shard(tmp_path, "a.bin", np.arange(1_000))
    one, two = _corpus(tmp_path, [entry]), _corpus(tmp_path, [entry])
    later = one.sample(40)
    for number in (0, 1, 7, 40, 1_000_000):
        x = one.sample(number)
        assert x.shape == (2, 5)
        assert x.dtype == torch.int64
        assert torch.equal(x, two.sample(number))
        assert torch.equal(x[:, :-1] + 1, x[:, 1:])
    assert torch.equal(later, one.sample(40))
    assert not torch.equal(later, _corpus(tmp_path, [entry], seed=2).sample(40))
    assert torch.equal(one.validation_sample(0), two.validation_sample(0))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_run_through_shards_but_not_across_them(tmp_path: Path, dtype: str) -> None:
    first = _shard(tmp_path, "a.bin", np.arange(0, 403), dtype)
    second = _shard(tmp_path, "b.bin", np.arange(5_000, 5_402), dtype)
    corpus = _corpus(tmp_path, [first, second], batch=1)
    seen = [corpus.sample(i)[0] for i in range(corpus.training_windows)]
    seen += [corpus.validation_sample(i)[0] for i in range(corpus.validation_samples)]
    starts = sorted(int(x[0]) for x in seen)
    assert all(torch.equal(x, torch.arange(int(x[0]), int(x[0]) + 5)) for x in seen)
    every = [*range(0, 400, 4), *range(5_000, 5_400, 4)]
    left_out = set(every) - set(starts)
    assert len(starts) == len(set(starts)) == len(every) - 1
    assert len(left_out) == 1


def test_no_token_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, [_shard(tmp_path, "a.bin", np.arange(4_001))])
    trained = {int(t) for i in range(3 * corpus.training_windows // 2) for t in corpus.sample(i).flatten()}
    held = {int(t) for i in range(corpus.validation_samples) for t in corpus.validation_sample(i).flatten()}
    assert len(held) >= 0.09 * 4_000
    assert trained.isdisjoint(held)


@given(windows=st.integers(20, 400), seed=st.integers(0, 2**64), epoch=st.integers(0, 50))
def test_every_epoch_is_a_permutation(windows: int, seed: int, epoch: int) -> None:
    from model.data import TokenShard

    ids = np.zeros(windows + 1, dtype=np.uint16)
    shard = TokenShard(ShardEntry(name="a", sha256="", dtype="uint16"), ids)
    corpus = Corpus([shard], seed=seed, batch=1, tokens=1)
    n = corpus.training_windows
    assert sorted(corpus.training_window(epoch * n + i) for i in range(n)) == list(range(n))


def test_epochs_come_in_different_orders(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, [_shard(tmp_path, "a.bin", np.arange(4_001))])
    n = corpus.training_windows
    orders = [tuple(corpus.training_window(epoch * n + i) for i in range(n)) for epoch in range(4)]
    assert len(set(orders)) == 4


def test_altered_missing_and_misplaced_shards_are_named(tmp_path: Path) -> None:
    entry = _shard(tmp_path, "a.bin", np.arange(1_000))
    good = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(good[:-2] + b"\x00\x00")
    with pytest.raises(DataError, match=rf"a\.bin has SHA-256 \w+, expected {entry.sha256}: delete it and fetch"):
        _corpus(tmp_path, [entry])
    (tmp_path / "a.bin").write_bytes(good[:-1])
    with pytest.raises(DataError, match="has 1999 bytes, no multiple of 2"):
        _corpus(tmp_path, [entry])
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DataError, match=r"a\.bin does not exist"):
        _corpus(tmp_path, [entry])
    with pytest.raises(DataError, match="leaves its folder"):
        _corpus(tmp_path, [ShardEntry(name="../a.bin", sha256="", dtype="uint16")])


def test_tokens_outside_the_vocabulary_and_too_little_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds token 10000, the vocabulary has 10000"):
        _corpus(tmp_path, [_shard(tmp_path, "a.bin", np.arange(10_001))])
    with pytest.raises(DataError, match="10 windows of 4 tokens give 8 to train and 1 held out, a batch needs 2"):
        _corpus(tmp_path, [_shard(tmp_path, "b.bin", np.arange(41))])
    with pytest.raises(DataError, match="batch is 0"):
        _corpus(tmp_path, [_shard(tmp_path, "c.bin", np.arange(1_000))], batch=0)
    corpus = _corpus(tmp_path, [_shard(tmp_path, "d.bin", np.arange(1_000))])
    with pytest.raises(DataError, match="sample id is -1"):
        corpus.sample(-1)
    with pytest.raises(DataError, match="validation sample is 12; this corpus has 0 to 11"):
        corpus.validation_sample(12)
