"""What the view shows and the summary says is folded from events alone."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from neurons.telemetry import (
    AuditCost,
    Checked,
    Convicted,
    Downloaded,
    Intervention,
    LocalStep,
    Merged,
    MergeFault,
    MicrobatchDone,
    MicrobatchStarted,
    NodeFinished,
    NodeStarted,
    RoundStarted,
    Stamped,
    StateChanged,
    Telemetry,
    Traffic,
    TrainingClosed,
    Validated,
    WeightsSet,
    read_events,
)
from scripts.live import View, away, grid
from scripts.summary import summary
from scripts.tally import LogFollower, Tally


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
        complete=True,
        torn=0,
    )


def test_what_is_in_flight_is_lost_only_once_its_round_has_closed() -> None:
    assert told().lost == 0
    assert told(closed(0, stage=1)).lost == 0
    tally = told(closed(0))
    assert (tally.started, tally.completed, tally.lost) == (3, 2, 1)
    assert content(tally)["microbatches"]["lost"] == 1
    assert content(tally)["seconds_to_first_step"] == 1.5


def merged(number: int = 0, *, digest: str = "d", included: bool = True, seconds: float = 1.0) -> Merged:
    return Merged(
        round=number,
        stage=0,
        sources=2,
        included=included,
        void=not included,
        weights=digest,
        seconds=seconds,
        carried=3,
        received=100,
    )


def step(number: int, units: int = 2) -> LocalStep:
    return LocalStep(round=number, stage=0, version=1, units=units, grad_norm=1.0, lr=0.1, finite=True)


def done(sample: int, *, number: int = 0, loss: float = 2.0) -> MicrobatchDone:
    return MicrobatchDone(round=number, sample=sample, loss=loss, seconds=1.0, depth=4)


KILL = Intervention("kill", "miner-0", 0, "--kill miner:0@round0")
STARTED = NodeStarted(hotkey="hot", role="miner", endpoint="http://x:1")


def test_a_killed_miner_s_unmerged_units_are_its_own_loss() -> None:
    assert told(KILL).gradients_lost == 2
    assert told(closed(0), merged(), KILL).gradients_lost == 0
    assert told(closed(0), merged(included=False), KILL).gradients_lost == 2
    # The merge of round 0 comes while round 1 trains: what round 1 has computed is still to be merged.
    assert told(closed(0), step(1, units=3), merged(), KILL).gradients_lost == 3


def test_a_second_start_is_a_restart_and_costs_what_was_not_merged_once() -> None:
    tally = told(KILL, STARTED)
    assert (tally.churn.killed, tally.churn.restarted, tally.gradients_lost) == (1, 1, 2)
    tally = told(STARTED)
    assert (tally.churn.killed, tally.churn.restarted, tally.gradients_lost) == (0, 1, 2)
    assert tally.miners["miner-0"].state == "waiting"


def test_bytes_of_all_processes_of_a_miner_count() -> None:
    tally = told(Traffic(1, 2, 3, 4), Traffic(10, 20, 30, 40), STARTED, Traffic(1, 1, 1, 1))
    assert content(tally)["bytes"] == {"forward": 11, "backward": 21, "merge": 31}


def test_what_merges_cost_and_found() -> None:
    fault = MergeFault(round=0, stage=0, hotkey="other", fault="liar", reason="shard 3")
    tally = told(closed(0), merged(0, seconds=2.0), STARTED, merged(1), fault, fault)
    row = content(tally)["miners"][0]
    assert (row["merges"], row["merge_seconds"], row["merge_bytes"], row["merge_carried"]) == (2, 1.5, 200, 6)
    assert [item["hotkey"] for item in content(tally)["merge_faults"]] == ["other"]


def checked(check: str, *, passed: bool, accuser: str = "") -> Checked:
    return Checked(
        round=0,
        hotkey="hot",
        stage=0,
        check=check,
        grade="measurement",
        passed=passed,
        error=0.0,
        tolerance=0.02,
        version=0,
        sample=0,
        piece=None,
        reason="",
        accuser=accuser,
    )


def test_what_audits_cost_and_whom_they_convict() -> None:
    def cost(number: int, swarm: float) -> AuditCost:
        return AuditCost(round=number, units=4, flops=30.0, swarm_flops=swarm, bytes=500)

    tally = told(
        checked("forward", passed=True),
        checked("backward", passed=False),
        checked("forward", passed=False, accuser="another validator"),
        checked("weights", passed=True),
        Traffic(forward=6000, backward=3000, merge=1000, evidence=0),
        Convicted(round=1, hotkey="hot", until=4, reason="forward: off"),
        cost(0, 1000.0),
    )
    tally.add("validator-1", Stamped(7.0, cost(0, 900.0)))
    tally.add("validator-1", Stamped(8.0, cost(1, 2000.0)))
    audits = content(tally)["audits"]
    assert isinstance(audits, dict)
    assert (audits["units"], audits["passed"], audits["failed"]) == (2, 1, 1)
    assert audits["flops_share"] == pytest.approx(90 / 3000)
    assert audits["bytes_share"] == pytest.approx(0.15)
    assert audits["convictions"] == [
        {"validator": "miner-0", "round": 1, "hotkey": "hot", "until": 4, "reason": "forward: off"}
    ]
    none = content(told())["audits"]
    assert isinstance(none, dict)
    assert (none["flops_share"], none["bytes_share"], none["convictions"]) == (None, None, [])


def test_a_microbatch_counts_once_whoever_completes_it() -> None:
    again = [MicrobatchStarted(round=0, sample=2), done(2), done(2), done(0)]
    tally = told(*again)
    assert (tally.started, tally.completed, tally.tokens) == (3, 3, 3000)
    result = content(tally)
    assert result["microbatches"]["lost"] == 0
    # A start whose line was torn off: a microbatch that came back had left.
    assert (told(done(9)).started, told(done(9)).completed) == (4, 3)
    # The same sample id in another round is another microbatch.
    assert told(MicrobatchStarted(round=1, sample=0)).started == 4


def test_what_never_came_back_is_lost_at_the_end() -> None:
    tally = told(MicrobatchStarted(round=1, sample=7), closed(0))
    assert tally.lost == 1
    result = content(tally)
    assert result["microbatches"]["lost"] == 2 == sum(row["lost"] for row in result["by_round"])
    assert result["by_round"][0] == {
        "round": 0,
        "started": 3,
        "completed": 2,
        "lost": 1,
        "loss": 1.5,
        "validation": None,
    }


def test_recovery_is_measured_on_what_was_in_flight() -> None:
    events = [
        (6.0, MicrobatchStarted(round=0, sample=6)),
        (6.0, KILL),
        (6.5, MicrobatchStarted(round=0, sample=8)),
        (7.0, done(8)),
        (9.5, done(2)),
        (10.0, done(6)),
        (20.0, done(10)),
    ]
    tally = told()
    for time, event in events:
        tally.add("miner-1" if event is not KILL else "localnet", Stamped(time, event))
    recovery = content(tally)["recovery"]
    assert (recovery["seconds"], recovery["longest_gap"]) == (4.0, 2.5)
    assert recovery["faults"] == [
        {"node": "miner-0", "round": 0, "in_flight": 2, "first": 3.5, "last": 4.0, "longest_gap": 2.5}
    ]


def test_the_share_of_merge_time_that_training_hides() -> None:
    def at(*story: tuple[float, object]) -> object:
        tally = Tally(1000)
        for time, event in story:
            tally.add("miner-0", Stamped(time, event))
        return content(tally)["merge_hidden"]

    def begins(number: int) -> RoundStarted:
        return RoundStarted(round=number, block=5, stage=0, replicas=[1], roster="aa")

    overlapped = [(0.0, begins(0)), (10.0, closed(0)), (11.0, begins(1)), (14.0, merged(0, seconds=4.0))]
    assert at(*overlapped, (20.0, closed(1))) == 0.75
    # The last merge has nothing to hide behind.
    assert at(*overlapped, (20.0, closed(1)), (28.0, merged(1, seconds=8.0))) == 0.75
    assert at(*overlapped) is None
    apart = [(0.0, begins(0)), (10.0, closed(0)), (14.0, merged(0, seconds=4.0)), (14.0, begins(1)), (20.0, closed(1))]
    assert at(*apart) == 0.0


def test_states_of_miners_that_come_and_go() -> None:
    def became(state: str, number: int = 3, stage: int | None = 0) -> StateChanged:
        return StateChanged(round=number, state=state, stage=stage, reason="so")

    tally = Tally(1000)
    for event in (
        STARTED,
        became("waiting", stage=None),
        became("joining"),
        Downloaded(held=3, stage=0, bytes=2_000_000, seconds=0.5, sources=2),
        became("active", 4),
        RoundStarted(round=4, block=5, stage=0, replicas=[1], roster="aa"),
        became("active", 5),
    ):
        tally.add("miner-8", Stamped(1.0, event))
    miner = tally.miners["miner-8"]
    assert (miner.state, miner.active_round, miner.downloads[0].held) == ("training", 4, 3)
    assert tally.churn.joined == 1
    for event in (became("benched"), became("benched"), became("joining"), became("active"), became("left")):
        tally.add("miner-8", Stamped(2.0, event))
    assert (tally.churn.joined, tally.churn.benched, tally.churn.left) == (1, 1, 1)
    assert miner.state == "left"
    assert any("2.0 MB from 2 source(s)" in line for line in tally.news)
    # One of the first roster that comes back after a restart has not joined.
    again = told(became("active", 0), STARTED, became("joining"), became("active"))
    assert (again.churn.joined, again.churn.restarted) == (0, 1)


def test_standing_still_is_no_time_to_be_fast_in() -> None:
    tally = told()
    before = tally.tokens_per_second
    tally.add("localnet", Stamped(104.0, Intervention("resume", "", 0, "")))
    assert tally.tokens_per_second == before == 1000.0
    tally.add("miner-0", Stamped(105.0, done(2)))
    assert tally.tokens_per_second == 3000 / 3
    assert tally.churn.resumed == 1
    assert content(tally)["seconds_dead"] == 100.0


def test_replicas_are_identical_if_all_report_one_digest() -> None:
    assert content(told())["replicas_identical"] is None
    assert content(told(merged(digest="a"), merged(digest="a")))["replicas_identical"] is True
    assert content(told(merged(digest="a"), merged(digest="b")))["replicas_identical"] is False


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
        list(read_events(['{"t":1,"v":1,"kind":"gossip"}']))


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


def test_both_views_know_who_stands_apart() -> None:
    tally = told()
    for name, state in (("miner-7", "benched"), ("miner-8", "waiting"), ("miner-9", "left")):
        tally.add(name, Stamped(1.0, STARTED))
        tally.add(name, Stamped(1.0, StateChanged(round=0, state=state, stage=1, reason="so")))
    assert away(tally).plain.split() == ["miner-7", "benched", "miner-8", "waiting", "miner-9", "left"]
    assert grid(tally, 2).row_count == 1


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "node.jsonl"
    for _ in range(2):  # the process is killed in the middle of a line, and started again
        telemetry = Telemetry.open(path, now=lambda: 12.5)
        telemetry.emit(Validated(round=1, loss=2.5, tokens=10))
        telemetry.close()
        with path.open("a") as stream:
            stream.write('{"t":13,"kind":"valid')
    follower = LogFollower(tmp_path)
    assert [stamped.event.round for _, stamped in follower.read()] == [1, 1]
    assert follower.torn == 1  # the other may still be being written
    Telemetry.open(path, now=lambda: 12.5).close()
    assert not list(follower.read())
    assert follower.torn == 2
    assert len(list(read_events(path.read_text().splitlines()))) == 2
    assert not path.read_text().splitlines().count("")
    with path.open("ab") as stream:
        stream.write(b"\0\0\0\n17\n[]\n\xff\n")  # what a power cut, or anything else, may leave
    assert not list(follower.read())
    assert follower.torn == 6


def test_events_of_all_logs_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    for name, times in (("a", (2.0, 5.0)), ("b", (1.0, 4.0))):
        clock = iter(times)
        telemetry = Telemetry.open(tmp_path / f"{name}.jsonl", now=lambda clock=clock: next(clock))
        telemetry.emit(NodeFinished(rounds=1))
        telemetry.emit(NodeFinished(rounds=2))
        telemetry.close()
    assert [(name, stamped.time) for name, stamped in LogFollower(tmp_path).read()] == [
        ("b", 1.0),
        ("a", 2.0),
        ("b", 4.0),
        ("a", 5.0),
    ]


@pytest.mark.parametrize(
    "line", ['{"t":1,"v":1,"kind":"gossip"}', '{"t":1,"v":1,"kind":"node_finished","rounds":1,"mood":2}']
)
def test_a_whole_line_of_another_version_is_no_torn_one(line: str) -> None:
    with pytest.raises(ValueError, match="another version"):
        list(read_events([line]))
