"""What the view shows and the summary says is folded from events alone."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from neurons.telemetry import (
    LocalStep,
    Merged,
    MicrobatchDone,
    MicrobatchStarted,
    NodeStarted,
    RoundStarted,
    Stamped,
    Telemetry,
    TrainingClosed,
    Validated,
    WeightsSet,
    read_events,
)
from scripts.faults import Fault, FaultError, FaultPlan
from scripts.live import View
from scripts.tally import LogFollower, Tally, summary


def closed(number: int, *, stage: int = 0) -> TrainingClosed:
    return TrainingClosed(
        round=number,
        stage=stage,
        started=3,
        completed=2,
        rerouted=1,
        adopted=1,
        chased=0,
        lost=1,
        units=2,
        busy_seconds=1.0,
    )


def story() -> list[tuple[str, Stamped]]:
    """A head's round: three microbatches leave, two come back; then a merge."""
    events = [
        (0.0, NodeStarted(hotkey="hot", role="miner", endpoint="http://x:1")),
        (1.0, RoundStarted(round=0, block=5, stage=0, replicas=[2, 2], roster="aa")),
        *((1.0, MicrobatchStarted(round=0, sample=sample)) for sample in (0, 2, 4)),
        (2.0, LocalStep(round=0, stage=0, version=1, units=2, grad_norm=1.0, lr=0.1, finite=True)),
        (3.0, MicrobatchDone(round=0, sample=0, loss=2.0, seconds=1.0, depth=4)),
        (4.0, MicrobatchDone(round=0, sample=4, loss=1.0, seconds=1.0, depth=4)),
    ]
    return [("miner-0", Stamped(time, event)) for time, event in events]


def told(*more: object) -> Tally:
    tally = Tally(1000)
    for name, stamped in [*story(), *(("miner-0", Stamped(6.0, event)) for event in more)]:
        tally.add(name, stamped)
    return tally


def content(tally: Tally) -> dict[str, object]:
    return summary(
        tally,
        model="nano",
        parameters=7,
        stages=2,
        replicas=1,
        rounds=1,
        started_at=0.5,
        wall_seconds=9.0,
        chain={"blocks": 1, "weights": {}, "incentive": {}},
    )


def test_what_is_in_flight_is_lost_only_once_its_round_has_closed() -> None:
    assert told().lost == 0
    assert told(closed(0, stage=1)).lost == 0
    tally = told(closed(0))
    assert (tally.started, tally.completed, tally.lost) == (3, 2, 1)
    assert content(tally)["microbatches"]["lost"] == 1
    assert content(tally)["seconds_to_first_step"] == 1.5


def test_a_killed_miner_s_unmerged_units_are_its_own_loss() -> None:
    tally = told()
    tally.died("miner-0")
    assert content(tally)["microbatches"]["gradients_lost"] == 2
    merged = Merged(round=0, stage=0, sources=1, included=True, void=False, weights="d", seconds=1.0)
    tally = told(closed(0), merged)
    tally.died("miner-0")
    assert content(tally)["microbatches"]["gradients_lost"] == 0


def test_replicas_are_identical_if_all_report_one_digest() -> None:
    def merged(digest: str) -> Merged:
        return Merged(round=0, stage=0, sources=2, included=True, void=False, weights=digest, seconds=1.0)

    assert content(told())["replicas_identical"] is None
    assert content(told(merged("a"), merged("a")))["replicas_identical"] is True
    assert content(told(merged("a"), merged("b")))["replicas_identical"] is False


def test_events_survive_the_log_and_half_lines_wait(tmp_path: Path) -> None:
    telemetry = Telemetry.open(tmp_path / "node.jsonl", now=lambda: 12.5)
    telemetry.emit(WeightsSet(round=1, block=9, weights={3: 0.25}))
    telemetry.emit(Validated(round=1, loss=2.5, tokens=10))
    telemetry.close()
    lines = (tmp_path / "node.jsonl").read_text().splitlines()
    assert [stamped.event for stamped in read_events(lines)] == [
        WeightsSet(round=1, block=9, weights={3: 0.25}),
        Validated(round=1, loss=2.5, tokens=10),
    ]
    follower = LogFollower(tmp_path)
    assert len(list(follower.read())) == 2
    with (tmp_path / "node.jsonl").open("a") as stream:
        stream.write(lines[0][:20])
        stream.flush()
        assert not list(follower.read())
        stream.write(lines[0][20:] + "\n")
    assert len(list(follower.read())) == 1
    with pytest.raises(ValueError, match="unknown"):
        list(read_events(['{"t":1,"kind":"gossip"}']))


@pytest.mark.parametrize("plain", [True, False])
def test_both_views_show_loss_and_news(plain: bool) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=not plain, width=100, markup=False)
    with View(console, title="t", stages=2, plain=plain) as view:
        view.say("[/red] is no markup")
        view.show(told(Validated(round=0, loss=3.25, tokens=10)), elapsed=10.0)
    assert "validation loss 3.250" in output.getvalue()
    assert "[/red] is no markup" in output.getvalue()
    assert "1.500" in output.getvalue()


def test_faults_come_in_the_middle_of_their_round_and_once() -> None:
    plan = FaultPlan([Fault.parse("miner:3@round0"), Fault.parse("stage:0@round0")], round_seconds=10.0)
    tally = told()
    assert plan.due(tally, now=100.0) == []
    assert plan.due(tally, now=104.5) == ["miner-3", "miner-0"]
    assert plan.due(tally, now=109.0) == []
    for text in ("miner-3", "miner:3@1", "stage:x@round1", ""):
        with pytest.raises(FaultError, match="miner:3@round1"):
            Fault.parse(text)
