"""Whole simulations: a seed plays the same twice, and what once failed holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KEPT = Path(__file__).parent / "kept"
SMALL = "--minutes 8 --stages 2 --replicas 2 --validators 2 --joiners 0"


def played(*flags: str) -> dict[str, object]:
    """The outcome of one seed, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli", "sim", "--json", *flags],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in (0, 1), done.stderr
    (outcome,) = json.loads(done.stdout)
    assert isinstance(outcome, dict)
    return outcome


@pytest.mark.timeout(300)
def test_a_seed_plays_the_same_twice_and_another_does_not(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    first = played("--seed", "1", *SMALL.split(), "--trace", str(trace))
    again, other = played("--seed", "1", *SMALL.split()), played("--seed", "2", *SMALL.split())
    assert first["wrong"] == again["wrong"] == other["wrong"] == {}
    assert first["faults"]
    assert first["digest"] == again["digest"] != other["digest"]
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert {line["event"] for line in lines} >= {"Fault", "MicrobatchDone", "Merged", "MinerScored", "WeightsSet"}
    assert [line["t"] for line in lines] == sorted(line["t"] for line in lines)


@pytest.mark.alone
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", sorted(KEPT.glob("*.json")), ids=lambda path: path.stem)
def test_a_schedule_that_failed_once_holds(path: Path) -> None:
    """Each is named by its seed; docs/reliability.md says what it found."""
    assert played("--seed", path.stem, "--faults", str(path))["wrong"] == {}


def test_a_simulation_that_hangs_is_ended_and_said() -> None:
    code = "import scripts.sim.play as p; p.WALL_SECONDS = 1; print(p.in_child(3, p.Size()).outcome().wrong)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "took longer than 1 s" in done.stdout


def test_what_cannot_be_played_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    for flags, words, status in (
        (["--seeds", "3-1"], "--seeds '3-1' is no range", 2),
        (["--seeds", "0-3", "--trace", "t"], "give --seed", 2),
        (["--faults", str(tmp_path / "absent.json")], "cannot be read", 1),
        (["--faults", str(tmp_path / "none.json")], "is no schedule", 1),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "scripts.cli", "sim", *flags], check=False, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
        assert words in done.stderr
