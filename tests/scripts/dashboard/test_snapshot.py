"""What the page shows of a small recorded run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neurons.telemetry import Merged, MicrobatchDone, MicrobatchStarted, NodeStarted, StateChanged
from scripts.dashboard.facts import read_facts
from scripts.dashboard.feed import Teller
from scripts.dashboard.snapshot import by_number, snapshot
from scripts.dashboard.state import State, joined, sections
from tests.scripts.dashboard.recording import BEGIN, MARKUP, TOKENS, hotkey, small, write


def shown(run: Path, until: float | None = None) -> State:
    teller = Teller(run)
    teller.tell(until)
    return snapshot(teller.story, read_facts(run), folder="small-run")


def test_the_run_and_its_figures(recorded: Path) -> None:
    state = shown(recorded)
    assert (state.run.name, state.run.status, state.run.round, state.run.rounds) == ("small", "finished", 0, 1)
    assert (state.run.begin, state.run.end) == (BEGIN, BEGIN + 37.0)
    totals = state.totals
    assert (totals.tokens, totals.microbatches, totals.lost, totals.in_flight) == (20 * TOKENS, 20, 1, 0)
    assert totals.tokens_per_second == pytest.approx(20 * TOKENS / (30.0 - 3.5))
    assert (totals.validation, totals.validation_round) == (5.25, 1)
    assert (totals.audits_passed, totals.audits_failed, totals.convicted) == (2, 1, 1)
    assert (totals.killed, totals.gradients_lost) == (1, 9)


def test_the_grid_says_who_is_where_and_how(recorded: Path) -> None:
    state = shown(recorded)
    assert [(stage.role, [miner.name for miner in stage.miners]) for stage in state.grid.stages] == [
        ("head", ["miner-0", "miner-1"]),
        ("tail", ["miner-2", "miner-3"]),
    ]
    good, _, dead, cheat = [miner for stage in state.grid.stages for miner in stage.miners]
    assert (good.uid, good.state, good.steps, good.units, good.passed, good.weight) == (1, "merged", 10, 10, 2, 1.0)
    assert good.merge is not None
    assert good.merge.included
    assert good.sentence is None
    assert (dead.state, dead.merge) == ("dead", None)
    assert cheat.plays == "sign-flip"
    assert cheat.sentence is not None
    assert (cheat.sentence.until, cheat.sentence.in_force, cheat.sentence.reason) == (3, True, MARKUP)
    assert (cheat.failed, cheat.score, cheat.weight) == (1, 0.0, 0.0)
    (validator,) = state.grid.validators
    assert (validator.state, validator.units, validator.bytes, validator.convictions) == ("done", 3, 4000, 1)


def test_curves_lie_over_the_tokens_that_had_been_trained(recorded: Path) -> None:
    curves = shown(recorded).curves
    assert curves.loss_done == list(range(1, 21))
    assert curves.loss[0] == 7.0
    assert curves.loss_time[-1] == BEGIN + 23.0
    assert (curves.validation_round, curves.validation_done, curves.validation) == ([0, 1], [0, 20], [7.0, 5.25])
    assert curves.validation_time == [BEGIN + 2.0, BEGIN + 36.0]
    assert sum(rate * curves.rate_seconds for rate in curves.rate) == pytest.approx(20 * TOKENS)


def test_rounds_merges_scores_and_weights(recorded: Path) -> None:
    state = shown(recorded)
    after, first = state.rounds.rounds
    assert (after.number, after.validation, after.merges) == (1, 5.25, [])
    assert (first.block, first.done, first.in_flight, first.closed) == (10, 20, 1, True)
    head, tail = first.merges
    assert (head.stage, head.reported, head.included, head.bytes, head.seconds, head.identical) == (
        0,
        2,
        2,
        3000,
        4.5,
        True,
    )
    assert (tail.stage, tail.reported) == (1, 1)
    (verdict,) = state.audits.verdicts
    assert (verdict.miner, verdict.validators, verdict.until, verdict.reasons) == (
        "miner-3",
        ["validator-0"],
        3,
        [MARKUP],
    )
    (failed,) = state.audits.failed
    assert (failed.miner, failed.check, failed.error, failed.sample) == ("miner-3", "backward", 2.0, 5)
    assert [(score.miner, score.correctness, score.unpaid) for score in state.scores.scores] == [
        ("miner-0", 1.0, {"no receipt": 2}),
        ("miner-3", 0.0, {"no receipt": 2}),
    ]
    assert [(row.uid, row.miner, row.weights, row.convicted) for row in state.weights.rows] == [
        (1, "miner-0", [1.0], False),
        (4, "miner-3", [0.0], True),
    ]


def test_the_log_tells_churn_and_verdicts_by_name(recorded: Path) -> None:
    notes = [(note.topic, note.weight, note.node, note.text) for note in shown(recorded).log.notes]
    assert ("churn", "warning", "miner-2", "was killed in round 0 (--kill miner:2@round0)") in notes
    assert ("trust", "alarm", "validator-0", f"convicts miner-3 in round 0 until round 3: {MARKUP}") in notes
    assert ("trust", "warning", "miner-3", "cheats from round 0 on, as asked (--adversary sign-flip)") in notes
    assert sum("round 0 begins" in text for *_, text in notes) == 1


def test_an_earlier_moment_knows_nothing_of_later(recorded: Path) -> None:
    state = shown(recorded, BEGIN + 20.0)
    assert state.run.status == "running"
    assert (state.totals.microbatches, state.totals.in_flight, state.totals.convicted) == (17, 1, 0)
    assert not state.weights.rows
    assert state.grid.stages[1].miners[0].state == "dead"


def test_replicas_that_differ_and_a_void_round_are_seen(tmp_path: Path) -> None:
    merged = {"round": 0, "stage": 0, "sources": 1, "seconds": 1.0, "carried": 7, "received": 5}
    write(
        tmp_path,
        [
            (0.0, "a", Merged(**merged, included=True, void=False, weights="x")),
            (0.0, "b", Merged(**merged, included=False, void=True, weights="y")),
        ],
    )
    (merge,) = shown(tmp_path).rounds.rounds[0].merges
    assert (merge.identical, merge.void, merge.included, merge.reported) == (False, True, 1, 2)


def test_without_a_manifest_tokens_are_not_guessed(tmp_path: Path) -> None:
    events = [
        (0.0, "a", NodeStarted(hotkey("a"), "miner", "x")),
        (0.0, "a", MicrobatchStarted(0, 1)),
        (9.0, "a", MicrobatchDone(0, 1, float("nan"), 1.0, 1)),
        (9.5, "a", StateChanged(1, "benched", 0, "fresh but dead")),
    ]
    write(tmp_path, events, manifest=False)
    state = shown(tmp_path)
    assert (state.totals.tokens, state.totals.tokens_per_second, state.totals.microbatches) == (None, None, 1)
    assert state.curves.tokens_per_microbatch is None
    assert [miner.state for miner in state.grid.away] == ["benched"]
    assert state.run.name == "small-run"
    assert json.loads(joined(sections(state)))["totals"]["loss"] is None  # browsers know no NaN


def test_a_validators_own_folder_shows_the_miners_it_speaks_of(tmp_path: Path) -> None:
    write(tmp_path, [event for event in small() if event[1] == "validator-0"])
    state = shown(tmp_path)
    assert [[(miner.name, miner.state) for miner in stage.miners] for stage in state.grid.stages] == [
        [("5miner-0…", "unseen")],
        [("5miner-3…", "unseen")],
    ]
    (cheat,) = state.grid.stages[1].miners
    assert cheat.sentence is not None
    assert (cheat.uid, cheat.failed, cheat.weight) == (4, 1, 0.0)
    assert [score.miner for score in state.scores.scores] == ["5miner-0…", "5miner-3…"]


def test_names_are_ordered_as_people_count() -> None:
    assert sorted(["miner-10", "miner-2", "validator-0", "x"], key=by_number) == [
        "miner-2",
        "miner-10",
        "validator-0",
        "x",
    ]
