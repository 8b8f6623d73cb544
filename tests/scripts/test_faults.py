"""Faults on demand: their grammar, their moments, their targets."""

import pytest

from neurons.telemetry import Intervention, NodeStarted, RoundStarted, Stamped
from scripts.faults import Fault, FaultError, FaultPlan, Strike, check_faults, joiners, parse_faults
from scripts.tally import Tally

ROUND = 10.0


def swarm(*, number: int = 0) -> Tally:
    """Four miners: 0 and 1 at stage 0, 2 and 3 at stage 1, in round `number`."""
    tally = Tally(1000)
    for index in range(4):
        name = f"miner-{index}"
        tally.add(name, Stamped(0.0, NodeStarted(hotkey=name, role="miner", endpoint="http://x:1")))
        tally.add(
            name, Stamped(1.0, RoundStarted(round=number, block=1, stage=index // 2, replicas=[2, 2], roster="aa"))
        )
    return tally


def plan(**given: list[str]) -> FaultPlan:
    return FaultPlan(parse_faults(given), round_seconds=ROUND, first_joiner=4)


@pytest.mark.parametrize(
    ("action", "text", "fault"),
    [
        ("kill", "miner:3@round1", Fault("kill", "miner", 3, 1)),
        ("kill", "stage:0@round12+0.95", Fault("kill", "stage", 0, 12, fraction=0.95)),
        ("leave", "miner:3@round1+0", Fault("leave", "miner", 3, 1, fraction=0.0)),
        ("freeze", "miner:3@round1", Fault("freeze", "miner", 3, 1)),
        ("freeze", "miner:3@round1:2.5", Fault("freeze", "miner", 3, 1, seconds=2.5)),
        ("restart", "stage:3@round1+.5:0", Fault("restart", "stage", 3, 1, fraction=0.5, seconds=0.0)),
        ("join", "2@round2", Fault("join", "count", 2, 2)),
        ("join", "1@round2+1", Fault("join", "count", 1, 2, fraction=1.0)),
    ],
)
def test_what_can_be_said_is_read_back(action: str, text: str, fault: Fault) -> None:
    assert Fault.parse(action, text) == fault
    assert Fault.parse(action, fault.text) == fault


@pytest.mark.parametrize(
    ("action", "text", "words"),
    [
        *(
            ("kill", text, "miner:3@round1")
            for text in ("", "miner-3", "miner:3@1", "stage:x@round1", "miner:3@round1 ")
        ),
        ("kill", "miner:-1@round1", "miner:3@round1"),
        ("kill", "miner:3@round1+1.5", "miner:3@round1"),
        ("kill", "miner:3@round1+", "miner:3@round1"),
        ("kill", "validator:0@round1", "miner:3@round1"),
        ("kill", "miner:3@round1\n", "miner:3@round1"),
        ("kill", "miner:٣@round1x", "miner:3@round1"),
        ("kill", "miner:3@round1:4", "only --freeze, --restart, --fill, --steal"),
        ("leave", "miner:3@round1+0.5:4", "only --freeze, --restart, --fill, --steal"),
        ("freeze", "miner:3@round1:x", ":SECONDS"),
        ("restart", "miner:3@round1:-1", ":SECONDS"),
        ("join", "miner:3@round1", "1@round2"),
        ("join", "0@round1", "1@round2"),
        ("join", "1@round1:4", "1@round2"),
    ],
)
def test_what_cannot_be_said_names_the_form(action: str, text: str, words: str) -> None:
    with pytest.raises(FaultError, match=words) as caught:
        Fault.parse(action, text)
    assert f"--{action}" in str(caught.value)


def test_what_can_never_come_is_refused() -> None:
    def check(**given: list[str]) -> None:
        faults = parse_faults(given)
        check_faults(faults, stages=2, miners=4 + joiners(faults), rounds=3)

    check(kill=["miner:4@round2", "stage:1@round0"], join=["1@round1"])
    for given, words in (
        ({"kill": ["miner:4@round2"]}, "the last miner is 3"),
        ({"freeze": ["stage:2@round2"]}, "the last stage is 1"),
        ({"join": ["1@round3"]}, "after the last round, 2"),
    ):
        with pytest.raises(FaultError, match=words):
            check(**given)


def test_a_fault_comes_at_its_place_in_its_round_and_once() -> None:
    faults = plan(kill=["miner:3@round0", "miner:1@round0+0.95", "miner:2@round1"])
    tally = swarm()
    assert faults.due(tally, now=100.0) == []
    assert faults.due(tally, now=104.5) == [Strike("kill", "miner-3", "--kill miner:3@round0")]
    assert faults.due(tally, now=109.0) == []
    assert [strike.node for strike in faults.due(tally, now=109.6)] == ["miner-1"]
    tally.round = 1
    assert faults.due(tally, now=110.0) == []
    assert faults.left == ["--kill miner:2@round1"]
    assert [strike.node for strike in faults.due(tally, now=114.1)] == ["miner-2"]
    assert faults.due(tally, now=1000.0) == faults.left == []


def test_a_late_look_still_strikes() -> None:
    """The moment lies in a round that another has followed by the time of the look."""
    faults = plan(kill=["miner:3@round0+1"])
    tally = swarm()
    assert faults.due(tally, now=100.0) == []
    tally.round = 1
    assert [strike.node for strike in faults.due(tally, now=110.5)] == ["miner-3"]


def test_what_is_frozen_wakes_and_what_is_restarted_comes_back() -> None:
    faults = plan(freeze=["miner:0@round0:2"], restart=["miner:3@round0"])
    tally = swarm()
    faults.due(tally, now=100.0)
    assert faults.due(tally, now=104.5) == [
        Strike("freeze", "miner-0", "--freeze miner:0@round0:2"),
        Strike("kill", "miner-3", "--restart miner:3@round0"),
    ]
    assert faults.returning
    assert faults.due(tally, now=106.4) == []
    assert faults.due(tally, now=106.5) == [Strike("thaw", "miner-0", "")]
    assert faults.due(tally, now=109.4) == []
    assert faults.due(tally, now=109.5) == [Strike("restart", "miner-3", "")]
    assert not faults.returning


def test_a_stage_loses_another_replica_each_time() -> None:
    faults = plan(kill=["stage:1@round0", "stage:1@round0", "stage:1@round0"])
    tally = swarm()
    faults.due(tally, now=100.0)
    assert [strike.node for strike in faults.due(tally, now=104.5)] == ["miner-2", "miner-3", None]


def test_a_stage_s_fault_passes_over_who_is_gone() -> None:
    tally = swarm()
    tally.add("localnet", Stamped(2.0, Intervention("kill", "miner-2", 0, "")))
    faults = plan(leave=["stage:1@round0"])
    faults.due(tally, now=100.0)
    assert [strike.node for strike in faults.due(tally, now=104.5)] == ["miner-3"]


def test_joiners_are_numbered_on_and_not_repeated_by_a_resumed_run() -> None:
    faults = plan(join=["2@round0", "1@round1"])
    tally = swarm()
    faults.due(tally, now=100.0)
    assert [strike.node for strike in faults.due(tally, now=104.5)] == ["miner-4", "miner-5"]
    again = FaultPlan(
        parse_faults({"join": ["2@round0", "1@round1"], "kill": ["miner:0@round0"]}),
        round_seconds=ROUND,
        first_joiner=4,
        done={"--join 2@round0": 1, "--kill miner:0@round0": 1},
    )
    assert again.left == ["--join 2@round0", "--join 1@round1"]
    again.due(tally, now=100.0)
    assert [strike.node for strike in again.due(tally, now=104.5)] == ["miner-5"]
    tally.round = 1
    again.due(tally, now=110.0)
    assert [strike.node for strike in again.due(tally, now=114.5)] == ["miner-6"]
