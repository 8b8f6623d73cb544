"""Tensors to the device and back: nothing copied without need, faults in order, answers in order."""

import asyncio
import queue
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch

from model.config import preset
from model.engine import StageEngine
from model.optimizer import OptimizerConfig
from model.recompute import Recompute
from model.split import split
from model.stage import build_stage
from neurons.compute import ComputeThread, Lane
from neurons.ferry import CudaFerry, Ferry, HostFerry, ferry_of
from subnet.messages import WIRE_LIMIT
from subnet.transport.errors import NotFinite
from subnet.transport.synapse import tensor_bytes
from subnet.trust.ledger import digest

_CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def _ferry(device: str) -> Ferry:
    if device == "cuda":
        return CudaFerry(torch.device("cuda", 0), torch.float32, torch.bfloat16)
    return HostFerry(torch.float32, torch.bfloat16)


def _settled(ferry: Ferry) -> None:
    there = threading.Event()
    ferry.settle(there.set)
    assert there.wait(30)


def test_on_a_cpu_nothing_is_copied_that_is_not_cast() -> None:
    ferry = HostFerry(torch.float32, torch.float32)
    x, tokens = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)
    assert ferry.board(x)() is x
    assert ferry.board(tokens)() is tokens
    assert ferry.leave(x).landed().tensor is x


@pytest.mark.parametrize("device", ["cpu", _CUDA])
def test_what_boards_has_the_stage_s_dtype_and_what_leaves_the_wire_s(device: str) -> None:
    ferry = _ferry(device)
    x = torch.arange(6.0).to(torch.bfloat16).view(2, 3)
    there = ferry.board(x)()
    assert (there.dtype, there.device.type) == (torch.float32, device)
    assert ferry.board(torch.zeros(2, dtype=torch.int64))().dtype == torch.int64
    departure = ferry.leave(there + 1)
    ferry.keep_pace()
    ferry.keep_pace()
    _settled(ferry)
    landed = departure.landed()
    back = landed.tensor
    assert (back.dtype, back.device.type) == (torch.bfloat16, "cpu")
    assert torch.equal(back, x + 1)
    assert landed.digest == digest(tensor_bytes(back))


@pytest.mark.parametrize("device", ["cpu", _CUDA])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2 * WIRE_LIMIT])
def test_what_the_other_side_would_refuse_lands_as_a_fault(value: float, device: str) -> None:
    ferry = _ferry(device)
    good, bad = (ferry.leave(torch.full((4,), number, device=device)) for number in (1.0, value))
    _settled(ferry)
    with pytest.raises(NotFinite):
        bad.landed()
    assert good.landed().tensor.tolist() == [1.0] * 4


def test_the_stage_s_place_decides() -> None:
    plan = split(preset("pico"), 2)[0]
    engine = StageEngine(
        build_stage(preset("pico"), plan, 0),
        OptimizerConfig(lr=1e-3),
        plan,
        n_total_params=1,
        accumulation=1,
        recompute=Recompute.KEEP,
        capacity=1,
    )
    ferry = ferry_of(engine, torch.bfloat16)
    assert isinstance(ferry, HostFerry)
    assert ferry.board(torch.ones(1, dtype=torch.bfloat16))().dtype == torch.float32


async def test_a_job_is_answered_when_it_is_settled() -> None:
    waiting: queue.Queue[Callable[[], object]] = queue.Queue()
    compute = ComputeThread(name="test", settle=waiting.put)
    jobs = [compute.submit(Lane.FORWARD, index, partial(int, index)) for index in range(2)]
    answers = [await asyncio.to_thread(waiting.get, timeout=30) for _ in jobs]
    assert not any(job.done() for job in jobs)
    for answer in answers:
        answer()
    assert await asyncio.gather(*jobs) == [0, 1]
    compute.stop()
