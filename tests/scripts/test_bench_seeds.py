"""Seeds by the hundred: each is played once, what it came to is kept, and the page has the figures of the file."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.bench.report import marks
from scripts.bench.seeds import RESULTS, Played, ResultsError, add, code_hash, main, read, table
from scripts.sim.play import Outcome

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
ONE = Played.of(
    Outcome(
        seed=3,
        faults=[{"kind": "kill"}, {"kind": "split"}, {"kind": "kill"}],
        wrong={},
        virtual_seconds=1200.0,
        cpu_seconds=9.0,
        digest="ab",
        counts={"microbatches": 10, "completed": 9},
    ),
    "c0de",
)


def test_what_a_seed_came_to_is_kept_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "results" / "seeds.jsonl"
    assert read(path) == {}
    bad = replace(ONE, seed=4, wrong=("nobody waits for ever",), faults={"kill": 1}, code="other")
    for row in (ONE, bad):
        add(path, row)
    assert read(path) == {3: ONE, 4: bad}
    text = table(read(path).values())
    assert "1 of 2 seeds hold" in text
    assert "Played on 2 states" in text
    assert "| kill | 3 | 2 | 1 |" in text
    assert "| split | 1 | 1 | 1 |" in text
    assert "* seed 4: nobody waits for ever" in text


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    add(path, ONE)
    with path.open("a") as file:
        file.write('{"seed": 5}\n')
    with pytest.raises(ResultsError, match="line 2 of"):
        read(path)


def test_the_hash_is_of_what_runs(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    first = code_hash(tmp_path)
    (tmp_path / "model" / "a.py").write_text("x = 1\n")
    second = code_hash(tmp_path)
    (tmp_path / "model" / "notes.txt").write_text("nothing\n")
    assert first != second == code_hash(tmp_path)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.jsonl").write_text("no\n")
    for flags, words in (
        (["--seeds", "9-2"], "--seeds '9-2' is no range"),
        (["--results", str(tmp_path / "broken.jsonl")], "line 1 of"),
        (["--results", str(tmp_path / "none.jsonl"), "--page", str(tmp_path / "none.md")], "cannot be read"),
    ):
        assert main(flags) == 2
        assert words in capsys.readouterr().err


def test_the_page_has_the_figures_of_the_file() -> None:
    begin, end = marks("seeds")
    _, _, rest = PAGE.read_text().partition(begin)
    assert rest.partition(end)[0].strip() == table(read(RESULTS).values())


@pytest.mark.timeout(300)
def test_a_seed_is_played_once(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    command = [sys.executable, "-m", "scripts.bench.seeds", "--seeds", "6-6", "--results", str(path)]
    first = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
    assert first.returncode == 0, first.stdout + first.stderr
    (row,) = read(path).values()
    assert row.seed == 6
    assert row.faults
    assert row.code == code_hash()
    before = path.read_bytes()
    again = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
    assert again.returncode == 0
    assert "1 of 1 seeds hold" in again.stdout
    assert path.read_bytes() == before
