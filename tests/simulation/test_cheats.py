"""Cheats in whole simulated swarms, while other things go wrong: they are convicted, and nobody else is."""

import pytest

from scripts.sim.play import Outcome, in_child
from scripts.sim.world import Size
from tests.adversaries.kinds import Kind
from tests.simulation.cheats import cheating

SIZE = Size(stages=2, replicas=3, joiners=0, validators=3, minutes=13)


def played(seed: int, *kinds: Kind) -> Outcome:
    """One swarm of six miners, of which as many cheat as there are kinds."""
    return in_child(seed, SIZE, cheats={f"miner-{i}": cheating(kind) for i, kind in enumerate(kinds)}).outcome()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("seed", "kinds"),
    [
        pytest.param(0, (Kind.SIGN_FLIP, Kind.ZERO_GRADIENT), id="flipped-and-idle"),
        pytest.param(1, (Kind.WITHHELD_EVIDENCE, Kind.REPLAY), id="withheld-and-repeated"),
        pytest.param(3, (Kind.LOW_PRECISION, Kind.NO_BACKWARD), id="coarse-and-one-way"),
    ],
)
def test_cheats_are_convicted_whatever_else_goes_wrong(seed: int, kinds: tuple[Kind, ...]) -> None:
    outcome = played(seed, *kinds)
    assert outcome.wrong == {}
    assert set(outcome.convicted) == {f"miner-{i}" for i in range(len(kinds))}
