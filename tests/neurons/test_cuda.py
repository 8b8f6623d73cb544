"""On a machine with a GPU (`pytest -m gpu`): a card computes what a CPU does, runs out of memory, mines and is paid."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.accounting import total_parameters
from model.config import ModelConfig, preset
from model.engine import StageEngine
from model.optimizer import OptimizerConfig
from model.recompute import Recompute
from model.relief import Relief
from model.split import StagePlan, split
from model.stage import build_stage, flatten
from neurons.ferry import CudaFerry
from neurons.machine import card, device_of
from neurons.telemetry import StageFitted, read_events
from scripts.manifests import TOLERANCE
from subnet.trust.audit import increment_error, straight
from subnet.trust.step import Stretch, Values, entered, step_error
from tests.scripts.test_localnet import SMALL, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
ADAMW = OptimizerConfig(lr=1e-3)
WIDE = ModelConfig(vocab=512, hidden=512, layers=8, heads=8, kv_heads=2, ffn=1536, context=1024)
"""A unit's graph of some hundred megabytes, next to weights of a tenth of that."""


@pytest.fixture(autouse=True)
def _all_memory_afterwards() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    torch.cuda.empty_cache()


def engine_on(
    device: torch.device, config: ModelConfig, plan: StagePlan, *, recompute: Recompute = Recompute.KEEP
) -> StageEngine:
    return StageEngine(
        build_stage(config, plan, 3, device=device), ADAMW, plan,
        n_total_params=total_parameters(config, plan.count), accumulation=4, recompute=recompute, capacity=4,
    )  # fmt: skip


