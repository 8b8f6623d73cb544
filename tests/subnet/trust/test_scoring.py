"""Scores are their terms; silence is never better than failure; weights burn what they must, once per tempo."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subnet.swarm.record import Phase, Record
from subnet.swarm.roster import FROM_SEED, Member, Roster, Standing
from subnet.trust.scoring import EARLIEST, LATEST, History, Kept, Score, due, marks_kept, scarcity, score, weights
from subnet.trust.settlement import Paid, Settlement
from tests.subnet.trust.books import Book

ROUNDS = 3


def entry(hotkey: str, value: float, *, correctness: float = 1.0) -> Score:
    return Score(hotkey, value, correctness, 1.0, 1.0)


# -- one round ----------------------------------------------------------------------------------------------------


def test_a_score_is_the_product_of_its_terms() -> None:
    settlement = Settlement({"a": Paid(3, 2, 9), "b": Paid(3, 2, 5), "c": Paid(3, 2, 5)}, (), ())
    scores = score(
        settlement,
        forward_flops={"a": 10.0, "b": 10.0, "c": 20.0, "silent": 10.0},
        correctness={"b": 0.0},
        timeliness={"a": 1.0, "b": 1.0, "c": 2 / 3, "silent": 0.0},
        scarcity={"a": 1.1, "b": 1.0, "c": 1.0, "silent": 1.0},
    )
    assert scores["a"].flops == (3 + 2 * 2) * 10.0
    assert scores["a"].value == pytest.approx(70.0 * 1.1)
    assert scores["b"].value == 0.0
    assert scores["c"].value == pytest.approx(140.0 * 2 / 3)
    assert scores["silent"].value == 0.0


def test_honest_replicas_of_a_round_score_by_their_stage_s_work() -> None:
    book = Book()
    every = dict.fromkeys(book.hotkeys, 1.0)
    scores = score(book.settle(), forward_flops=every, correctness={}, timeliness=every, scarcity=every)
    for stage in book.roster.stages:
        assert len({scores[hotkey].value for hotkey in stage}) == 1


def test_marks_are_kept_by_record_and_evidence() -> None:
    roster = Roster.of([["a", "b"], ["c", "d"]])

    def record(phase: Phase, *, number: int = 0, root: bytes = b"r" * 32) -> Record:
        return Record(run=b"run-0001", round=number, phase=phase, root=root)

    cut = {"a": record(Phase.CUT), "b": record(Phase.CUT), "c": record(Phase.READY), "d": record(Phase.CUT)}
    have = {
        "a": record(Phase.HAVE),
        "b": record(Phase.HAVE, root=b"x" * 32),
        "c": record(Phase.HAVE),
        "d": record(Phase.READY, number=1),
    }
    marks = marks_kept(roster, cut, have, served={"a", "b", "c"})
    assert marks == {
        "a": Kept(root=True, evidence=True, bitmap=True),
        "b": Kept(root=True, evidence=True, bitmap=False),
        "c": Kept(root=False, evidence=False, bitmap=False),
        "d": Kept(root=True, evidence=False, bitmap=False),
    }
    assert [marks[name].share for name in "abcd"] == pytest.approx([1, 2 / 3, 0, 1 / 3])
    assert marks_kept(roster, {}, {}, served=())["a"].share == 0


def test_scarcity_goes_to_who_came_to_a_short_stage_only() -> None:
    rows = [
        *(Member(hotkey=f"old{i}", standing=Standing.ACTIVE, stage=0) for i in range(4)),
        Member(hotkey="founder", standing=Standing.ACTIVE, stage=1),
        Member(hotkey="moved", standing=Standing.ACTIVE, stage=1, since=3),
        Member(hotkey="joined0", standing=Standing.ACTIVE, stage=0, since=3),
        Member(hotkey="joins", standing=Standing.JOIN, stage=1, since=4),
        Member(hotkey="waits", standing=Standing.WAIT),
    ]
    table = tuple(sorted(rows, key=lambda row: row.hotkey))
    premium = scarcity(Roster(4, table, (FROM_SEED, FROM_SEED), (0, 0)), cap=1.2)
    target = 7 / 2
    assert premium["moved"] == pytest.approx(1 + 0.2 * (1 - 2 / target))
    assert {name: value for name, value in premium.items() if name != "moved"} == dict.fromkeys(
        [f"old{i}" for i in range(4)] + ["founder", "joined0"], 1.0
    )
    assert set(scarcity(Roster.of([[], []]), cap=1.2)) == set()


@given(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=5), st.floats(1, 1.25))
def test_scarcity_is_between_one_and_its_cap(stages: list[list[int]], cap: float) -> None:
    rows = tuple(
        Member(hotkey=f"{stage:02d}{index:02d}", standing=Standing.ACTIVE, stage=stage, since=since)
        for stage, replicas in enumerate(stages)
        for index, since in enumerate(replicas)
    )
    premium = scarcity(Roster(9, rows, (FROM_SEED,) * len(stages), (0,) * len(stages)), cap=cap)
    assert set(premium) == {row.hotkey for row in rows}
    assert all(1.0 <= value <= cap for value in premium.values())


# -- history ------------------------------------------------------------------------------------------------------


def test_a_mean_is_over_the_last_rounds_and_a_newcomer_s_over_those_present() -> None:
    history = History(ROUNDS)
    for value in (100.0, 3.0, 6.0):
        history.close({"a": entry("a", value)})
    history.close({"a": entry("a", 9.0), "new": entry("new", 6.0)})
    assert history.mean("a").value == pytest.approx(6.0)
    assert history.mean("a").rounds == ROUNDS
    assert history.mean("new").value == pytest.approx(6.0)
    assert history.mean("new").rounds == 1
    assert history.mean("nobody").rounds == 0
    assert history.shares() == pytest.approx({"a": 0.5, "new": 0.5})


def test_who_was_seen_once_is_no_newcomer_again() -> None:
    history = History(ROUNDS)
    history.close({"a": entry("a", 6.0), "b": entry("b", 6.0)})
    for _ in range(5):
        history.close({"a": entry("a", 6.0)})
    history.close({"a": entry("a", 6.0), "b": entry("b", 6.0)})
    assert history.mean("b").value == pytest.approx(6.0 / ROUNDS)


def test_a_conviction_zeroes_what_was_and_as_many_rounds_as_a_mean_is_taken_over() -> None:
    history = History(ROUNDS)
    everybody = {name: entry(name, 6.0) for name in ("cheat", "honest")}
    for _ in range(4):
        history.close(everybody)
    assert not history.barred("cheat")
    counted = history.close(everybody, convicted=["cheat"])
    assert counted["cheat"].correctness == 0.0
    assert history.shares() == {"honest": 1.0}
    for left in reversed(range(ROUNDS)):
        assert history.barred("cheat") == (left > 0)
        history.close(everybody)
        assert (history.shares().get("cheat", 0.0) > 0) == (left == 0)
    assert history.mean("cheat").value == pytest.approx(6.0 / ROUNDS)


def test_a_conviction_of_one_who_is_in_no_roster_counts_when_it_is_back() -> None:
    history = History(ROUNDS)
    history.close({"a": entry("a", 1.0)}, convicted=["cheat"])
    history.close({"a": entry("a", 1.0), "cheat": entry("cheat", 1.0)})
    assert history.shares() == {"a": 1.0}


def test_nobody_has_a_share_of_nothing() -> None:
    history = History(ROUNDS)
    assert history.shares() == {}
    history.close({"a": entry("a", 0.0)})
    assert history.shares() == {}


HONEST, FAILED, CONVICTED, WITHHELD, SILENT, AWAY = "honest", "failed", "convicted", "withheld", "silent", "away"
DEEDS = st.sampled_from([HONEST, FAILED, CONVICTED, WITHHELD, SILENT, AWAY])


def play(deeds: list[str], values: list[float]) -> float:
    """The share of one miner after it did this, beside one that is always honest.

    A failed audit that does not convict makes the round incorrect; who withholds what was asked for is treated as
    convicted; who is silent in a round has no root; who is away is not even in its roster.
    """
    history = History(ROUNDS)
    for deed, value in zip(deeds, values, strict=True):
        scores = {"other": entry("other", 1.0)}
        if deed != AWAY:
            claimed = 0.0 if deed in (SILENT, WITHHELD) else value
            scores["one"] = entry("one", claimed, correctness=0.0 if deed in (FAILED, CONVICTED) else 1.0)
        history.close(scores, convicted=["one"] if deed in (CONVICTED, WITHHELD) else [])
    return history.shares().get("one", 0.0)


@given(st.lists(st.tuples(DEEDS, st.floats(0, 10)), min_size=1, max_size=10), st.data())
def test_silence_is_never_better_than_failure(rounds: list[tuple[str, float]], data: st.DataObject) -> None:
    deeds, values = [deed for deed, _ in rounds], [value for _, value in rounds]
    at = data.draw(st.integers(0, len(deeds) - 1))

    def with_deed(deed: str) -> float:
        return play([*deeds[:at], deed, *deeds[at + 1 :]], values)

    was_there_before = any(deed != AWAY for deed in deeds[:at])
    assert with_deed(SILENT) <= with_deed(FAILED) <= with_deed(HONEST)
    assert with_deed(WITHHELD) <= with_deed(CONVICTED) <= with_deed(FAILED)
    if was_there_before:
        assert with_deed(AWAY) <= with_deed(FAILED)


# -- weights ------------------------------------------------------------------------------------------------------

UIDS = {"a": 3, "b": 5, "owner": 0}


def test_the_owner_s_uid_gets_the_burn_and_the_miners_the_rest() -> None:
    assert weights({"a": 0.25, "b": 0.75}, uids=UIDS, burn=0.2, owner="owner") == pytest.approx(
        {3: 0.2, 5: 0.6, 0: 0.2}
    )
    assert weights({"a": 0.25, "b": 0.75}, uids=UIDS, burn=0.0, owner="owner") == pytest.approx({3: 0.25, 5: 0.75})
    assert weights({"a": 0.5, "owner": 0.5}, uids=UIDS, burn=0.2, owner="owner") == pytest.approx({3: 0.4, 0: 0.6})


def test_with_nobody_eligible_everything_is_burned() -> None:
    assert weights({}, uids=UIDS, burn=0.0, owner="owner") == {0: 1.0}
    assert weights({"gone": 1.0}, uids=UIDS, burn=0.3, owner="owner") == {0: 1.0}


def test_without_an_owner_s_uid_nothing_is_burned() -> None:
    uids = {"a": 3, "b": 5}
    assert weights({"a": 0.5, "b": 0.5}, uids=uids, burn=0.5, owner="owner") == pytest.approx({3: 0.5, 5: 0.5})
    assert weights({}, uids=uids, burn=0.5, owner="owner") == {}


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1e-6, 1)),
    st.dictionaries(st.sampled_from([*"abcdefgh", "owner"]), st.integers(0, 255)),
    st.floats(0, 0.99),
)
def test_weights_sum_to_one_or_there_are_none(shares: dict[str, float], uids: dict[str, int], burn: float) -> None:
    uids = {hotkey: uid for uid, hotkey in {uid: hotkey for hotkey, uid in uids.items()}.items()}
    result = weights(shares, uids=uids, burn=burn, owner="owner")
    assert all(value > 0 for value in result.values())
    if result:
        assert sum(result.values()) == pytest.approx(1.0)
    else:
        assert "owner" not in uids
        assert not set(shares) & set(uids)


@given(
    st.integers(31, 720),
    st.integers(0, 100_000),
    st.integers(1, 720),
    st.one_of(st.none(), st.integers(0, 1000)),
)
def test_weights_are_set_once_per_tempo_and_early_enough(tempo: int, now: int, ahead: int, ago: int | None) -> None:
    epoch = now + min(ahead, tempo)
    last = None if ago is None else now - ago
    block = due(now, epoch=epoch, tempo=tempo, last=last)
    assert block >= now
    if last is not None and last > epoch - tempo:
        assert block > epoch
        assert LATEST <= epoch + tempo - block <= EARLIEST
    elif now <= epoch - LATEST:
        assert LATEST <= epoch - block <= EARLIEST
    else:
        assert block == now, "late is better than not at all"


def test_a_tempo_without_room_asks_for_weights_at_once() -> None:
    assert due(77, epoch=80, tempo=10, last=76) == 77
