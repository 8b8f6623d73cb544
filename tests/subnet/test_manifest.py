"""A manifest is its bytes; what is wrong with one is said in one line."""

import re
from pathlib import Path
from typing import Literal

import pytest

from subnet.manifest import (
    RECORD_BYTES,
    Announcement,
    Manifest,
    ManifestError,
    MergeSection,
    RoundSection,
    check_announced,
    check_space,
    load_manifest,
    space_per_epoch,
)
from subnet.swarm.record import Phase, Record
from tests.neurons.swarm import manifest, tiny, tokens_file


def written(tmp_path: Path) -> Path:
    manifest(tiny(), tokens_file(tmp_path), stages=2).write(tmp_path / "manifest.toml")
    return tmp_path / "manifest.toml"


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    path = written(tmp_path)
    loaded = load_manifest(path)
    assert loaded.manifest == manifest(tiny(), tokens_file(tmp_path), stages=2)
    assert loaded.manifest.model.config() == tiny()
    assert len(loaded.digest) == 32
    assert loaded.run_id == loaded.digest[:8]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("stages = 2", "stages = 40", "swarm.stages 40 is more than model.layers 4"),
        ("sequence = 32", "sequence = 64", "data.sequence 64 is longer than model.context 32"),
        ("close = 11", "close = 99", "deadlines must rise"),
        ("length = 14", "length = 10", "round.close 11 is after round.length 10"),
        ("merge = 14", "merge = 25", "round.merge 25 is not before the next round's close, 25"),
        ('codec = "bf16"', 'codec = "zip"', "merge.codec"),
        ('codec = "bf16"\ndecay = 0.95', 'codec = "topk2bit"\ndecay = 0', "merge.decay"),
        ("replicas = 1", "replicas = 18", "codec bf16 takes 17 per stage"),
        ("outer_momentum = 0.0", "outer_momentum = 0.9", "set it to 0 or choose codec int8"),
        ("heads = 4", "heads = 5", "not a multiple of heads"),
        ('kind = "adamw"', 'kind = "sgd"', "optimizer.kind"),
        ('schedule = "constant"', 'schedule = "step"', "optimizer.schedule"),
        ('schedule = "constant"', 'schedule = "cosine"', "optimizer.steps is 0"),
        ("cooldown = 0.2", "cooldown = 0", "optimizer.cooldown"),
        ("seed = 11", "seed = 'x'", "run.seed"),
        ("[swarm]", "[swarm]\nboost = 1", "swarm.boost"),
        ("version = 1", "version = 2", "version"),
        ("version = 1", "version =", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = written(tmp_path)
    text = path.read_text()
    if "outer_momentum" in old:
        text = text.replace('codec = "bf16"', 'codec = "topk2bit"')
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ManifestError, match=words.replace("[", r"\[")) as caught:
        load_manifest(path)
    assert "\n" not in str(caught.value)


def test_announcement_is_checked(tmp_path: Path) -> None:
    loaded = load_manifest(written(tmp_path))
    announcement = Announcement(5, loaded.digest)
    assert Announcement.decode(announcement.encode()) == announcement
    assert len(announcement.encode()) <= 128
    check_announced(loaded, announcement.encode())
    for committed, words in (
        (None, "published no manifest"),
        (b"something else", "published no manifest"),
        (Announcement(5, b"x" * 32).encode(), "is not the one on chain"),
    ):
        with pytest.raises(ManifestError, match=words):
            check_announced(loaded, committed)


def rounds_of(tmp_path: Path, length: int, codec: Literal["topk2bit", "int8"], *, overlapped: bool = False) -> Manifest:
    marks = {"close": length, "cut": length + 8, "have": length + 16, "merge": length + 30}
    if not overlapped:
        marks = {name: mark - 30 for name, mark in marks.items()}
    section = RoundSection(count=0, **marks, length=length, linger=1)
    merge = MergeSection(codec=codec, decay=0.95, clip=2.0)
    return manifest(tiny(), tokens_file(tmp_path), stages=2).model_copy(update={"round": section, "merge": merge})


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("codec", ["topk2bit", "int8"])
@pytest.mark.parametrize("length", [90, 100, 110, 120])
def test_records_of_real_rounds_fit_the_chains_space(
    tmp_path: Path, length: int, codec: Literal["topk2bit", "int8"], *, overlapped: bool
) -> None:
    check_space(rounds_of(tmp_path, length, codec, overlapped=overlapped), 360, 3_100)


def test_the_space_that_records_take(tmp_path: Path) -> None:
    assert len(Record(run=bytes(8), round=0, phase=Phase.READY).encode()) <= RECORD_BYTES
    assert space_per_epoch(rounds_of(tmp_path, 90, "int8"), 360) == 4 * 668 + 236
    assert space_per_epoch(rounds_of(tmp_path, 90, "int8", overlapped=True), 360) == 3_016
    assert space_per_epoch(rounds_of(tmp_path, 90, "topk2bit"), 360) == 4 * 432 + 108
    assert space_per_epoch(rounds_of(tmp_path, 400, "topk2bit"), 20) == 432


def test_too_many_records_for_an_epoch_name_the_mark_to_change(tmp_path: Path) -> None:
    crowded = rounds_of(tmp_path, 60, "int8")
    with pytest.raises(ManifestError, match=r"rounds of 60 blocks count as up to \d+ bytes .* 360 .* 3100 ") as caught:
        check_space(crowded, 360, 3_100)
    words = re.search(r"raise round.length to (\d+)$", str(caught.value))
    assert words is not None
    longer = int(words[1])
    remedied = crowded.round.model_copy(update={"length": longer})
    check_space(crowded.model_copy(update={"round": remedied}), 360, 3_100)
    shorter = crowded.round.model_copy(update={"length": longer - 1})
    with pytest.raises(ManifestError):
        check_space(crowded.model_copy(update={"round": shorter}), 360, 3_100)
    with pytest.raises(ManifestError, match="no round is long enough"):
        check_space(crowded, 360, 600)
