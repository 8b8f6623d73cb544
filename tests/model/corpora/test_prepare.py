"""Shards are the same bytes however they came about, whole or not there, and hold every document once."""

import errno
import gzip
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.corpora.documents import BrokenError
from model.corpora.folder import (
    MANIFEST,
    TOKENIZER,
    DataManifest,
    read_manifest,
    verify,
    verify_tokenizer,
    write_whole,
)
from model.corpora.prepare import PLAN, Advance, held_out
from model.corpora.shards import JOURNAL
from model.data import Corpus, DataError
from tests.model.corpora.making import (
    contents,
    documents_in,
    made,
    recipe,
    texts,
    tokenizer,
    tokenizer_json,
    write_jsonl,
    write_parquet,
)

DOCUMENTS = texts(120)


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files of documents, some of them empty or too long."""
    more = [None, "", " \n", "long " * 900, "é" * 1_500]
    return [
        write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:70]),
        write_jsonl(tmp_path / "b.jsonl", more),
        write_jsonl(tmp_path / "c.jsonl", DOCUMENTS[70:]),
    ]


class Stop(list[Advance]):
    """Kills the process at the advance of that number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def append(self, advance: Advance) -> None:
        super().append(advance)
        if len(self) == self._number:
            raise Killed


def both(folder: Path, manifest: DataManifest) -> list[str]:
    return [text for part in (False, True) for text in documents_in(folder, manifest, held_out=part)]


