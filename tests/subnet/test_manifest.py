"""A manifest is its bytes; what is wrong with one is said in one line."""

from pathlib import Path

import pytest

from subnet.manifest import Announcement, ManifestError, check_announced, load_manifest
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
        ("outer_momentum = 0.0", "outer_momentum = 0.9", "set it to 0 or choose codec int8"),
        ("heads = 4", "heads = 5", "not a multiple of heads"),
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