def unit(config: ModelConfig, plan: StagePlan, number: int, *, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, gradient, tokens and targets, as they come from the wire."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(config.vocab, (batch, config.context + 1), generator=generator)
    x, g = (
        torch.randn(batch, config.context, config.boundary_width, generator=generator).bfloat16().float()
        for _ in range(2)
    )
    return (rows[:, :-1] if plan.is_first else x), g, rows[:, :-1], rows[:, 1:]


def computed(engine: StageEngine, config: ModelConfig, number: int) -> list[Tensor]:
    """All that leaves the stage for one unit, in host memory and the wire's dtype; the loss first at the tail."""
    there = engine.device
    x, g, tokens, targets = (tensor.to(there) for tensor in unit(config, engine.plan, number))
    if engine.plan.is_last:
        loss, dx = engine.tail(number, x, targets, tokens)
        out = [torch.tensor(loss), dx]
    else:
        out = [engine.forward(number, x, tokens), engine.backward(number, g)]
    return [tensor.bfloat16().float().cpu() for tensor in out if tensor is not None]


@pytest.mark.parametrize("index", range(4))
def test_a_card_sends_on_what_a_cpu_does_within_the_tolerance_of_audits(index: int) -> None:
    config = preset("nano")
    plan = split(config, 4)[index]
    engines = [engine_on(device, config, plan) for device in (CPU, CUDA)]
    for number in range(4):
        x, g, _, _ = unit(config, plan, number)
        expected, found = (computed(engine, config, number) for engine in engines)
        carried = [None, None] if plan.is_last else [None if plan.is_first else x, g]
        for true, claimed, carry in zip(expected, found, carried, strict=False):
            if true.dim():
                assert increment_error(claimed, true, straight(carry, true, carries=config.carries)) <= TOLERANCE
            else:
                torch.testing.assert_close(claimed, true, rtol=TOLERANCE, atol=0)


def test_a_step_on_a_card_is_within_what_rounding_explains() -> None:
    config = preset("nano")
    plan = split(config, 4)[1]
    engine = engine_on(CUDA, config, plan)
    count = engine.layout.values

    def state() -> Values:
        moments = engine.moments()
        assert moments.device == flatten(engine.stage).device == CPU
        return Values(flatten(engine.stage), moments[:count], moments[count:])

    stretch = Stretch.of(engine.stage, range(count), ADAMW)
    for step in range(3):
        before = state()
        for number in range(4):
            computed(engine, config, 4 * step + number)
        engine.step()
        after = state()
        took = entered(before, after, config=ADAMW, plan=plan)
        assert step_error(before, after, took, stretch, config=ADAMW, plan=plan, steps=step) <= 1


def test_state_and_weights_pass_through_host_memory() -> None:
    config = preset("nano")
    plan = split(config, 4)[2]
    one, other = engine_on(CUDA, config, plan), engine_on(CUDA, config, plan)
    computed(one, config, 0)
    one.step()
    assert all(tensor.device == CPU for tensor in one.state().values())
    other.load_state(one.state())
    assert torch.equal(flatten(one.stage), flatten(other.stage))
    assert torch.equal(one.moments(), other.moments())
    other.replace_weights(torch.zeros(one.layout.values))
    assert other.device == CUDA
    assert not flatten(other.stage).any()


def test_inputs_arrive_while_the_card_computes() -> None:
    ferry = CudaFerry(CUDA, torch.float32, torch.bfloat16)
    a = torch.randn(8192, 8192, device=CUDA)
    take = ferry.board(torch.ones(2, 1024, 144))  # what starts only once is over then
    take()
    torch.cuda.synchronize()
    for _ in range(50):
        a = a @ a
    busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
    busy.record()
    take = ferry.board(torch.full((2, 1024, 144), 3.0))
    ferry._inward.synchronize()
    assert not busy.query()
    assert bool((take() == 3).all())


def gradients(engine: StageEngine) -> list[Tensor]:
    """What four units that are open at once add up to."""
    units = [[tensor.to(engine.device) for tensor in unit(WIDE, engine.plan, number, batch=4)] for number in range(4)]
    for number, (x, _, tokens, _) in enumerate(units):
        engine.forward(number, x, tokens)
    for number, (_, g, _, _) in enumerate(units):
        engine.backward(number, g)
    return [p.grad.cpu() for p in engine.stage.parameters() if p.grad is not None]


def test_a_card_without_memory_steps_down_and_adds_up_the_same_gradients() -> None:
    plan = split(WIDE, 2)[0]

    def run(recompute: Recompute, told: list[Relief]) -> tuple[list[Tensor], StageEngine, int]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(CUDA)
        engine = engine_on(CUDA, WIDE, plan, recompute=recompute)
        engine.relieved = told.append
        found = gradients(engine)
        return found, engine, torch.cuda.max_memory_reserved(CUDA)

    told: list[Relief] = []
    _, _, whole = run(Recompute.KEEP, told)
    expected, _, least = run(Recompute.FULL, told)
    assert not told
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((least + (whole - least) / 4) / total, CUDA)
    found, engine, _ = run(Recompute.KEEP, told)
    assert told
    assert "CUDA out of memory" in told[0].reason
    assert engine.holding == told[-1].after
    assert engine.units_accumulated == 4
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


def test_auto_is_the_first_card() -> None:
    device = device_of("auto")
    assert device == CUDA
    found = card(device)
    assert found is not None
    assert 0 < found.free <= found.memory


@pytest.mark.alone
def test_a_swarm_whose_miners_share_a_card_trains_and_is_paid(tmp_path: Path) -> None:
    out = tmp_path / "run"
    output, _ = (process := start(out, *SMALL, "--device", "cuda")).communicate()
    logs = "\n".join(path.read_text()[-2000:] for path in sorted((out / "logs").glob("*.log")))
    assert process.returncode == 0, output + logs
    result = json.loads((out / "summary.json").read_text())
    assert result["complete"]
    assert result["microbatches"]["lost"] == 0
    assert result["audits"]["failed"] == 0
    assert result["audits"]["passed"] > 0
    assert result["replicas_identical"]
    assert result["loss"]["validation_last"] < result["loss"]["validation_first"] - 0.1
    for path in (out / "events").glob("miner-*.jsonl"):
        fitted = [stamped.event for stamped in read_events(path.read_text().splitlines())]
        assert [event.device for event in fitted if isinstance(event, StageFitted)] == ["cuda:0"]
