"""N stages through real axons and dendrites train to the same bits as one process."""

from pathlib import Path

import pytest
import torch

from model.accounting import total_parameters
from model.engine import StageEngine
from model.recompute import Recompute
from model.split import split
from model.stage import build_stage
from neurons.telemetry import MicrobatchDone
from tests.neurons.swarm import Swarm, manifest, open_corpus, tiny, tokens_file

STEPS = 20


@pytest.mark.parametrize("stages", [2, 4])
async def test_swarm_equals_one_process_bit_for_bit(stages: int, tmp_path: Path) -> None:
    config = tiny()
    entry = tokens_file(tmp_path)
    loaded = manifest(config, entry, stages=stages).write(tmp_path / "manifest.toml")
    corpus = open_corpus(tmp_path, loaded.manifest, entry)
    accumulation = loaded.manifest.optimizer.accumulation

    async with Swarm(loaded, corpus, synchronous=True) as swarm:
        head = swarm.stage(0)[0]
        await head.worker.drive(limit=STEPS * accumulation)
        for member in swarm.members.values():
            await member.worker.close()
        trained = {
            name: tensor.clone()
            for member in swarm.members.values()
            for name, tensor in member.worker.engine.stage.state_dict().items()
        }
        losses = [e.event.loss for e in head.events if isinstance(e.event, MicrobatchDone)]
        assert [member.worker.engine.version for member in swarm.members.values()] == [STEPS] * stages

    plan = split(config, 1)[0]
    whole = StageEngine(
        build_stage(config, plan, loaded.manifest.run.seed),
        loaded.manifest.optimizer.inner(),
        plan,
        n_total_params=total_parameters(config),
        accumulation=accumulation,
        recompute=Recompute.KEEP,
        capacity=1,
    )
    expected = []
    for step in range(STEPS):
        for unit in range(accumulation):
            tokens = corpus.sample(step * accumulation + unit)
            loss, _ = whole.tail(unit, tokens[:, :-1], tokens[:, 1:])
            expected.append(loss)
        whole.step()
    assert losses == expected
    reference = whole.stage.state_dict()
    assert trained.keys() == reference.keys()
    assert all(torch.equal(trained[name], reference[name]) for name in reference)
    assert expected[-1] < expected[0] - 0.5
