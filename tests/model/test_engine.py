"""The engine: chains of stages equal one process bit for bit, and graphs never outlive their weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.accounting import stage_parameters, total_parameters
from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.engine import (
    CapacityError,
    DuplicateUnitError,
    EngineError,
    NonFiniteError,
    StageEngine,
    StateError,
    UnknownUnitError,
    replay_backward,
    replay_forward,
    replay_gradient,
    replay_tail,
)
from model.optimizer import OptimizerConfig, clip_gradients
from model.recompute import Recompute
from model.split import split
from model.stage import StageInputError, build_stage, flatten, weights_digest
from scripts.bench.storages import Storages

_CONFIG = ModelConfig(vocab=64, hidden=32, layers=4, heads=4, kv_heads=2, ffn=48, context=16)
_FORM_A = replace(_CONFIG, boundary=BoundaryConfig(form=BoundaryForm.A, width=8))
_FORM_T = replace(_CONFIG, boundary=BoundaryConfig(form=BoundaryForm.T, width=8, rank=4, pairs=50))
_ADAMW = OptimizerConfig(lr=3e-3, clip=0)


def _engines(
    config: ModelConfig,
    stages: int,
    *,
    optimizer: OptimizerConfig = _ADAMW,
    recompute: Recompute = Recompute.KEEP,
    accumulation: int = 4,
    capacity: int = 4,
    graphs: int | None = None,
) -> list[StageEngine]:
    built = [build_stage(config, plan, seed=3) for plan in split(config, stages)]
    total = sum(p.numel() for stage in built for p in stage.parameters())
    return [
        StageEngine(
            stage, optimizer, stage.plan,
            n_total_params=total, accumulation=accumulation, recompute=recompute, capacity=capacity, graphs=graphs,
        )
        for stage in built
    ]  # fmt: skip


def _batch(number: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(number))
    return rows[:, :-1], rows[:, 1:]


def _unit(engines: list[StageEngine], number: int) -> float:
    """One microbatch through the chain and back."""
    tokens, targets = _batch(number)
    x = tokens
    for engine in engines[:-1]:
        x = engine.forward(number, x, tokens)
    loss, g = engines[-1].tail(number, x, targets, tokens)
    for engine in reversed(engines[:-1]):
        assert g is not None
        g = engine.backward(number, g)
    assert g is None
    return loss


def _weights(engines: list[StageEngine]) -> dict[str, Tensor]:
    return {name: p.detach() for engine in engines for name, p in engine.stage.named_parameters()}


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("stages", [2, 4])
def test_stages_in_a_chain_equal_one_process_bit_for_bit(stages: int, recompute: Recompute) -> None:
    solo, chain = _engines(_CONFIG, 1), _engines(_CONFIG, stages, recompute=recompute)
    for step in range(6):
        for unit in range(4):
            assert _unit(solo, 4 * step + unit) == _unit(chain, 4 * step + unit)
        versions = [engine.step().version for engine in [*solo, *chain]]
        assert versions == [step + 1] * (stages + 1)
    alone, together = _weights(solo), _weights(chain)
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    start = _weights(_engines(_CONFIG, 1))
    assert not any(torch.equal(alone[name], start[name]) for name in alone)


@pytest.mark.parametrize("config", [_CONFIG, _FORM_A])
def test_keeping_graphs_and_recomputing_give_the_same_bits(config: ModelConfig) -> None:
    chains = [_engines(config, 3, recompute=recompute) for recompute in Recompute]
    for step in range(3):
        for unit in range(4):
            assert len({_unit(chain, 4 * step + unit) for chain in chains}) == 1
        for engines in zip(*chains, strict=True):
            assert len({engine.step() for engine in engines}) == 1
            assert len({weights_digest(engine.stage) for engine in engines}) == 1


def test_a_graph_kept_across_a_step_is_recomputed_with_the_new_weights() -> None:
    (engine, _), (fresh, _) = _engines(_FORM_A, 2, capacity=2), _engines(_FORM_A, 2)
    (early, _), (late, _) = _batch(0), _batch(1)
    y = engine.forward("early", early)
    engine.backward("late", torch.ones_like(engine.forward("late", late)))
    engine.step()
    assert engine.pending() == ("early",)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    engine.backward("early", g)

    fresh.load_state(engine.state())
    fresh.forward("early", early)
    fresh.backward("early", g)
    got = {name: p.grad for name, p in engine.stage.named_parameters()}
    for name, p in fresh.stage.named_parameters():
        assert p.grad is not None
        assert torch.equal(got[name], p.grad), name  # type: ignore[arg-type]


def test_weights_replaced_from_outside_drop_the_graphs() -> None:
    keep, full = (_engines(_FORM_A, 2, recompute=way)[0] for way in (Recompute.KEEP, Recompute.FULL))
    x, _ = _batch(0)
    for engine in (keep, full):
        y = engine.forward(0, x)
        assert engine.replace_weights(flatten(engine.stage) * 1.5) == 1
        engine.backward(0, torch.ones_like(y))
    pairs = zip(keep.stage.parameters(), full.stage.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)  # type: ignore[arg-type]


def test_a_version_names_one_set_of_weights_and_steps_count_on() -> None:
    """A version is used up by a unit, not by a replacement: no window between two versions stays empty."""
    head, tail = _engines(_FORM_A, 2, optimizer=replace(_ADAMW, warmup_steps=4))
    weights = flatten(tail.stage)
    assert [tail.replace_weights(weights * factor) for factor in (2, 3)] == [0, 0]
    x, targets = _batch(0)
    y = head.forward(0, x)
    tail.tail(0, y, targets)
    with pytest.raises(EngineError, match="1 units are accumulated"):
        tail.replace_weights(weights)
    report = tail.step()
    assert (report.version, tail.replace_weights(weights)) == (1, 1)
    tail.tail(1, y, targets)
    tail.discard_gradients()
    assert (tail.replace_weights(weights), tail.steps) == (2, 1)
    tail.tail(2, y, targets)
    assert tail.step().lr == pytest.approx(2 / 4 * _ADAMW.lr)
    assert (tail.version, tail.steps) == (3, 2)


@pytest.mark.parametrize("config", [_FORM_A, _FORM_T], ids=["a", "t"])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_replay_gives_the_miners_bits_and_leaves_no_trace(recompute: Recompute, config: ModelConfig) -> None:
    head, body, tail = _engines(config, 3, recompute=recompute)
    x, targets = _batch(0)
    first = head.forward(0, x)
    second = body.forward(0, first, x)
    loss, g = tail.tail(0, second, targets, x)
    assert g is not None
    dx = body.backward(0, g)
    assert dx is not None
    auditor = build_stage(config, body.plan, seed=3)
    assert torch.equal(replay_forward(auditor, first, x), second)
    replayed = replay_backward(auditor, first, g, x)
    assert replayed is not None
    assert torch.equal(replayed, dx)
    assert all(p.grad is None for p in auditor.parameters())
    assert replay_backward(build_stage(config, head.plan, seed=3), x, dx) is None
    last = build_stage(config, tail.plan, seed=3)
    value, gradient = replay_tail(last, second, targets, x, accumulation=4)
    assert value == loss
    assert gradient is not None
    assert torch.equal(gradient, g)


def test_the_cache_has_a_cap_and_keys_are_unique() -> None:
    head = _engines(_FORM_A, 2, capacity=2)[0]
    x, _ = _batch(0)
    g = torch.ones_like(head.forward("a", x))
    with pytest.raises(DuplicateUnitError, match="unit a is open already"):
        head.forward("a", x)
    head.forward("b", x)
    with pytest.raises(CapacityError, match=r"2 units are open and capacity is 2: .* raise capacity"):
        head.forward("c", x)
    head.drop("a")
    head.forward("c", x)
    assert head.pending() == ("b", "c")
    with pytest.raises(UnknownUnitError, match="unit a is not open here"):
        head.drop("a")
    with pytest.raises(UnknownUnitError, match="unit a is not open here"):
        head.backward("a", g)


def _held(engine: StageEngine, numbers: range) -> list[bool]:
    """Whether a graph is held of each unit, which it opens: by the bytes that stay."""
    found = []
    for number in numbers:
        with Storages() as alive:
            engine.forward(number, _batch(number)[0])
            found.append(alive.bytes() > 8 * 2 * 16 * 32 * 4)
    return found


def test_so_many_graphs_are_held_and_the_other_units_are_recomputed() -> None:
    (few, _), (many, _) = _engines(_FORM_A, 2, graphs=1), _engines(_FORM_A, 2)
    assert _held(few, range(3)) == [True, False, False]
    assert _held(many, range(3)) == [True, True, True]
    for engine in (few, many):
        for number in range(3):
            engine.backward(number, torch.ones(2, 16, 8))
    gradients = [[p.grad for p in engine.stage.parameters() if p.grad is not None] for engine in (few, many)]
    assert len(gradients[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert _held(few, range(3, 5)) == [True, False]


def test_a_graph_that_the_next_step_would_drop_is_not_held() -> None:
    head = _engines(_FORM_A, 2, accumulation=3, capacity=8)[0]
    assert _held(head, range(5)) == [True, True, True, False, False]
    for number in range(2):
        head.backward(number, torch.ones(2, 16, 8))
    assert _held(head, range(5, 6)) == [False]
    head.backward(2, torch.ones(2, 16, 8))
    head.step()
    assert _held(head, range(6, 7)) == [False], "three units were opened before it"
    head.backward(3, torch.ones(2, 16, 8))
    head.drop(4)
    head.drop(5)
    assert _held(head, range(7, 9)) == [True, False]


@pytest.mark.parametrize("g", [torch.ones(2, 16, 7), torch.ones(2, 16, 8, dtype=torch.float64), torch.ones(2, 8)])
def test_a_gradient_that_does_not_fit_changes_nothing(g: Tensor) -> None:
    head = _engines(_FORM_A, 2)[0]
    head.forward(0, _batch(0)[0])
    with pytest.raises(EngineError, match=r"gradient of unit 0 is .* \(2, 16, 8\) is needed"):
        head.backward(0, g)
    assert head.pending() == (0,)
    assert head.units_accumulated == 0


def test_an_input_that_does_not_fit_opens_no_unit() -> None:
    head = _engines(_FORM_A, 2)[0]
    with pytest.raises(StageInputError):
        head.forward(0, torch.zeros(2, 16, 8))
    assert head.pending() == ()


def test_gradients_that_are_not_finite_are_refused() -> None:
    head = _engines(_FORM_A, 2)[0]
    before = weights_digest(head.stage)
    y = head.forward(0, _batch(0)[0])
    head.backward(0, torch.full_like(y, float("nan")))
    report = head.step()
    assert (report.finite, report.version, head.version) == (False, 1, 1)
    assert weights_digest(head.stage) == before
    assert head.units_accumulated == 0
    assert all(p.grad is None for p in head.stage.parameters())


def test_a_loss_that_is_not_finite_keeps_no_gradient() -> None:
    tail = _engines(_FORM_A, 2)[1]
    x, targets = torch.full((2, 16, 8), float("inf")), _batch(0)[1]
    with pytest.raises(NonFiniteError, match="loss of unit 9 is nan"):
        tail.tail(9, x, targets)
    assert tail.units_accumulated == 0
    assert all(p.grad is None for p in tail.stage.parameters())


def test_a_step_clips_at_the_stage_share_and_reports() -> None:
    free, bound = (_engines(_CONFIG, 2, optimizer=replace(_ADAMW, clip=clip, warmup_steps=2))[1] for clip in (0, 1e-3))
    x, targets = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)), _batch(0)[1]
    with pytest.raises(EngineError, match="no unit has been accumulated"):
        free.step()
    for engine in (free, bound):
        engine.tail(0, x, targets)
    first, second = free.step(), bound.step()
    assert first.grad_norm == second.grad_norm > 1e-3
    assert (first.clipped, second.clipped) == (False, True)
    assert first.lr == pytest.approx(1.5e-3)
    moments = [
        torch.cat([value.flatten() for name, value in engine.state().items() if name.endswith("exp_avg")])
        for engine in (free, bound)
    ]
    part = stage_parameters(_CONFIG, bound.plan) / total_parameters(_CONFIG, 2)
    share = 1e-3 * part**0.5
    assert part < 1
    assert float(moments[1].norm()) == pytest.approx(0.1 * share, rel=1e-4)
    torch.testing.assert_close(moments[0] / moments[0].norm(), moments[1] / moments[1].norm())


def test_discarded_gradients_leave_no_trace() -> None:
    engines = _engines(_FORM_A, 2)
    _unit(engines, 0)
    for engine in engines:
        engine.discard_gradients()
        assert engine.units_accumulated == 0
    clean = _engines(_FORM_A, 2)
    for chain in (engines, clean):
        _unit(chain, 1)
    pairs = zip(_weights(engines).values(), _weights(clean).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [e.step() for e in engines] == [e.step() for e in clean]


@pytest.mark.parametrize("kind", ["adamw", "nadam"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_restored_engine_continues_bit_for_bit(kind: str, steps: int) -> None:
    optimizer = OptimizerConfig(kind=kind, lr=3e-3)  # type: ignore[arg-type]
    run, restored = (_engines(_FORM_A, 2, optimizer=optimizer) for _ in range(2))
    _unit(restored, 99)
    for step in range(steps):
        _unit(run, step)
        for engine in run:
            engine.step()
    for engine, other in zip(run, restored, strict=True):
        other.load_state({name: value.clone() for name, value in engine.state().items()})
        assert (other.version, other.units_accumulated, other.pending()) == (steps, 0, ())
    for chain in (run, restored):
        _unit(chain, 50)
    assert [engine.step() for engine in run] == [engine.step() for engine in restored]
    states = zip(run, restored, strict=True)
    assert all(torch.equal(v, b.state()[k]) for a, b in states for k, v in a.state().items())


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    head, tail = _engines(_FORM_A, 2)
    before = weights_digest(head.stage)
    with pytest.raises(StateError, match=r"state lacks 'weights\.embedding\.weight'"):
        head.load_state(tail.state())
    with pytest.raises(StateError, match=r"state holds 'weights\.more'"):
        head.load_state({**head.state(), "weights.more": torch.zeros(1)})
    with pytest.raises(StateError, match=r"of shape \(3,\)"):
        head.load_state({**head.state(), "weights.embedding.weight": torch.zeros(3)})
    assert weights_digest(head.stage) == before


def test_a_stage_that_restores_tokens_refuses_to_do_without() -> None:
    head, body = _engines(_FORM_T, 3)[:2]
    x, _ = _batch(0)
    y = head.forward(0, x)
    with pytest.raises(StageInputError, match=r"stage 1 restores tokens and got none; it takes int64 \(2, 16\)"):
        body.forward(0, y)
    with pytest.raises(StageInputError, match=r"got torch.int64 \(2, 15\)"):
        body.forward(0, y, x[:, 1:])
    assert body.pending() == ()


def test_the_last_stage_takes_tail_not_forward() -> None:
    with pytest.raises(EngineError, match="call tail"):
        _engines(_FORM_A, 2)[1].forward(0, torch.zeros(2, 16, 8))
    with pytest.raises(EngineError, match="accumulation is 0"):
        _engines(_FORM_A, 2, accumulation=0)


@pytest.mark.parametrize("config", [_FORM_A, _FORM_T], ids=["a", "t"])
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_a_replayed_gradient_is_the_one_that_the_step_takes_in(clip: float, config: ModelConfig) -> None:
    engines = _engines(config, 3)
    for number in range(3):
        _unit(engines, number)
    units: list[list[tuple[Tensor, Tensor, Tensor | None]]] = [[], [], []]
    for number in range(3):
        x, targets = _batch(number)
        ys = [x]
        for engine in engines[:-1]:
            ys.append(replay_forward(engine.stage, ys[-1], x))
        _, g = replay_tail(build_stage(config, engines[-1].plan, seed=3), ys[-1], targets, x, accumulation=4)
        units[-1].append((ys[-1], targets, x))
        for stage in (1, 0):
            assert g is not None
            units[stage].append((ys[stage], g, x))
            g = replay_backward(build_stage(config, engines[stage].plan, seed=3), ys[stage], g, x)
    for engine, replayed in zip(engines, units, strict=True):
        true = [p.grad.clone() for _, p in sorted(engine.stage.named_parameters()) if p.grad is not None]
        norm, clipped = clip_gradients(true, clip)
        assert clipped == (clip > 0)
        stage = build_stage(config, engine.plan, seed=3)
        gradient, its_norm = replay_gradient(stage, replayed, accumulation=4, clip=clip)
        assert its_norm == norm
        assert torch.equal(gradient, torch.cat([g.reshape(-1) for g in true]))
        assert all(p.grad is None for p in stage.parameters())
