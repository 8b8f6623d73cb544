"""The terminal's view of a folder of event logs, of a run that is over."""

from pathlib import Path

import pytest

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
