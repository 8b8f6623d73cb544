"""`orion plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest

from scripts.cli import main


def test_a_plan_that_fits_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    out = capsys.readouterr().out
    assert "100b: 99.7 billion parameters, 16 stages x 3 a100-80gb" in out
    assert out.count("fits") == 6
    assert max(map(len, out.splitlines())) <= 120


def test_what_does_not_fit_is_named_with_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--host-gb", "100"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "does not fit" in line)
    assert line.startswith("evidence in a miner's host memory")
    assert "--slot-blocks" in line


def test_a_disk_that_is_too_small_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--disk-gb", "100"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "does not fit" in line)
    assert line.startswith("evidence on a miner's disk")
    assert "--windows" in line


def test_json_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json", "--model", "8b", "--stages", "4"]) in (0, 1)
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] > 7e9
    assert len(plan["stages"]) == 4
    assert plan["audit"]["flops_share"] > 0
    assert [limit["fits"] for limit in plan["audit"]["limits"]]
    assert plan["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "1000b"], "model preset '1000b' is unknown"),
        (["--gpu", "abacus"], "GPU 'abacus' is unknown: did you mean"),
        (["--mfu", "1.5"], "--mfu is 1.5"),
        (["--up", "fast"], "'fast' is not of the form 200mbit"),
        (["--stages", "91"], "stages is 91"),
        (["--replicas", "0"], "replicas is 0"),
        (["--validators", "0"], "--validators is 0"),
        (["--windows", "5"], "windows are picked in an hour"),
    ],
)
def test_bad_numbers_are_named(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 1
    assert words in capsys.readouterr().err
