"""The terminal's view of a folder of event logs, of a run that is over."""

from pathlib import Path

import pytest

from neurons.telemetry import Downloading, NodeFinished, NodeStarted
from scripts.cli import main
from tests.scripts.dashboard.recording import small, write


def test_a_run_that_is_over_is_told_with_its_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", small())
    assert main(["monitor", "--run", str(tmp_path / "run"), "--plain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    news = [line for line in lines if " s  round 0 begins at block 10" in line]
    assert news == ["   2.0 s  round 0 begins at block 10: replicas per stage 2 2"]
    assert any("convicts" in line for line in lines)


def test_a_folder_without_logs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "--run", str(tmp_path)]) == 1
    assert "orion monitor: --run" in capsys.readouterr().err


def test_how_far_a_joiner_is_with_its_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joiner = "miner-9"
    load = Downloading(held=4, stage=1, bytes=300_000_000, total=1_200_000_000, rate=5e6)
    events = [NodeStarted("5miner-9", "miner", "http://127.0.0.1:1"), load, NodeFinished(1)]
    write(tmp_path / "run", [(10.0 * number, joiner, event) for number, event in enumerate(events)])
    assert main(["monitor", "--run", str(tmp_path / "run"), "--plain"]) == 0
    assert "miner-9 fetches its state: 25% of 1.2 GB, 5.0 MB/s, 3 min left" in capsys.readouterr().out
