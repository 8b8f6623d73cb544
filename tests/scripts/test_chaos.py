"""Chaos that a seed draws for real processes, and the promises that a run's event logs can break."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from neurons.telemetry import (
    Convicted,
    Event,
    EventsLost,
    Intervention,
    Merged,
    MicrobatchDone,
    MicrobatchStarted,
    NodeStarted,
    Telemetry,
    read_log,
)
from scripts.chaos import draw, lines, promises, told
from scripts.faults import LASTING, Fault, FaultError
from scripts.sim.faults import Kind
from scripts.thief import ANSWER, Thief

SWARM = """
    --stages 2 --replicas 2 --validators 1 --rounds 3 --round-seconds 15 --model pico
    --chaos 3 --fill stage:1@round0+0.2:5 --steal stage:0@round1+0.2:4
"""


def drawn(seed: int) -> tuple[Fault, ...]:
    return draw(seed, stages=3, replicas=2, rounds=6, round_seconds=20.0)


def test_a_seed_draws_the_same_faults_and_each_stage_keeps_a_replica() -> None:
    actions = set()
    for seed in range(100):
        faults = drawn(seed)
        assert faults == drawn(seed)
        actions |= {fault.action for fault in faults}
        places = [(fault.round, fault.number) for fault in faults]
        assert len(set(places)) == len(places), "one replica of a stage at a time"
        assert {number for number, _ in places} == set(range(5)), "the last round is quiet"
        assert all(fault == Fault.parse(fault.action, fault.text) for fault in faults)
    assert actions == {*LASTING}
    assert draw(1, stages=3, replicas=1, rounds=6, round_seconds=20.0) == ()


@pytest.mark.parametrize("action", ["fill", "steal"])
def test_faults_that_last_take_their_seconds(action: str) -> None:
    assert Fault.parse(action, "miner:3@round1+0.2:7").seconds == 7
    with pytest.raises(FaultError, match=f"--{action} 'x' is not of the form"):
        Fault.parse(action, "x")


def logs(folder: Path, events: Mapping[str, Sequence[tuple[float, Event]]]) -> Path:
    for name, entries in events.items():
        for time, event in entries:
            telemetry = Telemetry.open(folder / f"{name}.jsonl", now=lambda time=time: time)  # type: ignore[misc]
            telemetry.emit(event)
            telemetry.close()
    return folder


def told_by(folder: Path, *more: tuple[str, float, Event], fault: str = "freeze") -> Path:
    events: dict[str, list[tuple[float, Event]]] = {
        "localnet": [
            (1040.0, Intervention(fault, "miner-0", 1, "--chaos")),
            (1050.0, Intervention("thaw", "miner-0", 1, "")),
        ],
        "miner-0": [
            (1000.0, NodeStarted("hotkey-0", "miner", "http://127.0.0.1:1")),
            (1010.0, MicrobatchStarted(0, 7)),
            (1011.0, MicrobatchDone(0, 7, 4.0, 1.0, 1)),
        ],
        "validator-0": [(1000.0, NodeStarted("hotkey-1", "validator", "http://127.0.0.1:2"))],
    }
    for name, time, event in more:
        events[name].append((time, event))
    return logs(folder, events)


def found(folder: Path) -> dict[str, list[str]]:
    return promises(folder, cheats=[], rounds=4, round_seconds=20.0)


def test_a_sound_run_holds_every_promise(tmp_path: Path) -> None:
    held = found(told_by(tmp_path))
    assert len(held) > 8
    assert not any(held.values())
    assert lines(held) == [f"promises: {len(held)} of {len(held)} hold"]
    (fault,) = told(tmp_path, cheats=[], rounds=4, round_seconds=20.0).faults
    assert (fault.kind, fault.at, fault.seconds, fault.nodes) == (Kind.PAUSE, 40.0, 10.0, ("miner-0",))


def test_what_broke_is_named(tmp_path: Path) -> None:
    convicted = Convicted(1, "hotkey-0", 4, "forward: error 3")
    held = found(
        told_by(tmp_path, ("validator-0", 1060.0, convicted), ("miner-0", 1061.0, MicrobatchDone(0, 9, 4.0, 1.0, 1)))
    )
    assert {name for name, why in held.items() if why} == {"honest stay unconvicted", "microbatches are accounted for"}
    assert any("validator-0 at 60.0 s convicts miner-0" in line for line in lines(held))


def test_silence_is_excused_by_what_was_done_and_by_nothing_else(tmp_path: Path) -> None:
    silent = ("validator-0", 1060.0, Convicted(1, "hotkey-0", 4, "withheld: evidence"))
    assert not any(found(told_by(tmp_path / "frozen", silent)).values())
    assert found(told_by(tmp_path / "left", silent, fault="leave"))["honest stay unconvicted"]


def test_a_thief_answers_nonsense_and_gives_the_port_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    thief = Thief("127.0.0.1", port)
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(b"POST /1/push HTTP/1.1\r\n\r\n")
            assert sock.recv(1 << 10) == ANSWER
    with pytest.raises(OSError, match="in use"):
        Thief("127.0.0.1", port)
    thief.close()
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.alone
@pytest.mark.timeout(400)
def test_a_swarm_of_processes_keeps_its_promises(tmp_path: Path) -> None:
    """With a disk that fills up besides, in the middle of it."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli", "localnet", "--plain", *SWARM.split(), "--out", str(tmp_path / "run")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"promises: (\d+) of \1 hold", done.stdout), done.stdout
    events = [stamped.event for path in (tmp_path / "run" / "events").glob("*.jsonl") for stamped in read_log(path)]
    struck = {event.action for event in events if isinstance(event, Intervention)}
    assert struck >= {"steal", "restart", "fill", "drain"}
    assert any(isinstance(event, EventsLost) for event in events)
    assert sum(isinstance(event, Merged) and event.included for event in events) >= 3
