"""Logs are followed line by line, whatever a writer has got to, and each event is told once."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurons.telemetry import NodeFinished, NodeStarted
from scripts.dashboard import feed as feeding
from scripts.dashboard.errors import DashboardError
from scripts.dashboard.feed import Feed, Teller, check_run
from scripts.tally import LogFollower
from tests.scripts.dashboard.recording import BEGIN, TOKENS, small, write


def test_a_log_that_appears_later_and_half_a_line_are_followed(tmp_path: Path) -> None:
    follower = LogFollower(tmp_path / "events")
    assert not list(follower.read())
    write(tmp_path, [(1.0, "a", NodeFinished(1))])
    assert [name for name, _ in follower.read()] == ["a"]
    write(tmp_path, [(2.0, "b", NodeFinished(1))])
    line = (tmp_path / "events" / "b.jsonl").read_bytes()
    with (tmp_path / "events" / "a.jsonl").open("ab") as stream:
        stream.write(line[:9])
        stream.flush()
        assert [name for name, _ in follower.read()] == ["b"]
        stream.write(line[9:])
    assert [name for name, _ in follower.read()] == ["a"]
    assert follower.torn == 0


def test_what_is_not_taken_comes_at_the_next_look(tmp_path: Path) -> None:
    write(tmp_path, [(float(second), name, NodeFinished(second)) for second in range(4) for name in "ab"])
    follower = LogFollower(tmp_path / "events")
    first = follower.read()
    taken = [next(first), next(first), next(first)]
    first.close()
    whole = [*taken, *follower.read()]
    assert [stamped.time - BEGIN for _, stamped in whole] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({(name, stamped.time) for name, stamped in whole}) == 8


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(0, 2000), max_size=8))
def test_a_log_written_in_any_pieces_tells_the_same(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    folder = tmp_path_factory.mktemp("log")
    write(folder, [(float(second), "a", NodeStarted(f"é{second}", "miner", "x")) for second in range(12)])
    whole = (folder / "events" / "a.jsonl").read_bytes()
    (folder / "pieces").mkdir()
    follower = LogFollower(folder / "pieces")
    told = []
    places = sorted({0, *(cut for cut in cuts if cut < len(whole)), len(whole)})
    for begin, end in pairwise(places):
        with (folder / "pieces" / "a.jsonl").open("ab") as stream:
            stream.write(whole[begin:end])
        told += list(follower.read())
    assert told == list(LogFollower(folder / "events").read())
    assert follower.torn == 0


async def test_a_feed_waits_for_its_run_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "LOOK", 0.01)
    feed = Feed(tmp_path / "not-there-yet")
    await feed.first()
    assert b'"status":"waiting"' in feed.frame.sections["run"]
    following = asyncio.create_task(feed.follow())
    try:
        frame = feed.frame
        write(tmp_path / "not-there-yet", small())
        while b'"status":"finished"' not in frame.sections["run"]:
            frame = await feed.after(frame)
        assert b'"tokens":%d,' % (20 * TOKENS) in frame.sections["totals"]
        path = tmp_path / "not-there-yet" / "events" / "later.jsonl"
        path.write_text('{"t":1,"kind":"gossip"}\n')
        while not frame.problem:
            frame = await feed.after(frame)
        assert "another version" in frame.problem
        await following  # nothing more can be read
    finally:
        following.cancel()


async def test_much_is_shown_as_it_is_read(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "AT_ONCE", 10)
    feed = Feed(recorded)
    await feed.first()
    assert b'"tokens":0,' in feed.frame.sections["totals"]
    following = asyncio.create_task(feed.follow())
    frames = [feed.frame]
    while b'"status":"finished"' not in frames[-1].sections["run"]:
        frames.append(await feed.after(frames[-1]))
    following.cancel()
    assert len(frames) == -(-len(small()) // 10)


def test_a_story_told_to_a_moment_goes_on_from_there(recorded: Path) -> None:
    teller = Teller(recorded)
    teller.tell(BEGIN + 10.0)
    assert teller.story.tally.completed == 7
    teller.tell(BEGIN + 10.5)
    assert teller.story.tally.completed == 7
    teller.tell()
    assert teller.story.tally.completed == 20
    whole = Teller(recorded)
    whole.tell()
    assert whole.frame() == teller.frame()


@pytest.mark.parametrize(("make", "says"), [(False, "is no folder"), (True, "neither")])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, make: bool, says: str) -> None:
    folder = tmp_path / "x"
    if make:
        folder.mkdir()
    with pytest.raises(DashboardError, match=says):
        check_run(folder)


def test_a_manifest_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.toml").write_text("[run]\nname = 'x'\n[data]\nbatch = 0\nsequence = 1\n[round]\ncount = 1\n")
    with pytest.raises(DashboardError, match=r"data\.batch"):
        Teller(tmp_path).tell()
    (tmp_path / "manifest.toml").write_text("= no toml")
    with pytest.raises(DashboardError, match="no TOML"):
        Teller(tmp_path).tell()