def test_every_document_is_in_one_shard_and_everything_is_counted(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.corpora.prepare.TOLD", 500)
    told: list[Advance] = []
    out = tmp_path / "out"
    manifest = made(out, files, recipe(), told)
    assert sorted(both(out, manifest)) == sorted(DOCUMENTS)
    counts = manifest.counts
    # "é" * 1,500 is 3,000 bytes of text but 6 bytes a letter in this file: too long as a line.
    assert (counts.empty, counts.too_long, counts.training + counts.held_out) == (3, 2, len(DOCUMENTS))
    assert sum(shard.documents for shard in manifest.shards) == len(DOCUMENTS)
    assert all(shard.tokens <= 900 for shard in manifest.shards)
    assert sum(not shard.held_out for shard in manifest.shards) > 5
    for shard in manifest.shards:
        verify(out, manifest, shard)
        assert (out / shard.name).stat().st_size == 2 * shard.tokens
    verify_tokenizer(out, manifest)
    assert set(contents(out)) == {MANIFEST, TOKENIZER, *(shard.name for shard in manifest.shards)}
    assert read_manifest(out) == manifest
    for name in ("read", "documents", "tokens"):
        values = [getattr(advance, name) for advance in told]
        assert values == sorted(values)
    assert told[0].read == 0
    assert len(told) > 40
    assert told[-1].read == told[-1].total == sum(path.stat().st_size for path in files)
    assert told[-1].tokens == sum(shard.tokens for shard in manifest.shards)
    assert told[-1].documents == len(DOCUMENTS)


def test_all_formats_give_the_same_documents(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("<|next|>".join(DOCUMENTS))
    single = [tmp_path / f"{number:03}.txt" for number in range(len(DOCUMENTS))]
    for path, document in zip(single, DOCUMENTS, strict=True):
        path.write_text(document)
    lines = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    given: dict[str, tuple[list[Path], dict[str, object]]] = {
        "jsonl": ([lines], {}),
        "compressed": ([tmp_path / "a.jsonl.gz"], {}),
        "parquet": ([write_parquet(tmp_path / "a.parquet", DOCUMENTS)], {"format": "parquet"}),
        "text": ([text], {"format": "text", "separator": "<|next|>"}),
        "texts": (single, {"format": "text"}),
    }
    parts = {}
    for name, (paths, changes) in given.items():
        manifest = made(tmp_path / name, paths, recipe(**changes))
        kept = [documents_in(tmp_path / name, manifest, held_out=part) for part in (False, True)]
        assert sorted(kept[0] + kept[1]) == sorted(document.strip("\r\n") for document in DOCUMENTS)
        parts[name] = [sorted(part) for part in kept]
        assert parts[name][1] == sorted(document for document in DOCUMENTS if held_out(document, 0.2))
    assert all(part == parts["jsonl"] for part in parts.values())


def test_the_same_inputs_and_seed_give_the_same_bytes(tmp_path: Path, files: list[Path]) -> None:
    made(tmp_path / "one", files, recipe())
    made(tmp_path / "two", files, recipe())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    other = made(tmp_path / "other", files, recipe(seed=4))
    first = read_manifest(tmp_path / "one")
    assert both(tmp_path / "other", other) != both(tmp_path / "one", first)
    for part in (False, True):
        found = [
            sorted(documents_in(tmp_path / name, m, held_out=part)) for name, m in (("one", first), ("other", other))
        ]
        assert found[0] == found[1], "which documents are held out does not depend on the seed"


def test_documents_come_in_another_order_than_in_the_sources(tmp_path: Path, files: list[Path]) -> None:
    manifest = made(tmp_path / "out", files, recipe())
    numbers = [int(text.split()[1]) for text in documents_in(tmp_path / "out", manifest, held_out=False)]
    following = sum(after == before + 1 for before, after in pairwise(numbers))
    assert following < len(numbers) / 4
    # Both large files are seen early: blocks are drawn from all sources.
    early = numbers[: len(numbers) // 3]
    assert min(early) < 70 <= max(early)


def test_copies_of_a_document_are_all_on_one_side(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 3)
    manifest = made(tmp_path / "out", [path], recipe())
    training, held = (documents_in(tmp_path / "out", manifest, held_out=part) for part in (False, True))
    assert set(training).isdisjoint(held)
    assert sorted(training + held) == sorted(DOCUMENTS * 3)


def test_a_larger_share_holds_out_what_a_smaller_one_does() -> None:
    many = texts(2_000)
    held = {share: {text for text in many if held_out(text, share)} for share in (0.01, 0.1, 0.4)}
    assert held[0.01] < held[0.1] < held[0.4]
    for share, found in held.items():
        assert abs(len(found) / 2_000 - share) < 4 * (share / 2_000) ** 0.5


@pytest.mark.parametrize("sequence", [1, 7, 32, 100])
def test_a_corpus_trains_on_training_documents_only(tmp_path: Path, files: list[Path], sequence: int) -> None:
    out = tmp_path / "out"
    manifest = made(out, files, recipe(shard_tokens=1_500, held_out=0.3))
    corpus = Corpus.open(
        out,
        manifest.entries,
        seed=1,
        batch=1,
        tokens=sequence,
        vocab=300,
        held_out=manifest.held_out_share(sequence),
    )
    border = sum((shard.tokens - 1) // sequence for shard in manifest.shards if not shard.held_out)
    assert corpus.training_windows == border

    def windows(part: bool) -> set[tuple[int, ...]]:
        found = set()
        for shard in manifest.shards:
            if shard.held_out is part:
                ids = np.fromfile(out / shard.name, dtype="<u2")
                for start in range(0, len(ids) - sequence, sequence):
                    found.add(tuple(ids[start : start + sequence + 1].tolist()))
        return found

    seen = {tuple(corpus.sample(number)[0].tolist()) for number in range(2 * corpus.training_windows)}
    assert seen == windows(part=False)
    checked = {tuple(corpus.validation_sample(k)[0].tolist()) for k in range(corpus.validation_samples)}
    assert checked <= windows(part=True)
    assert corpus.validation_samples == sum((s.tokens - 1) // sequence for s in manifest.shards if s.held_out) - 1
    assert torch.equal(corpus.sample(0), corpus.sample(corpus.training_windows)) == (corpus.training_windows == 1)


def test_parts_too_small_for_the_sequence_are_refused(tmp_path: Path, files: list[Path]) -> None:
    manifest = made(tmp_path / "out", files, recipe())
    with pytest.raises(DataError, match="0 windows of 900 tokens to train on and 0 held out are too few, 1 and 2 are"):
        manifest.held_out_share(900)
    lopsided = manifest.model_copy(
        update={
            "shards": [shard.model_copy(update={"tokens": 900 if shard.held_out else 90}) for shard in manifest.shards]
        }
    )
    with pytest.raises(DataError, match="windows of 40 tokens are held out, which must be less than half"):
        lopsided.held_out_share(40)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, failure: BaseException) -> Callable[[], int]:
    """Let `failure` happen instead of effect `after` on the disk, a file that is opened to be written being emptied
    first; the number of effects asked for so far."""
    count = 0

    def guarded(effect: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal count
            count += 1
            if count > after:  # nothing works any more
                raise failure
            return effect(*arguments, **named)

        return call

    def opening(path: Path, mode: str = "r", **named: Any) -> object:  # noqa: ANN401
        if mode in ("r", "rb"):
            return read(path, mode, **named)
        if "w" in mode and count == after:
            read(path, mode).close()
        return write(path, mode, **named)

    read, write = Path.open, guarded(Path.open)
    monkeypatch.setattr(Path, "open", opening)
    monkeypatch.setattr(os, "fsync", guarded(os.fsync))
    for name in ("replace", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, guarded(getattr(Path, name)))
    return lambda: count


def effects(out: Path, files: list[Path]) -> int:
    """How many a whole preparation takes."""
    with pytest.MonkeyPatch.context() as patch:
        count = interrupt(patch, 1 << 30, Killed())
        made(out, files, recipe())
        return count()


def check_visible(out: Path, finished: dict[str, bytes]) -> None:
    """What has its name is what it will be."""
    if out.exists():
        for name, content in contents(out).items():
            if not name.startswith("."):
                assert content == finished[name], name


def test_a_killed_run_goes_on_from_anywhere_to_the_same_bytes(tmp_path: Path, files: list[Path]) -> None:
    total = effects(tmp_path / "whole", files)
    finished = contents(tmp_path / "whole")
    assert total > 100
    for after in range(0, total, 11):
        out = tmp_path / "out"
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, after, Killed())
            with pytest.raises(Killed):
                made(out, files, recipe())
        check_visible(out, finished)
        made(out, files, recipe())
        assert contents(out) == finished, after
        shutil.rmtree(out)


@pytest.mark.parametrize("every", [30, 47])
def test_a_run_that_is_killed_again_and_again_ends(tmp_path: Path, files: list[Path], every: int) -> None:
    effects(tmp_path / "whole", files)
    finished = contents(tmp_path / "whole")
    out, kills = tmp_path / "out", 0
    while not (out / MANIFEST).exists():
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, every, Killed())
            try:
                made(out, files, recipe())
            except Killed:
                kills += 1
                assert kills < 100, "each life ends before a window is kept"
        check_visible(out, finished)
    assert kills > 2
    made(out, files, recipe())
    assert contents(out) == finished


def test_work_goes_on_after_the_last_whole_window(tmp_path: Path, files: list[Path]) -> None:
    out, told = tmp_path / "out", list[Advance]()

    first = Stop(6)
    with pytest.raises(Killed):
        made(out, files, recipe(), first)
    made(out, files, recipe(), told)
    assert told[0] == first[-1]
    assert told[0].documents > 20


def test_what_lies_beyond_the_journal_is_cut_off(tmp_path: Path, files: list[Path]) -> None:
    """A power cut may leave anything behind what was flushed."""

    made(tmp_path / "whole", files, recipe())
    out = tmp_path / "out"
    with pytest.raises(Killed):
        made(out, files, recipe(), Stop(8))
    for part in out.glob(".*.bin.part"):
        part.write_bytes(part.read_bytes() + b"garbage" * 10_000)
    made(out, files, recipe())
    assert contents(out) == contents(tmp_path / "whole")


def test_a_lost_or_altered_beginning_is_named(tmp_path: Path, files: list[Path]) -> None:
    def begun(name: str) -> Path:
        with pytest.raises(Killed):
            made(tmp_path / name, files, recipe(), Stop(8))
        return tmp_path / name

    out = begun("part")
    [part] = out.glob(".training-*.part")
    size = part.stat().st_size
    part.write_bytes(part.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"part has {size - 2} of {size} bytes: delete .*part and prepare it again"):
        made(out, files, recipe())
    out = begun("shard")
    (out / "training-00000.bin").unlink()
    with pytest.raises(DataError, match=r"training-00000\.bin is gone: delete .* and prepare it again"):
        made(out, files, recipe())
    out = begun("journal")
    (out / JOURNAL).write_text("{}x")
    with pytest.raises(
        DataError, match=r"\.progress\.json: the file: Invalid JSON.*; it must be as orion data prepare"
    ):
        made(out, files, recipe())


def test_a_full_disk_leaves_nothing_half_written_and_the_work_goes_on(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "whole", files, recipe())
    finished = contents(tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt(patch, 60, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space left"):
            made(out, files, recipe())
    check_visible(out, finished)
    assert not (out / MANIFEST).exists()
    made(out, files, recipe())
    assert contents(out) == finished


def test_a_finished_folder_stays_as_it_is(tmp_path: Path, files: list[Path]) -> None:
    out = tmp_path / "out"
    manifest = made(out, files, recipe())
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert made(out, files, recipe()) == manifest
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_other_settings_or_sources_is_refused(tmp_path: Path, files: list[Path], finished: bool) -> None:
    out = tmp_path / "out"
    if finished:
        made(out, files, recipe())
    else:
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, 40, Killed())
            with pytest.raises(Killed):
                made(out, files, recipe())
        assert (out / PLAN).exists()
    before = contents(out)
    with pytest.raises(DataError, match="out was prepared with seed 3, not 4: give the same again, or another --out"):
        made(out, files, recipe(seed=4))
    with pytest.raises(DataError, match=r"was prepared from b\.jsonl .*, not c\.jsonl"):
        made(out, [files[0], files[2]], recipe())
    with pytest.raises(DataError, match="was prepared from 3 files, not 2"):
        made(out, files[:2], recipe())
    write_jsonl(files[2], DOCUMENTS[71:])
    with pytest.raises(
        DataError, match=r"was prepared from c\.jsonl \(\d+ bytes, sha256:\w+\), not c\.jsonl \(\d+ bytes"
    ):
        made(out, files, recipe())
    assert contents(out) == before


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, files: list[Path]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"--out .*out holds thesis\.txt, which is none of ours: give a new folder"):
        made(out, files, recipe())
    assert contents(out) == {"thesis.txt": b"mine"}
    (out / "thesis.txt").rename(out / TOKENIZER)
    with pytest.raises(DataError, match=r"out holds tokenizer\.json, which is none of ours: give a new folder"):
        made(out, files, recipe())
    assert contents(out) == {TOKENIZER: b"mine"}


@pytest.mark.parametrize(
    ("documents", "changes", "words"),
    [
        (
            [None, "", " \n"],
            {},
            "all 3 documents were left out, 3 empty, 0 broken and 0 too long: check --column and --from",
        ),
        (
            ["x" * 50, ""],
            {"longest": 30},
            "1 empty, 0 broken and 1 longer than 30 bytes or a shard: raise --longest, or name a",
        ),
        (DOCUMENTS[:9], {"held_out": 1e-6}, "none of 9 documents is held out at --held-out 1e-06: raise it"),
        (
            [text for text in DOCUMENTS if held_out(text, 0.4)],
            {"held_out": 0.4},
            r"none of \d+ documents is left to train on at --held-out 0.4: lower it",
        ),
    ],
)
def test_nothing_to_learn_from_leaves_nothing(
    tmp_path: Path, documents: list[str | None], changes: dict[str, object], words: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)

    def fail() -> None:
        with pytest.raises(DataError, match=words):
            made(tmp_path / "out", [path], recipe(**changes))
        assert contents(tmp_path / "out") == {}

    with pytest.MonkeyPatch.context() as patch:
        count = interrupt(patch, 1 << 30, Killed())
        fail()
        total = count()
    for after in range(0, total, 7):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, after, Killed())
            with pytest.raises(Killed):
                made(tmp_path / "out", [path], recipe(**changes))
        fail()


def test_sources_without_any_document_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"the 1 source file\(s\) hold no documents: check --from"):
        made(tmp_path / "out", [tmp_path / "a.jsonl"], recipe())
    assert not (tmp_path / "out").exists()


def test_who_is_stopped_by_a_broken_document_goes_on_without_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    path.write_text(path.read_text() + '{"text": \n')
    told: list[Advance] = []
    with pytest.raises(BrokenError, match=r"a\.jsonl, line 121: no JSON"):
        made(tmp_path / "out", [path], recipe(), told)
    done = told[-1].documents
    assert done > 20
    told.clear()
    manifest = made(tmp_path / "out", [path], recipe(), told, skip_broken=True)
    assert told[0].documents >= done - 60
    assert manifest.counts.broken == 1
    assert sorted(both(tmp_path / "out", manifest)) == sorted(DOCUMENTS)
    made(tmp_path / "whole", [path], recipe(), skip_broken=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_document_of_more_tokens_than_a_shard_is_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "0123456789" * 100])
    manifest = made(tmp_path / "out", [path], recipe())
    assert manifest.counts.too_long == 1
    assert sorted(both(tmp_path / "out", manifest)) == sorted(DOCUMENTS)


