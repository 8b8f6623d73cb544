"""A change that moves how training goes has to say so: it moves this curve."""

import json

import pytest

from tests.model.golden import CURVE, curve


@pytest.mark.timeout(180)
def test_200_steps_of_nano_lose_what_they_lost() -> None:
    golden = json.loads(CURVE.read_text())
    assert golden[0] > 4 > 4 * golden[-1], "it learns"
    points = curve()
    # Other instruction sets of one processor were equal in the first 120 steps and at most 0.4 % off after.
    assert points[:6] == pytest.approx(golden[:6], rel=2e-4)
    assert points[6:] == pytest.approx(golden[6:], rel=1e-2)
