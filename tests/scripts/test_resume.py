"""What a run's folder must hold for it to go on, and who may hold the folder."""

import hashlib
import json
import multiprocessing
import time
from pathlib import Path

import pytest

from neurons.telemetry import Intervention, NodeFinished, NodeStarted, Stamped, StateChanged
from scripts.adversaries import Adversary
from scripts.churn import to_start
from scripts.cli import main
from scripts.faults import parse_faults
from scripts.locks import Lock, StillRunning, claim_run, lock_path
from scripts.options import LocalnetOptions
from scripts.resume import CHAIN_FILE, FILE, ResumeError, RunFile, read_run
from scripts.tally import Tally

OPTIONS = LocalnetOptions(
    stages=2,
    replicas=2,
    validators=1,
    rounds=3,
    model="nano",
    seed=5,
    block_time=0.1,
    round_seconds=14.0,
    overlap=False,
    codec="int8",
    optimizer="muon",
    accumulation=4,
    latency="50ms",
    adversaries=(Adversary("noise", 3),),
    faults=parse_faults({"kill": ["miner:3@round1+0.95", "stage:0@round2"], "join": ["1@round2"]}),
)


def folder(path: Path) -> Path:
    """A run that had begun, as far as `read_run` looks."""
    manifest = b"anything"
    (path / "data").mkdir(parents=True)
    (path / CHAIN_FILE).parent.mkdir()
    (path / CHAIN_FILE).write_bytes(b"")
    (path / "manifest.toml").write_bytes(manifest)
    digest = hashlib.sha256(manifest).hexdigest()
    RunFile.of(OPTIONS, started_at=3.5, manifest=digest, data=path / "data").write(path)
    return path


def change(path: Path, **fields: object) -> None:
    content = json.loads((path / FILE).read_text())
    (path / FILE).write_text(json.dumps({**content, **fields}))


def test_options_survive_the_file(tmp_path: Path) -> None:
    run = read_run(folder(tmp_path / "run"))
    assert run.options() == OPTIONS
    assert run.started_at == 3.5
    assert run.data == str(tmp_path / "run" / "data")


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ResumeError, match="is not the folder of a run that had begun"):
            read_run(path)
    assert main(["localnet", "--resume", str(tmp_path)]) == 1
    assert "is not the folder of a run" in capsys.readouterr().out.replace("\n", " ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stages": "2"}, "stages: Input should be a valid integer"),
        ({"stages": 0}, "--stages 0 is outside 1 to 64"),
        ({"codec": "zip"}, "codec"),
        ({"latency": "soon"}, "--latency 'soon' is not of the form 50ms"),
        ({"faults": {"kill": ["miner-3"]}}, "is not of the form miner:3@round1"),
        ({"faults": {"kill": ["miner:9@round1"]}}, "the last miner is 3"),
        ({"version": 2}, "version"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_file_that_was_altered_is_named(tmp_path: Path, fields: dict[str, object], words: str) -> None:
    path = folder(tmp_path)
    change(path, **fields)
    with pytest.raises(ResumeError, match=words) as caught:
        read_run(path)
    assert FILE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / FILE).write_bytes((path / FILE).read_bytes()[:40])
    with pytest.raises(ResumeError, match=FILE):
        read_run(path)


def test_another_manifest_and_a_missing_chain_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "manifest.toml").write_bytes(b"anything else")
    with pytest.raises(ResumeError, match="restore it"):
        read_run(path)
    (path / "manifest.toml").write_bytes(b"anything")
    read_run(path)
    (path / CHAIN_FILE).unlink()
    with pytest.raises(ResumeError, match="the run's chain"):
        read_run(path)


def test_a_complete_run_is_refused_and_a_stopped_one_is_not(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "summary.json").write_text(json.dumps({"complete": False, "tokens": 7}))
    read_run(path)
    (path / "summary.json").write_text(json.dumps({"complete": True, "tokens": 7}))
    with pytest.raises(ResumeError, match="is complete"):
        read_run(path)


def test_other_options_do_not_go_with_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path)
    assert main(["localnet", "--resume", str(path), "--stages", "3", "--kill", "miner:0@round0"]) == 2
    assert "leave out --stages, --kill" in capsys.readouterr().err


def _hold(path: str, ready: "multiprocessing.connection.Connection", seconds: float) -> None:
    Lock.take(Path(path))
    ready.send(None)
    time.sleep(seconds)


def held(path: Path, seconds: float) -> multiprocessing.Process:
    """A process that holds a lock until it ends."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(path), there, seconds))
    process.start()
    here.recv()
    return process


def test_a_run_is_held_by_one_command(tmp_path: Path) -> None:
    lock = claim_run(tmp_path)
    with pytest.raises(StillRunning, match=r"its localnet is process \d+"):
        claim_run(tmp_path)
    lock.release()
    claim_run(tmp_path).release()


def test_a_live_node_keeps_its_run_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    node = held(lock_path(tmp_path, "miner-0"), 60.0)
    with pytest.raises(StillRunning, match=f"its miner-0 is process {node.pid}"):
        claim_run(tmp_path, patience=0.0)
    node.kill()
    node.join()
    claim_run(tmp_path, patience=0.0).release()


def test_orphans_are_waited_for(tmp_path: Path) -> None:
    node = held(lock_path(tmp_path, "miner-0"), 0.3)
    claim_run(tmp_path, patience=30.0).release()
    node.join()


def test_who_was_done_gone_or_not_there_yet_is_not_started() -> None:
    tally = Tally(1000)
    first = [*((f"miner-{index}", "miner") for index in range(5)), ("validator-0", "validator")]
    joiners = [("miner-5", "miner"), ("miner-6", "miner")]
    for name in ("miner-0", "miner-1", "miner-2", "miner-3", "miner-5"):
        tally.add(name, Stamped(1.0, NodeStarted(hotkey=name, role="miner", endpoint="http://x:1")))
    tally.add("localnet", Stamped(2.0, Intervention("kill", "miner-0", 0, "--kill miner:0@round0")))
    tally.add("localnet", Stamped(2.0, Intervention("kill", "miner-1", 0, "--restart miner:1@round0:9")))
    tally.add("miner-2", Stamped(2.0, StateChanged(round=1, state="left", stage=None, reason="asked to")))
    tally.add("miner-3", Stamped(2.0, NodeFinished(rounds=3)))
    names = [name for name, _ in to_start(first, joiners, tally)]
    assert names == ["miner-1", "miner-4", "validator-0", "miner-5"]
