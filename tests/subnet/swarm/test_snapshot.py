"""A snapshot is one roster, spelt one way; anything else is refused, and the stake says which one is in force."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from subnet.swarm import snapshot
from subnet.swarm.record import Phase, Record
from subnet.swarm.roster import Roster
from subnet.swarm.snapshot import SNAPSHOT_LIMIT, SnapshotError, agreed_digest, parse
from tests.subnet.swarm.histories import RUN, neuron, state
from tests.subnet.swarm.test_roster import ROSTER

Content = dict[str, list[list[object]]]


def test_a_snapshot_is_the_roster_it_was_made_of() -> None:
    again = parse(ROSTER.encoded)
    assert again == ROSTER
    assert again.digest == ROSTER.digest


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: c.update(round=-1), "round"),
        (lambda c: c.update(round=2**32), "round"),
        (lambda c: c.update(round="7"), "round"),
        (lambda c: c.update(extra=1), "extra"),
        (lambda c: c.pop("dark"), "dark"),
        (lambda c: c.update(dark=[0]), "1 dark counts for 2 stages"),
        (lambda c: c.update(anchors=[]), "anchors"),
        (lambda c: c.update(parent="ff"), "parent"),
        (lambda c: c["anchors"][0].__setitem__(1, "zz" * 32), "anchors.0.1"),
        (lambda c: c["table"].reverse(), "not in order"),
        (lambda c: c["table"].append(c["table"][-1]), "not in order"),
        (lambda c: c["table"][0].__setitem__(0, "a b"), "table.0.0"),
        (lambda c: c["table"][0].__setitem__(1, "boss"), "table.0.1"),
        (lambda c: c["table"][0].__setitem__(2, None), "a is active at stage None"),
        (lambda c: c["table"][0].__setitem__(2, 2), "a is active at stage 2 of 2"),
        (lambda c: c["table"][4].__setitem__(2, 1), "e is wait at stage 1"),
        (lambda c: c["table"][0].__setitem__(7, 0), "moves to stage 0"),
        (lambda c: c["table"][3].__setitem__(7, 0), "d is join and moves"),
        (lambda c: c["table"][0].append(1), "table.0"),
        (lambda c: c.update(table=[[f"n{i:03d}", "active", 0, 0, 0, 0, 0, None] for i in range(65)]), "limit is 64"),
    ],
)
def test_a_snapshot_that_cannot_be_is_refused(spoil: Callable[[Content], object], words: str) -> None:
    content = cast("Content", json.loads(ROSTER.encoded))
    spoil(content)
    with pytest.raises(SnapshotError, match=words) as caught:
        parse(json.dumps(content, separators=(",", ":")).encode())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        (ROSTER.encoded[:-1], "JSON"),
        (b" " + ROSTER.encoded, "one way"),
        (json.dumps(json.loads(ROSTER.encoded)).encode(), "one way"),
        (b" " * (SNAPSHOT_LIMIT + 1), f"limit {SNAPSHOT_LIMIT}"),
    ],
)
def test_other_bytes_are_refused(raw: bytes, words: str) -> None:
    with pytest.raises(SnapshotError, match=words):
        parse(raw)


def numbered(number: int) -> Roster:
    return dataclasses.replace(ROSTER, round=number)


def test_the_last_snapshots_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "rosters"
    for number in range(12):
        assert snapshot.write(folder, numbered(number)) == folder / f"round-{number:05d}.json"
    snapshot.write(folder, numbered(11))
    assert [roster.round for roster in snapshot.kept(folder)] == list(range(4, 12))
    assert sorted(path.name for path in folder.iterdir()) == [f"round-{number:05d}.json" for number in range(4, 12)]
    assert snapshot.read(folder / "round-00009.json") == numbered(9)


def test_a_broken_snapshot_is_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        snapshot.write(tmp_path, numbered(number))
    (tmp_path / "round-00001.json").write_bytes(numbered(1).encoded[:40])
    with caplog.at_level(logging.WARNING):
        assert snapshot.kept(tmp_path) == [numbered(0)]
    assert "round-00001.json" in caplog.text
    with pytest.raises(SnapshotError, match="cannot be read"):
        snapshot.read(tmp_path / "none.json")
    (tmp_path / "file").touch()
    with pytest.raises(SnapshotError, match="cannot be made"):
        snapshot.write(tmp_path / "file", ROSTER)
    (tmp_path / "round-00007.json").mkdir()
    with pytest.raises(SnapshotError, match="cannot be written"):
        snapshot.write(tmp_path, ROSTER)
    assert not list(tmp_path.glob(".*"))


def test_the_stake_says_which_roster_is_in_force() -> None:
    def record(digest: bytes, *, run: bytes = RUN) -> Record:
        return Record(run=run, round=7, phase=Phase.READY, roster=digest)

    ours, other = ROSTER.digest, numbered(8).digest

    def held(*stakes: tuple[float, Record]) -> bytes | None:
        voters = [neuron(i, record=said, stake=stake, permit=True) for i, (stake, said) in enumerate(stakes)]
        loud = neuron(len(voters), record=record(other), stake=1e9)
        now = state([*voters, loud])
        return agreed_digest(now, RUN)

    assert held((67.0, record(ours)), (33.0, record(other))) == ours
    assert held((2.0, record(ours)), (1.0, record(other))) is None  # two thirds are not more than two thirds
    assert held((67.0, record(ours)), (34.0, record(ours, run=b"run-0002"))) is None
    assert held((1.0, record(bytes(15)))) is None
    assert held() is None
