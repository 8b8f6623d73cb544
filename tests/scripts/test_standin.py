"""Stand-in swarms: compute is held as long as asked for, bytes are real, a killed node comes back, spec files are
checked."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from model.split import split
from scripts.bench.standin.engine import Copies, Hold, StandInEngine, StandInStage, Times
from scripts.bench.standin.launch import free_ports
from scripts.bench.standin.spec import Spec, SpecError
from subnet.transport.memory import POOLED

Json = dict[str, Any]
STAGES = 3


def described(**changes: object) -> Json:
    nodes = STAGES * int(str(changes.get("replicas", 1)))
    ports = free_ports(nodes)
    return {
        "stages": STAGES,
        "replicas": 1,
        "forward": [0.01] * STAGES,
        "backward": [0.02] * STAGES,
        "accumulation": 4,
        "boundary": {"batch": 2, "sequence": 16, "width": 24},
        "nodes": [{"host": "127.0.0.1", "port": port} for port in ports],
        "steps": {"warm_up": 1, "microbatches": 6, "count": 2},
        **changes,
    }


def engine(stage: int, hold: Hold, *, seed: str = "0") -> StandInEngine:
    spec = Spec.model_validate(described())
    plan = split(spec.model, STAGES)[stage]
    built = StandInStage(spec.model, plan, Times(0.02, 0.05, 0.01), hold, seed=seed)
    optimizer = spec.manifest().manifest.optimizer.inner()
    return StandInEngine(built, optimizer, plan, accumulation=2, capacity=8)


def test_an_engine_holds_its_thread_and_gives_what_a_stage_gives() -> None:
    hold = Hold()
    body = engine(1, hold)
    x, g = torch.randn(2, 16, 24).bfloat16(), torch.randn(2, 16, 24).bfloat16()
    y = body.forward(7, x)
    assert hold.asked == pytest.approx(0.02)
    dx = body.backward(7, g)
    assert hold.asked == pytest.approx(0.07)
    assert dx is not None
    assert y.shape == dx.shape == x.shape
    assert bool(torch.isfinite(y).all())
    assert len(y.unique()) > y.numel() // 2
    before = body.stage.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    report = body.step()
    assert report.finite
    assert report.version == 1
    assert hold.asked == pytest.approx(0.08)
    assert hold.took >= hold.asked
    assert any(not torch.equal(value, before[name]) for name, value in body.stage.state_dict().items())


def test_a_tail_holds_for_both_and_a_head_has_no_gradient_to_send() -> None:
    hold = Hold()
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    loss, dx = engine(2, hold).tail(1, torch.randn(2, 16, 24).bfloat16(), tokens)
    assert loss == 1.0
    assert dx is not None
    assert hold.asked == pytest.approx(0.07)
    head = engine(0, hold)
    assert head.forward(1, tokens).shape == (2, 16, 24)
    assert head.backward(1, torch.randn(2, 16, 24).bfloat16()) is None


def test_no_two_tensors_are_alike() -> None:
    """Neither of one stage, nor of two that differ in their seeds only: in the bf16 in which they travel."""
    hold = Hold()
    hold.end()
    made = []
    for seed in ("0", "1"):
        body = engine(1, hold, seed=seed)
        made += [body.forward(key, torch.zeros(2, 16, 24, dtype=torch.bfloat16)) for key in range(8)]
    assert len({tensor.view(torch.int16).numpy().tobytes() for tensor in made}) == len(made)


def test_copies_hold_the_drawing_when_their_pages_are_used_again() -> None:
    drawing = torch.randn(POOLED, generator=torch.Generator().manual_seed(0)).bfloat16()
    copies = Copies(drawing)
    for mark in range(3):
        out = torch.frombuffer(copies.take(drawing.nbytes), dtype=torch.bfloat16)
        assert torch.equal(out[1:], drawing[1:])
        out[0] = mark
        del out
        assert copies.spare >= drawing.nbytes


def test_a_hold_that_is_ended_keeps_nobody() -> None:
    hold = Hold()
    hold.end()
    start = time.monotonic()
    hold(30.0)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"forward": [0.1]}, "forward has 1 entries, 3 are needed"),
        ({"steady": {"warm_up": 0.0, "seconds": 1.0}}, "exactly one of steady and steps"),
        ({"kills": [{"node": 0, "at": 0.0, "back_after": 0.0}]}, "kills need steady"),
        ({"boundary": {"batch": 0, "sequence": 1, "width": 1}}, "boundary.batch"),
        ({"bandwidth": 1}, "bandwidth"),
    ],
)
def test_a_spec_that_describes_no_swarm_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(described(**changes)))
    with pytest.raises(SpecError, match=told) as caught:
        Spec.load(path)
    assert "\n" not in str(caught.value)


@asynccontextmanager
async def processes(folder: Path, spec: Json, *groups: str) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """Every group of nodes in a process that is ready and was told to go."""
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    pipe = asyncio.subprocess.PIPE
    found = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "scripts.bench.standin", str(path), "--nodes", group, stdin=pipe, stdout=pipe
        )
        for group in groups
    ]
    try:
        for process in found:
            assert await line(process) == {"ready": True}
        for process in found:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
        yield found
        for process in found:
            assert process.stdin is not None
            process.stdin.close()
            assert await process.wait() == 0
    finally:
        for process in found:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def line(process: asyncio.subprocess.Process) -> Json:
    assert process.stdout is not None
    found: Json = json.loads(await process.stdout.readline())
    return found


@pytest.mark.alone
@pytest.mark.timeout(180)
async def test_steps_over_two_processes_and_a_link(tmp_path: Path) -> None:
    spec = described()
    for node in spec["nodes"]:
        node["link"] = {"latency_s": 0.01, "up_bps": 1e8, "down_bps": 2e8}
    async with processes(tmp_path, spec, "0", "1,2") as (head, rest):
        found = (await line(head))["nodes"]["0"]
        assert rest.stdin is not None
        rest.stdin.close()
        others = (await line(rest))["nodes"]
    # Two boundaries, each way, and both units of every stage.
    assert len(found["step_seconds"]) == 2
    assert min(found["step_seconds"]) > 4 * 0.01 + STAGES * 0.03
    assert len({sample for sample, _ in found["done"]}) == 3 * 6
    assert found["routes"]["forward"]["sent"] > 18 * 2 * 2 * 16 * 24
    assert {others[number]["counts"]["units"] for number in ("1", "2")} == {18}


@pytest.mark.alone
@pytest.mark.timeout(180)
async def test_a_killed_node_comes_back_and_the_swarm_goes_on(tmp_path: Path) -> None:
    kill = {"node": 2, "at": 1.0, "back_after": 0.5}
    spec = described(replicas=2, steady={"warm_up": 0.5, "seconds": 7.5}, kills=[kill])
    del spec["steps"]
    async with processes(tmp_path, spec, "0,1,2,3,4,5") as (process,):
        found = await line(process)
    assert [found["nodes"][str(node)]["lives"] for node in range(6)] == [1, 1, 2, 1, 1, 1]
    assert any(at > 1.5 for head in ("0", "1") for _, at in found["nodes"][head]["done"])
    assert sum(found["nodes"][str(node)]["routes"]["forward"]["failed"] for node in (0, 1)) > 0
    begin, end = found["window"]
    assert end - begin == pytest.approx(7.5, abs=1.0)
