"""A swarm that runs for long: what its nodes hold stays what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neurons.machine import footprint
from neurons.telemetry import ProcessHeld
from scripts.bench.soak import LEAST_ROUNDS, trend

MINUTES = os.environ.get("ORION_SOAK_MINUTES", "10")


def held(rounds: int, *, grows: int = 0, leaks: int = 0) -> list[ProcessHeld]:
    """A node that needs its first rounds to warm up."""
    return [
        ProcessHeld(number, 300_000_000 + min(number, 5) * 10**7 + number * grows, 60 + number * leaks, 40)
        for number in range(rounds)
    ]


def test_what_levels_off_is_flat_and_what_goes_on_growing_is_not() -> None:
    assert trend(held(LEAST_ROUNDS - 1)) is None
    for good in (held(30), held(30, grows=1_000_000)):
        found = trend(good)
        assert found is not None
        assert found.flat
    for bad in (held(30, grows=5_000_000), held(30, leaks=3)):
        found = trend(bad)
        assert found is not None
        assert not found.flat
    found = trend(held(30, grows=1_000_000))
    assert found is not None
    assert found.bytes_per_day(20.0) == pytest.approx(1_000_000 * 4320, rel=0.1)


async def test_a_process_knows_what_it_holds() -> None:
    before = footprint()
    assert before.bytes > 10 << 20
    assert before.tasks >= 1
    with open(os.devnull) as first, open(os.devnull) as second:  # noqa: PTH123, ASYNC230
        assert footprint().files == before.files + 2
        assert first.fileno() != second.fileno()
    assert footprint().files == before.files


@pytest.mark.long
@pytest.mark.timeout(9000)
def test_a_swarm_holds_no_more_after_a_while_than_before(tmp_path: Path) -> None:
    """Ten minutes; as many as ORION_SOAK_MINUTES says."""
    command = [sys.executable, "-m", "scripts.bench.soak", "--minutes", MINUTES, "--out", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert figures["flat"]
    assert len(figures["nodes"]) == 6
