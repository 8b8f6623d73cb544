"""The one command, small: a whole swarm in processes of its own, from nothing to incentive on chain."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from neurons.telemetry import Intervention, LocalStep, StateChanged, read_events

pytestmark = pytest.mark.alone

SMALL = [
    "--stages",
    "2",
    "--replicas",
    "2",
    "--validators",
    "1",
    "--rounds",
    "2",
    "--round-seconds",
    "14",
]
DOCUMENTED = {
    "model",
    "parameters",
    "stages",
    "replicas",
    "rounds",
    "tokens",
    "tokens_per_second",
    "seconds_to_first_step",
    "wall_seconds",
    "loss",
    "microbatches",
    "bytes",
    "chain",
    "adversaries",
    "audits",
    "miners",
    "complete",
    "by_round",
    "churn",
    "recovery",
    "merge_hidden",
    "records",
    "torn_lines",
}


def start(out: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.cli", "localnet", "--out", str(out), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )


def left_over(out: Path) -> list[str]:
    """Processes that still mention the run's folder, or were forked for it."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "environ"]):
        command = " ".join(process.info["cmdline"] or [])
        if process.info["pid"] != os.getpid() and str(out) in command:
            found.append(command)
    return found


@pytest.mark.timeout(170)
def test_a_small_swarm_trains_and_is_paid(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, *SMALL)
    output, _ = process.communicate()
    logs = "\n".join(path.read_text()[-2000:] for path in sorted((out / "logs").glob("*.log")))
    assert process.returncode == 0, output + logs
    result = json.loads((out / "summary.json").read_text())
    assert result.keys() >= DOCUMENTED
    assert result["microbatches"]["lost"] == 0
    assert result["microbatches"]["completed"] == result["microbatches"]["started"] > 0
    assert result["loss"]["validation_last"] < result["loss"]["validation_first"] - 0.1
    assert result["audits"]["failed"] == 0
    assert result["audits"]["passed"] > 0
    assert result["replicas_identical"]
    assert result["complete"]
    assert result["torn_lines"] == 0
    assert 0 < result["records"]["epoch_space_used"] <= result["records"]["epoch_space_limit"]
    assert not any(result["churn"].values())
    assert all(miner["merges"] == 2 and miner["merge_bytes"] > 0 for miner in result["miners"])
    assert len(result["miners"]) == 4
    assert all(miner["weight"] > 0 and miner["units"] > 0 for miner in result["miners"])
    row = next(iter(result["chain"]["weights"].values()))
    assert set(row) == {str(miner["uid"]) for miner in result["miners"]} == set(result["chain"]["incentive"])
    checkpoints = sorted(str(path.relative_to(out)) for path in (out / "checkpoints").rglob("*.safetensors"))
    assert checkpoints == [
        f"checkpoints/stage-{stage:02d}/round-{number:05d}.safetensors" for stage in (0, 1) for number in (1, 2)
    ]
    for path in (out / "events").glob("*-*.jsonl"):  # of nodes
        assert [stamped.time for stamped in read_events(path.read_text().splitlines())]
    assert "seed" not in logs.lower().replace("audit seed", "")  # no secret phrase in a log
    assert not left_over(out)
    again = subprocess.run(
        [sys.executable, "-m", "scripts.cli", "localnet", "--resume", str(out)],
        capture_output=True,
        check=False,
        text=True,
        timeout=50,
        cwd=Path(__file__).parents[2],
    )
    assert again.returncode == 1
    assert "is complete" in again.stdout


@pytest.mark.timeout(170)
def test_miners_come_and_go_and_the_others_train_on(tmp_path: Path) -> None:
    """One joins, one is killed, one is killed and comes back, one leaves; nobody waits and no microbatch is lost."""
    out = tmp_path / "run"
    shape = ("--model", "pico", "--stages", "2", "--replicas", "3", "--validators", "1")
    churn = ("--join", "1@round0", "--kill", "stage:1@round1", "--restart", "stage:0@round1:3", "--leave")
    process = start(out, *shape, "--rounds", "3", "--round-seconds", "14", *churn, "stage:1@round1")
    output, _ = process.communicate()
    logs = "\n".join(path.read_text()[-2000:] for path in sorted((out / "logs").glob("*.log")))
    assert process.returncode == 0, output + logs
    result = json.loads((out / "summary.json").read_text())
    assert result["microbatches"]["lost"] == 0
    assert result["audits"]["failed"] == 0
    assert result["replicas_identical"]
    assert not result["failures"]
    assert not result["merge_faults"]
    churn = result["churn"]
    assert (churn["joined"], churn["left"], churn["restarted"]) == (1, 1, 1), churn
    events = {
        path.stem: [stamped.event for stamped in read_events(path.read_text().splitlines())]
        for path in (out / "events").glob("miner-*.jsonl")
    }
    standings = {e.state: e.round for e in reversed(events["miner-6"]) if isinstance(e, StateChanged)}
    assert standings["active"] - standings["joining"] <= 2, standings
    interventions = [
        stamped.event
        for stamped in read_events((out / "events" / "localnet.jsonl").read_text().splitlines())
        if isinstance(stamped.event, Intervention)
    ]
    disturbed = {event.node for event in interventions}
    for name in set(events) - disturbed:  # a series of steps without a hole
        stepped = {event.round for event in events[name] if isinstance(event, LocalStep)}
        assert stepped == {0, 1, 2}, (name, stepped)


@pytest.mark.timeout(90)
def test_ctrl_c_leaves_a_summary_and_no_process(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, *SMALL)
    deadline = time.monotonic() + 60
    while not any((out / "events").glob("miner-*.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    group = os.getpgid(process.pid)
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    os.killpg(group, signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 130, output
    assert "stopped early" in output
    assert json.loads((out / "summary.json").read_text())["stages"] == 2
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive, [item.cmdline() for item in alive]
    assert not left_over(out)
