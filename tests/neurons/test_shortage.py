"""A stage without memory: in the pipeline a unit is computed again and nothing is lost, or whoever waits is told."""

import asyncio
import logging
from pathlib import Path

import pytest
import torch

from model.engine import OutOfRoomError
from model.recompute import Recompute
from model.relief import Holding
from neurons.telemetry import SteppedDown, TrainingClosed
from tests.model.test_relief import TOO_MUCH, Appetite, hungry
from tests.neurons.swarm import Swarm, manifest, open_corpus, tiny, tokens_file

STEPS = 3


def swarm_of(folder: Path) -> Swarm:
    entry = tokens_file(folder)
    loaded = manifest(tiny(), entry, stages=2).write(folder / "manifest.toml")
    return Swarm(loaded, open_corpus(folder, loaded.manifest, entry), synchronous=True)


async def trained(folder: Path, appetites: dict[int, Appetite]) -> tuple[dict[str, torch.Tensor], Swarm]:
    """The swarm's weights after some steps, with hungry stages."""
    async with swarm_of(folder) as swarm:
        for index, appetite in appetites.items():
            hungry(swarm.stage(index)[0].worker.engine.stage, appetite)
        head = swarm.stage(0)[0].worker
        await head.drive(limit=STEPS * swarm.loaded.manifest.optimizer.accumulation)
        for member in swarm.members.values():
            await member.worker.close()
        return {
            name: tensor.clone()
            for member in swarm.members.values()
            for name, tensor in member.worker.engine.stage.state_dict().items()
        }, swarm


async def test_no_work_of_a_round_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calm, _ = await trained(tmp_path, {})
    with caplog.at_level(logging.WARNING, "orion.neurons.shortage"):
        short, swarm = await trained(tmp_path, {0: Appetite(backward={1}), 1: Appetite(forward={2}, backward={1})})
    assert calm.keys() == short.keys()
    assert all(torch.equal(calm[name], short[name]) for name in calm)
    said = [stamped.event for m in swarm.members.values() for stamped in m.events]
    assert [(event.stage, event.recompute) for event in said if isinstance(event, SteppedDown)] == [
        (0, "selective"), (1, "selective"), (1, "selective"),
    ]  # fmt: skip
    assert all(event.lost == 0 for event in said if isinstance(event, TrainingClosed))
    assert any("ran out of memory on cpu: stepped down from recompute keep" in line for line in caplog.messages)


async def test_who_waits_for_a_stage_that_cannot_go_on_is_told(tmp_path: Path) -> None:
    async with swarm_of(tmp_path) as swarm:
        head = swarm.stage(0)[0].worker
        head.engine.holding = Holding(Recompute.FULL, 0)
        hungry(head.engine.stage, Appetite(forward=set(range(100))))
        driving = asyncio.create_task(head.drive(limit=4))
        with pytest.raises(OutOfRoomError, match="stage 0 is out of memory on cpu"):
            await head.shortage.until(asyncio.Event().wait())  # type: ignore[arg-type]
        driving.cancel()
        await asyncio.gather(driving, return_exceptions=True)


async def test_other_errors_of_a_unit_end_nothing(tmp_path: Path) -> None:
    async with swarm_of(tmp_path) as swarm:
        shortage = swarm.stage(0)[0].worker.shortage
        assert not shortage.ends(RuntimeError("a shape that does not fit"))
        await shortage.until(asyncio.sleep(0))
        with pytest.raises(RuntimeError) as caught:
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        assert shortage.ends(caught.value)
        with pytest.raises(OutOfRoomError, match="DefaultCPUAllocator"):
            await shortage.until(asyncio.sleep(0))
