"""The closed form of lanes against the nodes' own rules, played out: two roads to one figure.

With one replica a stage they are within 3 % where a card or a link binds, and so are equal stages of three at the depth
that nodes keep. Where stages are unequal the closed form is further off: docs/simulate.md says how far.
"""

from __future__ import annotations

import pytest

from neurons.drive import in_flight
from scripts.simulate.setting import Setting
from scripts.simulate.swarm import simulate
from subnet.swarm.pace import Pipeline, Replica, Routing, pace

BOUNDARY = 2_359_296
FAST = 856e6


def difference(*, stages: int, replicas: int, depth: int, up: float, latency: float, equal: bool) -> float:
    """Simulated pace over the closed form's, minus 1, once the pipeline is full."""
    forward, backward = (1.0, 1.0) if equal else (0.66, 1.97)
    replica = Replica(forward=forward, backward=backward, up=up, down=1.5 * up)
    pipeline = Pipeline(
        stages=((replica,) * replicas,) * stages,
        forward_bytes=BOUNDARY,
        backward_bytes=BOUNDARY,
        latency=latency,
        depth=depth,
        routing=Routing.LANES,
    )
    expected = pace(pipeline)
    seconds = 2 * expected.flight + 250 * replicas / expected.rate
    return simulate(Setting(pipeline=pipeline, seconds=seconds)).rate(2 * expected.flight) / expected.rate - 1


@pytest.mark.parametrize(
    ("stages", "depth", "up", "latency", "equal"),
    [
        pytest.param(4, 9, FAST, 0.03, False, id="few stages"),
        pytest.param(16, 32, FAST, 0.03, False, id="the published shape"),
        pytest.param(8, 16, FAST, 0.03, True, id="backward as long as forward"),
        pytest.param(8, 24, FAST, 1.0, False, id="far apart"),
        pytest.param(8, 36, 8 * BOUNDARY / 1.5, 0.03, False, id="a link a little slower than a card"),
        pytest.param(8, 24, 8 * BOUNDARY / 3, 0.03, False, id="a slow link"),
    ],
)
def test_what_binds_is_reached(stages: int, depth: int, up: float, latency: float, *, equal: bool) -> None:
    found = difference(stages=stages, replicas=1, depth=depth, up=up, latency=latency, equal=equal)
    assert abs(found) < 0.03


@pytest.mark.parametrize("stages", [4, 8, 16])
def test_lanes_at_the_depth_of_nodes(stages: int) -> None:
    depth = in_flight(stages=stages, unit_seconds=0.66 + 1.97, push_seconds=2 * 0.03 + 8 * BOUNDARY / FAST)
    found = difference(stages=stages, replicas=3, depth=depth, up=FAST, latency=0.03, equal=False)
    assert abs(found) < 0.03
