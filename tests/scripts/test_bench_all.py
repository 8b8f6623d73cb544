"""The gate on benchmarks: what falls is found, what cannot be measured is said, what is missing fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.bench import all as everything
from scripts.bench.all import BENCHMARKS, SLACK, Benchmark, Gate, judge, main

BENCHMARK = Benchmark("some", (Gate("ratio", floor=0.5),))


@pytest.mark.parametrize(
    ("value", "baseline", "holds"),
    [
        (2.0, {}, True),
        (0.49, {}, False),
        (2.0 * (1 - SLACK) + 0.01, {"some.ratio": 2.0}, True),
        (2.0 * (1 - SLACK) - 0.01, {"some.ratio": 2.0}, False),
        (0.49, {"some.ratio": 0.5}, False),
    ],
)
def test_a_ratio_may_not_fall_below_its_floor_nor_far_below_the_baseline(
    value: float, baseline: dict[str, float], *, holds: bool
) -> None:
    (finding,) = judge(BENCHMARK, {"ratio": value}, baseline)
    assert finding.holds is holds
    assert ("FALLEN" in str(finding)) is not holds


def test_what_cannot_be_measured_here_is_said_and_passes() -> None:
    (finding,) = judge(BENCHMARK, {"ratio": None}, {"some.ratio": 2.0})
    assert finding.holds
    assert "not measured here" in str(finding)


def test_a_result_without_its_ratio_is_an_error() -> None:
    with pytest.raises(KeyError, match="ratio"):
        judge(BENCHMARK, {"other": 1.0}, {})
    with pytest.raises(KeyError, match="must be a number"):
        judge(BENCHMARK, {"ratio": "fast"}, {})


def test_a_benchmark_is_run_judged_and_entered_into_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = tmp_path / "quick.json"
    monkeypatch.setattr(everything, "BASELINE", baseline)
    flags = ["--quick", "--only", "overhead", "--out", str(tmp_path / "out")]
    assert main([*flags, "--accept"]) == 0
    content = json.loads(baseline.read_text())
    assert content["overhead.headroom"] > 0
    baseline.write_text(json.dumps({"overhead.headroom": 1e6}))
    assert main(flags) == 1
    assert "overhead.headroom" in capsys.readouterr().out


def test_every_gate_has_a_baseline() -> None:
    content = json.loads(everything.BASELINE.read_text())
    assert {f"{b.name}.{gate.key}" for b in BENCHMARKS for gate in b.gates} == content.keys()
