"""The schedule benchmark: the least times in numbers, PyTorch's own pipeline on loopback, Orion on emulated links."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from scripts.bench import pipelining
from scripts.bench.ideal import Line, deep, one_f_one_b
from scripts.bench.schedule import QUICK, measure
from scripts.bench.standin.launch import free_ports

EQUAL = Line(stages=4, microbatches=8, forward=1.0, backward=2.0, transfer=0.0, latency=0.0)


def test_without_links_both_take_a_step_of_one_pipeline() -> None:
    assert one_f_one_b(EQUAL) == pytest.approx(3.0 * (8 + 3))
    assert deep(EQUAL) == pytest.approx(3.0 * (8 + 3))


def test_one_microbatch_goes_round_once() -> None:
    line = dataclasses.replace(EQUAL, microbatches=1, transfer=0.5, latency=0.25)
    assert line.round_trip == pytest.approx(4 * 3.0 + 3 * 1.5)
    assert one_f_one_b(line) == deep(line) == pytest.approx(line.round_trip)


def test_a_deep_pipeline_is_bound_by_its_links_and_a_shallow_one_by_its_round_trip() -> None:
    line = Line(stages=8, microbatches=32, forward=0.033, backward=0.067, transfer=0.211, latency=0.05)
    assert deep(line) == pytest.approx(4.454 + 31 * 0.211)
    # The first stage has eight in flight at a time: as many return per round trip.
    assert one_f_one_b(line) == pytest.approx(line.round_trip * (1 + 31 / 8), rel=0.01)


@pytest.mark.alone
def test_pytorchs_pipeline_takes_the_time_its_stages_are_held(tmp_path: Path) -> None:
    spec = pipelining.Spec(
        hosts=("127.0.0.1", "127.0.0.1"),
        port=free_ports(1)[0],
        interface="lo",
        forward=0.02,
        backward=0.04,
        boundary=(1, 64, 8),
        microbatches=4,
        steps=1,
        warm_up=1,
    )
    command = [sys.executable, "-m", "scripts.bench.pipelining", json.dumps(asdict(spec))]
    other = subprocess.Popen([*command, "1"])
    try:
        said = subprocess.run([*command, "0"], capture_output=True, text=True, check=True, timeout=50).stdout
        assert other.wait(timeout=10) == 0
    finally:
        other.kill()
        other.wait()
    (seconds,) = json.loads(said)["step_seconds"]
    assert seconds >= 0.06 * (4 + 1)


@pytest.mark.alone
def test_a_small_run_on_links_of_this_process(tmp_path: Path) -> None:
    setting = dataclasses.replace(QUICK, stages=2, microbatches=4, steps=1)
    figures = measure(setting, tmp_path, kernel=False)
    assert figures["ratio_1f1b_over_ours"] is None
    share = figures["least_over_ours"]
    assert isinstance(share, float)
    assert 0 < share <= 1.03  # nothing is faster than the links: half a turn and a late timer's credit apart