def test_wrong_bytes_in_a_finished_folder_are_named(tmp_path: Path, files: list[Path]) -> None:
    out = tmp_path / "out"
    manifest = made(out, files, recipe())
    shard = manifest.shards[0]
    path = out / shard.name
    whole = path.read_bytes()
    write_whole(path, b"\x01" + whole[1:])
    with pytest.raises(DataError, match=rf"SHA-256 \w+, expected {shard.sha256}"):
        verify(out, manifest, shard)
    write_whole(path, whole)
    verify(out, manifest, shard)
    with pytest.raises(
        DataError, match=rf"has {shard.tokens} tokens, dataset.json says {shard.tokens + 1}: restore it"
    ):
        verify(out, manifest, shard.model_copy(update={"tokens": shard.tokens + 1}))
    (out / TOKENIZER).write_bytes(tokenizer_json(mark="</s>"))
    with pytest.raises(DataError, match=rf"tokenizer.json has SHA-256 \w+, expected {tokenizer().sha256}: restore it"):
        verify_tokenizer(out, manifest)
    (out / TOKENIZER).unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        verify_tokenizer(out, manifest)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"version": 1', '"version": 2', "version: Input should be 1"),
        ('"name": "training-00000.bin"', '"name": "../x"', r"shards\.0\.name: String should match pattern"),
        ('"held_out": true', '"held_out": false', "the file: Value error, shards must be some to train on, then some"),
        ('"seed": 3', '"seed": 3, "more": 1', r"recipe\.more: Extra inputs are not permitted"),
    ],
)
def test_an_altered_manifest_is_named(tmp_path: Path, files: list[Path], old: str, new: str, words: str) -> None:
    made(tmp_path / "out", files, recipe())
    path = tmp_path / "out" / MANIFEST
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=rf"dataset\.json: {words}.*; it must be as orion data prepare wrote it"):
        read_manifest(tmp_path / "out")
    with pytest.raises(DataError, match=r"has no dataset\.json: give a folder that orion data prepare has finished"):
        read_manifest(tmp_path)
