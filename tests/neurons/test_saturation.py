"""At saturation each replica is paid for what it computes: one at half the speed of its sibling half as much."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.engine import StageEngine
from subnet.identity import verify
from subnet.trust.settlement import settle
from tests.neurons.swarm import SEED, Swarm, manifest, open_corpus, tokens_file

UNIT = 0.08
"""Seconds that the faster sibling's compute thread is held per unit; what the swarm computes itself takes less."""
MICROBATCHES = 60
LUCK = 0.05


def smallest() -> ModelConfig:
    return ModelConfig(
        vocab=512,
        hidden=16,
        layers=3,
        heads=2,
        kv_heads=1,
        ffn=32,
        context=8,
        boundary=BoundaryConfig(form=BoundaryForm.A, width=8),
    )


def hold(engine: StageEngine, seconds: Callable[[], float]) -> list[float]:
    """Hold the compute thread at least so long in every unit; how long each took comes into the list."""
    took: list[float] = []

    def held(inner: Callable[..., object], *args: object) -> object:
        start = time.monotonic()
        result = inner(*args)
        time.sleep(max(0.0, seconds() - (time.monotonic() - start)))
        took.append(time.monotonic() - start)
        return result

    for name in ("forward", "backward", "tail"):
        setattr(engine, name, partial(held, getattr(engine, name)))
    return took


def recent(took: list[float]) -> float:
    return sum(took[-8:]) / len(took[-8:]) if took else UNIT


@pytest.mark.alone
@pytest.mark.parametrize("factor", [pytest.param(1.0, marks=pytest.mark.long), 2.0])
async def test_paid_work_follows_speed(tmp_path: Path, factor: float) -> None:
    """Two heads that keep two bodies busy; one of these takes `factor` times as long as the other, as measured."""
    entry = tokens_file(tmp_path)
    loaded = manifest(smallest(), entry, stages=3, replicas=2, wire="bfloat16").write(tmp_path / "manifest.toml")
    async with Swarm(loaded, open_corpus(tmp_path, loaded.manifest, entry), replicas=2) as swarm:
        slow, fast = swarm.stage(1)
        took = hold(fast.worker.engine, lambda: UNIT)
        hold(slow.worker.engine, lambda: factor * recent(took))
        await asyncio.gather(*(head.worker.drive(limit=MICROBATCHES) for head in swarm.stage(0)))
        evidence = {hotkey: (await member.worker.close())[1] for hotkey, member in swarm.members.items()}
    settlement = settle(
        swarm.loaded.run_id,
        swarm.roster,
        evidence,
        verify,
        first_sample=0,
        seed=SEED,
        lane=swarm.loaded.manifest.swarm.lane,
        windows={hotkey: {leaf.version for leaf in table.leaves} for hotkey, table in evidence.items()},
    )
    assert len(settlement.pathways) == 2 * MICROBATCHES
    for hotkey, paid in settlement.paid.items():
        # What the slow one sent away is paid, and so are they who sent it, but for what luck puts beyond the excuse
        # that two heads have in each other.
        assert sum(paid.unpaid.values()) <= LUCK * paid.claimed, (hotkey, paid)
    ratio = settlement.paid[slow.identity.hotkey].units / settlement.paid[fast.identity.hotkey].units
    assert ratio == pytest.approx(1 / factor, rel=0.15)
