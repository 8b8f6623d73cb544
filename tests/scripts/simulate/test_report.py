"""`orion simulate` as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.cli import main

SMALL = ["simulate", "--model", "100b", "--stages", "16", "--replicas", "2", "--minutes", "13", "--round-minutes", "6"]


def test_it_stands_beside_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["plan", *SMALL[1:7], "--round-minutes", "6", "--depth", str(round(found["depth"])), "--json"]) in (
        0,
        1,
    )
    planned = json.loads(capsys.readouterr().out)
    assert found["nodes"] == 32
    assert found["closed_form"]["tokens_per_second_training"] == pytest.approx(
        planned["tokens_per_second_training"], rel=1e-6
    )
    assert abs(found["difference_training"]) < 0.05
    assert found["merge"]["identical"]
    assert found["microbatches"]["lost"] == 0
    assert len(found["stages"]) == 16


def test_a_picture_and_a_table_of_what_failures_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "timeline.png"
    assert main([*SMALL, "--failures-per-hour", "12", "--seed", "1", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "closed form says" in printed
    assert "failures: 0;" not in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--minutes", "0"], 2, "--minutes is 0"),
        (["--failures-per-hour", "-1"], 2, "--failures-per-hour is -1"),
        (["--stages", "91"], 2, "--stages 91 is 1 more than the 90 layers"),
        (["--replicas", "18", "--codec", "int8"], 1, "use codec topk2bit"),
        (["--picture", "/nowhere/timeline.png", "--minutes", "1"], 1, "--picture /nowhere/timeline.png"),
    ],
)
def test_what_makes_no_sense_is_said(
    flags: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *flags]) == status
    assert words in capsys.readouterr().err
