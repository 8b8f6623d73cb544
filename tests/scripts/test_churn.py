"""What is done to processes on demand, and that it is an event before it is done."""

import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from neurons.telemetry import Intervention, NodeStarted, RoundStarted, Stamped, read_events
from scripts.churn import Churn
from scripts.faults import FaultPlan, parse_faults
from scripts.nodes import NodeProcess
from scripts.tally import LogFollower, Tally


@dataclass
class FakeProcess:
    """Stands in for a node: notes the signals it gets, ends of SIGKILL."""

    name: str
    pid: int = 1
    exitcode: int | None = None
    signals: list[signal.Signals] = field(default_factory=list)

    def join(self) -> None:
        assert self.exitcode is not None, f"{self.name} was waited for while it ran"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    processes: list[FakeProcess] = []

    def start(name: str, role: str, flags: list[str], *, log: Path, lock: Path) -> NodeProcess:
        process = FakeProcess(name)
        processes.append(process)
        return NodeProcess(name, role, process, log)  # type: ignore[arg-type]

    def send(node: NodeProcess, number: signal.Signals) -> None:
        node.process.signals.append(number)  # type: ignore[attr-defined]
        if number == signal.SIGKILL:
            node.process.exitcode = -9  # type: ignore[misc]

    monkeypatch.setattr("scripts.churn.start_node", start)
    monkeypatch.setattr(NodeProcess, "signal", send)
    return processes


def test_interventions_reach_processes_log_and_tally(tmp_path: Path, started: list[FakeProcess]) -> None:
    given = {
        "kill": ["miner:0@round0"],
        "restart": ["miner:1@round0:2"],
        "freeze": ["miner:2@round0:1"],
        "leave": ["miner:3@round0"],
        "join": ["1@round0"],
    }
    plan = FaultPlan(parse_faults(given), round_seconds=10.0, first_joiner=4)
    tally = Tally(1000)
    for index in range(4):
        name = f"miner-{index}"
        tally.add(name, Stamped(0.0, NodeStarted(hotkey=name, role="miner", endpoint="http://x:1")))
        tally.add(name, Stamped(0.0, RoundStarted(round=0, block=1, stage=0, replicas=[4], roster="aa")))
    churn = Churn(tmp_path, plan, flags=lambda _name: [], now=lambda: 1.0)
    for index in range(4):
        churn.start(f"miner-{index}", "miner")
    churn.strike(tally, now=100.0)
    assert len(churn.strike(tally, now=104.5)) == 5
    assert [process.signals for process in started] == [
        [signal.SIGKILL],
        [signal.SIGKILL],
        [signal.SIGSTOP],
        [signal.SIGUSR1],
        [],
    ]
    assert churn.returning
    churn.strike(tally, now=105.6)
    assert started[2].signals == [signal.SIGSTOP, signal.SIGCONT]
    churn.strike(tally, now=106.6)
    assert [process.name for process in started[4:]] == ["miner-4", "miner-1"]
    assert not churn.returning
    assert len(churn.nodes) == 5
    churn.close()
    for name, stamped in LogFollower(tmp_path / "events").read():
        tally.add(name, stamped)
    assert tally.miners["miner-0"].state == "dead"
    assert (tally.churn.killed, tally.churn.frozen) == (2, 1)
    assert tally.struck == {f"--{action} {texts[0]}": 1 for action, texts in given.items()}
    assert not tally.returning


def test_a_fault_that_finds_nobody_says_so_and_is_no_event(tmp_path: Path, started: list[FakeProcess]) -> None:
    plan = FaultPlan(parse_faults({"kill": ["miner:0@round0", "stage:1@round0"]}), round_seconds=10.0)
    tally = Tally(1000)
    tally.round = 0
    churn = Churn(tmp_path, plan, flags=lambda _name: [], now=lambda: 1.0)
    churn.start("miner-0", "miner")
    started[0].exitcode = 0
    churn.strike(tally, now=100.0)
    lines = churn.strike(tally, now=104.5)
    assert len(lines) == 2
    assert all("there is no such node" in line for line in lines)
    churn.resumed(0)
    churn.close()
    events = [item.event for item in read_events((tmp_path / "events" / "localnet.jsonl").read_text().splitlines())]
    assert events == [Intervention("resume", "", 0, "")]


def test_who_was_killed_a_moment_ago_is_not_frozen(
    tmp_path: Path, started: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may be there still; as a frozen node it would be missed at the end."""

    def send(node: NodeProcess, number: signal.Signals) -> None:
        node.process.signals.append(number)  # type: ignore[attr-defined]

    monkeypatch.setattr(NodeProcess, "signal", send)
    plan = FaultPlan(parse_faults({"kill": ["miner:0@round0"], "freeze": ["miner:0@round0:1"]}), round_seconds=10.0)
    tally = Tally(1000)
    tally.round = 0
    churn = Churn(tmp_path, plan, flags=lambda _name: [], now=lambda: 1.0)
    churn.start("miner-0", "miner")
    churn.strike(tally, now=100.0)
    lines = churn.strike(tally, now=104.5)
    churn.close()
    assert started[0].signals == [signal.SIGKILL]
    assert [line for line in lines if "there is no such node" in line] == [lines[-1]]
