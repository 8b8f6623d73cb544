"""A change that moves how training goes has to say so: it moves this curve."""

import json

import pytest

from tests.model.golden import CURVE, curve


@pytest.mark.timeout(180)
def test_120_steps_of_nano_lose_what_they_lost() -> None:
    golden = json.loads(CURVE.read_text())
    assert golden[0] > 4 > 4 * golden[-1], "it learns"
    points = curve()
    # Other instruction sets of one processor are equal for as long, and drift apart after.
    assert points == pytest.approx(golden, rel=2e-4)
