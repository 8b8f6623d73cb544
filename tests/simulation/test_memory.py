"""A swarm that lives long holds no more than one that has just warmed up: whatever a node forgets to let go shows as
objects that grow in number round by round, long before a process is seen to grow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.held import ROUND_SECONDS

FIRST, SECOND = 5.5 * ROUND_SECONDS, 12.5 * ROUND_SECONDS


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Kinds of which there are more than chance explains: what is under way at a moment differs a little."""
    return {
        kind: (before.get(kind, 0), count) for kind, count in after.items() if count > 1.02 * before.get(kind, 0) + 24
    }


@pytest.mark.timeout(300)
def test_nodes_hold_no_more_after_twelve_rounds_than_after_five(tmp_path: Path) -> None:
    """One object more a round in each of the five nodes would be 35."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation.held", str(tmp_path), str(FIRST), str(SECOND)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    before, after = said["kinds"]
    assert before["neurons.node.Node"] == after["neurons.node.Node"] == 5
    assert grown(before, after) == {}
    first, second = said["bytes"]
    assert second <= 1.02 * first


def test_what_grows_by_one_a_round_is_seen() -> None:
    before = {"neurons.windows.Window": 10, "other": 380_000}
    assert grown(before, before) == {}
    assert grown(before, before | {"neurons.windows.Window": 45}) == {"neurons.windows.Window": (10, 45)}
    assert grown(before, before | {"neurons.new.Thing": 35}) == {"neurons.new.Thing": (0, 35)}
