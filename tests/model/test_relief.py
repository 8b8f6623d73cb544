"""Out of memory: the allocator says no in the middle of a unit, and the numbers are those of a run with room."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
from torch import Tensor

from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.engine import OutOfRoomError, StageEngine
from model.optimizer import OptimizerConfig
from model.recompute import Recompute
from model.relief import Holding, Relief, out_of_memory
from model.split import split
from model.stage import Stage, build_stage, flatten
from model.transformer import Block

TOO_MUCH = 1 << 57
"""Bytes that no machine has: the allocator refuses them at once and takes nothing."""
CONFIG = ModelConfig(
    vocab=64, hidden=32, layers=6, heads=4, kv_heads=2, ffn=48, context=16,
    boundary=BoundaryConfig(form=BoundaryForm.T, width=8, rank=4),
)  # fmt: skip
UNITS, ACCUMULATION = 6, 3


@dataclass
class Appetite:
    """At which calls, from 0, more memory is asked for than there is."""

    forward: set[int] = field(default_factory=set)
    backward: set[int] = field(default_factory=set)
    called: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})

    def take(self, way: str) -> None:
        number = self.called[way]
        self.called[way] += 1
        if number in getattr(self, way):
            torch.empty(TOO_MUCH, dtype=torch.uint8)


class Eat(torch.autograd.Function):
    """The identity, hungry on both ways."""

    @staticmethod
    def forward(ctx: object, x: Tensor, appetite: Appetite) -> Tensor:
        ctx.appetite = appetite  # type: ignore[attr-defined]
        appetite.take("forward")
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[Tensor, None]:
        ctx.appetite.take("backward")  # type: ignore[attr-defined]
        return g, None


def hungry(stage: Stage, appetite: Appetite) -> None:
    """In the middle of the stage: when a backward comes there, some gradients are in place."""
    block = cast("Block", list(stage.layers.values())[len(stage.layers) // 2])
    inner: Callable[[Tensor], Tensor] = block.ffn.forward
    block.ffn.forward = lambda x: inner(Eat.apply(x, appetite))  # type: ignore[method-assign, no-untyped-call]


def engine_of(index: int, appetite: Appetite, *, recompute: Recompute = Recompute.KEEP, graphs: int = 4) -> StageEngine:
    plan = split(CONFIG, 2)[index]
    stage = build_stage(CONFIG, plan, seed=3)
    hungry(stage, appetite)
    return StageEngine(
        stage, OptimizerConfig(lr=3e-3), plan,
        n_total_params=100_000, accumulation=ACCUMULATION, recompute=recompute, capacity=4, graphs=graphs,
    )  # fmt: skip


def sample(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and a boundary tensor."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(CONFIG.vocab, (2, 17), generator=generator)
    return rows[:, :-1], rows[:, 1:], torch.randn(2, 16, CONFIG.boundary_width, generator=generator)


def train(engine: StageEngine) -> list[Tensor]:
    """All that a stage sends on in two steps, with three units open at a time, and what it then is."""
    sent: list[Tensor] = []
    for start in range(0, UNITS, ACCUMULATION):
        for number in range(start, start + ACCUMULATION):
            tokens, targets, x = sample(number)
            if engine.plan.is_last:
                loss, dx = engine.tail(number, x, targets, tokens)
                assert dx is not None
                sent += [torch.tensor(loss), dx]
            else:
                sent.append(engine.forward(number, tokens))
        for number in engine.pending():
            assert isinstance(number, int)
            assert engine.backward(number, sample(number)[2]) is None
        engine.step()
    return [*sent, flatten(engine.stage), engine.moments()]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    "appetite",
    [
        pytest.param(Appetite(forward={0}), id="first forward"),
        pytest.param(Appetite(forward={4}), id="later forward"),
        pytest.param(Appetite(backward={0}), id="first backward"),
        pytest.param(Appetite(backward={1, 2, 3}), id="one backward again and again"),
        pytest.param(Appetite(forward={2}, backward={4}), id="both ways"),
    ],
)
def test_who_steps_down_computes_the_same_bits(index: int, appetite: Appetite) -> None:
    calm = engine_of(index, Appetite())
    expected = train(calm)
    engine = engine_of(index, Appetite(appetite.forward, appetite.backward))
    told: list[Relief] = []
    engine.relieved = told.append
    found = train(engine)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(told) == len(appetite.forward) + len(appetite.backward)
    assert engine.holding == told[-1].after != calm.holding


def test_a_backward_that_dies_midway_has_added_some_gradients_and_adds_none_twice() -> None:
    engine = engine_of(0, Appetite(backward={0}))
    taken: list[bool] = []
    engine.relieved = lambda _: taken.extend(p.grad is not None for p in engine.stage.parameters())
    tokens, _, g = sample(0)
    engine.forward(0, tokens)
    engine.backward(0, g)
    assert any(taken)
    assert not all(taken)


def test_what_is_held_is_given_up_before_the_next_try() -> None:
    engine = engine_of(0, Appetite(forward={2}))
    tokens = sample(0)[0]
    engine.forward(0, tokens)
    engine.forward(1, tokens)
    held = [unit.y is not None for unit in engine._units.values()]
    engine.forward(2, tokens)
    assert held == [True, True]
    assert [unit.y is not None for unit in engine._units.values()] == [False, False, True]
    assert engine.holding == Holding(Recompute.SELECTIVE, 4)


def test_each_rung_takes_less_until_there_is_none() -> None:
    rung: Holding | None = Holding(Recompute.KEEP, 5)
    ladder = []
    while rung is not None:
        ladder.append((rung.recompute.value, rung.graphs))
        rung = rung.lower()
    assert ladder == [("keep", 5), ("selective", 5), ("selective", 2), ("selective", 1), ("full", 0)]
    assert Holding(Recompute.SELECTIVE, 0).lower() is None  # a tail's


def test_with_nothing_left_to_give_up_one_line_says_so() -> None:
    engine = engine_of(0, Appetite(forward={0}), recompute=Recompute.FULL)
    with pytest.raises(OutOfRoomError) as caught:
        engine.forward(0, sample(0)[0])
    line = str(caught.value)
    assert line.startswith("stage 0 is out of memory on cpu and has nothing left to give up (recompute full")
    assert "DefaultCPUAllocator" in line
    assert "\n" not in line
    assert engine.pending() == ()


def test_a_step_that_finds_no_memory_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(0, Appetite())
    tokens, _, g = sample(0)
    engine.forward(0, tokens)
    engine.backward(0, g)
    monkeypatch.setattr(engine._optimizer, "step", lambda: torch.empty(TOO_MUCH, dtype=torch.uint8))
    with pytest.raises(OutOfRoomError, match="nothing left"):
        engine.step()


def test_only_an_allocator_s_no_is_taken_for_one() -> None:
    engine = engine_of(0, Appetite())
    with pytest.raises(RuntimeError, match="shape"):
        engine.with_room(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    assert engine.holding.recompute is Recompute.KEEP
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(OutOfRoomError("can be retried by nobody"))
