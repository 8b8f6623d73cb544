"""Steps that Muon took, honestly on all kinds of devices and otherwise, and what a look at one matrix says of them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import model.muon
from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.layout import Layout, Place
from model.muon import COEFFICIENTS, Muon
from model.optimizer import OptimizerConfig, build_optimizer, learning_rate
from model.split import split
from model.stage import build_stage, flatten
from subnet.trust.audit import POOL
from subnet.trust.polar import Look, Moved, look_pieces, polar_error, select_look
from subnet.trust.pool import Pool
from subnet.trust.tree import PIECE_VALUES, pieces_in, pieces_of

MODEL = ModelConfig(
    vocab=48,
    hidden=96,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn=256,
    context=16,
    boundary=BoundaryConfig(form=BoundaryForm.A, width=12),
)
PLANS = split(MODEL, 2)
CONFIG = OptimizerConfig(kind="muon", lr=4e-3, betas=(0.95, 0.95), weight_decay=0.1, warmup_steps=5)
TOLERANCE = 0.02
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Trained:
    """A stage that steps on gradients which it is given."""

    config: OptimizerConfig = CONFIG
    index: int = 1
    steps: int = 0

    def __post_init__(self) -> None:
        self.plan = PLANS[self.index]
        self.stage = build_stage(MODEL, self.plan, 5)
        self.layout = Layout.of(self.stage, "muon")
        self.optimizer = build_optimizer(self.config, self.stage, self.plan)
        self.named = sorted(self.stage.named_parameters())

    def first(self) -> torch.Tensor:
        state = self.optimizer.state
        return torch.cat(
            [state[p]["exp_avg"].flatten() if p in state else torch.zeros(p.numel()) for _, p in self.named]
        )

    def step(self, gradient: torch.Tensor, *, lr: float | None = None) -> tuple[torch.Tensor, ...]:
        """Weights and first moments before and after it."""
        before = flatten(self.stage), self.first()
        parts = torch.split(gradient, [p.numel() for _, p in self.named])
        for (_, p), part in zip(self.named, parts, strict=True):
            p.grad = part.view_as(p).clone()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps) if lr is None else lr
        self.optimizer.step()
        self.steps += 1
        return *before, flatten(self.stage), self.first()

    def looks(self) -> Iterator[Look]:
        for place in self.layout.matrices:
            for piece in pieces_in(place.span):
                yield Look(place, piece)


def errors(
    trained: Trained,
    shown: tuple[torch.Tensor, ...],
    *,
    config: OptimizerConfig | None = None,
    steps: int | None = None,
    layout: Layout | None = None,
) -> list[float]:
    """Of the last step, at every look that there is."""
    weights, first, next_weights, next_first = shown
    found = []
    for look in trained.looks():
        span, whole = slice(look.span.start, look.span.stop), slice(look.place.start, look.place.span.stop)
        moved = Moved(weights[span], next_weights[span], first[whole], next_first[whole])
        number = trained.steps - 1 if steps is None else steps
        found.append(polar_error(moved, look, config=config or CONFIG, plan=trained.plan, steps=number))
    return found


def normal(trained: Trained, seed: int) -> torch.Tensor:
    """Gradients as networks have them: of each matrix few directions are large."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for place in trained.layout.places:
        if place.adaptive:
            parts.append(torch.randn(len(place.span), generator=generator))
            continue
        rank = min(place.shape)
        sizes = torch.logspace(0, -3, rank)
        u, v = (torch.randn(side, rank, generator=generator) / math.sqrt(side) for side in place.shape)
        parts.append((u * sizes @ v.mT).flatten())
    return torch.cat(parts)


def strange(trained: Trained, turn: int) -> torch.Tensor:
    """Of one direction, of few rows, none, tiny, huge, and with rows of every size."""
    g = normal(trained, turn)
    generator = torch.Generator().manual_seed(turn)
    match turn % 6:
        case 0:
            return torch.cat([g[p.start] * torch.ones(len(p.span)) for p in trained.layout.places])
        case 1:
            mask = [(torch.rand(p.shape[0], 1, generator=generator) < 0.3).expand(p.shape[0], -1) for p in _2d(trained)]
            return g * torch.cat([m.expand(*p.shape).flatten() for m, p in zip(mask, _2d(trained), strict=True)])
        case 2:
            return torch.zeros_like(g)
        case 3:
            return 1e-20 * g
        case 4:
            return 1e12 * g
        case _:
            sizes = [10 ** torch.empty(p.shape[0], 1).uniform_(-9, 1, generator=generator) for p in _2d(trained)]
            return g * torch.cat([s.expand(*p.shape).flatten() for s, p in zip(sizes, _2d(trained), strict=True)])


def _2d(trained: Trained) -> list[Place]:
    return [p if len(p.shape) == 2 else replace(p, shape=(*p.shape, 1)) for p in trained.layout.places]


@pytest.mark.parametrize("index", [0, 1])
def test_every_honest_step_in_fp32_follows(index: int) -> None:
    trained = Trained(index=index)
    for turn in range(12):
        assert max(errors(trained, trained.step(normal(trained, turn)))) < 1e-4
    for turn in range(12):
        assert max(errors(trained, trained.step(strange(trained, turn)))) < 1e-3, turn


def tf32(x: torch.Tensor) -> torch.Tensor:
    """To 10 bits of mantissa, as tensor cores take fp32 in."""
    bits = x.contiguous().view(torch.int32)
    return (bits + 0xFFF + ((bits >> 13) & 1) & ~0x1FFF).view(torch.float32)


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def rounded(product: Product, iterations: int = 5) -> Callable[[torch.Tensor], torch.Tensor]:
    """`model.muon.polar` with operands of matrix products rounded before."""

    def polar(matrix: torch.Tensor) -> torch.Tensor:
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.mT if tall else matrix
        x = x / x.norm().clamp_min(1e-7)
        a, b, c = COEFFICIENTS
        for _ in range(iterations):
            gram = product(x) @ product(x).mT
            x = a * x + product(b * gram + c * (product(gram) @ product(gram))) @ product(x)
        return x.mT if tall else x

    return polar


def with_polar(monkeypatch: pytest.MonkeyPatch, polar: Callable[[torch.Tensor], torch.Tensor], index: int = 1) -> float:
    """The least of the largest errors of a few steps that a miner took with another factor; the auditor has its own."""
    trained, worst = Trained(index=index), []
    for turn in range(6):
        with monkeypatch.context() as patch:
            patch.setattr(model.muon, "polar", polar)
            shown = trained.step(normal(trained, turn))
        worst.append(errors(trained, shown))
    return min(max(found) for found in worst)


def test_products_of_tensor_cores_follow_as_near_as_they_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    fp32, coarse, coarser = (with_polar(monkeypatch, rounded(product)) for product in (lambda x: x, tf32, bf16))
    assert fp32 < 1e-4 < coarse < TOLERANCE / 4
    assert 2 * coarse < coarser < 10 * TOLERANCE


@pytest.mark.parametrize("iterations", [0, 1, 4, 6])
def test_another_number_of_iterations_does_not_follow(monkeypatch: pytest.MonkeyPatch, iterations: int) -> None:
    assert with_polar(monkeypatch, rounded(lambda x: x, iterations)) > 10 * TOLERANCE


def test_nor_does_the_exact_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(matrix: torch.Tensor) -> torch.Tensor:
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u @ vt

    assert with_polar(monkeypatch, exact) > 5 * TOLERANCE


@pytest.mark.parametrize("kind", ["adamw", "nadam"])
@pytest.mark.parametrize("warm", [0, 30])
def test_adamw_in_its_place_does_not_follow_in_any_matrix(kind: str, warm: int) -> None:
    trained = Trained(replace(CONFIG, kind=kind))  # type: ignore[arg-type]
    for turn in range(warm):
        trained.step(normal(trained, turn))
    assert min(errors(trained, trained.step(normal(trained, 99)))) > 10 * TOLERANCE


@pytest.mark.parametrize("warm", [0, 2, 30])
@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1.05 * CONFIG.lr},
        {"lr": 0.5 * CONFIG.lr},
        {"weight_decay": 0.0},
        {"weight_decay": 0.3},
        {"warmup_steps": 200},
    ],
    ids=str,
)
def test_another_rate_or_decay_does_not_follow(change: dict[str, float], warm: int) -> None:
    trained = Trained(replace(CONFIG, **change))  # type: ignore[arg-type]
    for turn in range(warm):
        trained.step(normal(trained, turn))
    found = errors(trained, trained.step(normal(trained, 99)))
    assert min(found) > TOLERANCE


def test_the_decay_is_seen_where_weights_are_far_smaller_than_their_steps() -> None:
    """By norm alone it is lost: it is 0.5 % of the step."""
    other = replace(CONFIG, weight_decay=0.0)
    trained = Trained(other)
    with torch.no_grad():
        for p in trained.stage.parameters():
            p.mul_(0.1)
    shown = trained.step(normal(trained, 1))
    assert max(errors(trained, shown, config=other)) < 1e-4
    found = dict(zip(trained.looks(), errors(trained, shown), strict=True))
    assert all(error > TOLERANCE for look, error in found.items() if len(look.span) > 2_000), found


Bend = Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]
BENDS: dict[str, Bend] = {
    "weights that stay": lambda s: (s[0], s[1], s[0], s[3]),
    "nothing stepped": lambda s: (s[0], s[1], s[0], s[1]),
    "half a step": lambda s: (s[0], s[1], (s[0] + s[2]) / 2, s[3]),
    "a step back": lambda s: (s[0], s[1], 2 * s[0] - s[2], s[3]),
    "moments that stay": lambda s: (s[0], s[1], s[2], s[1]),
    "flipped moments": lambda s: (s[0], s[1], s[2], -s[3]),
    "another matrix' rows": lambda s: (s[0], s[1], s[2].roll(96), s[3]),
    "not a number": lambda s: (s[0], s[1], s[2] * math.nan, s[3]),
    "an endless moment": lambda s: (s[0], s[1], s[2], s[3] / 0.0),
}


@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("warm", [0, 30])
def test_what_is_shown_otherwise_does_not_follow(bend: str, warm: int) -> None:
    trained = Trained()
    for turn in range(warm):
        trained.step(normal(trained, turn))
    shown = trained.step(normal(trained, 99))
    assert max(errors(trained, shown)) < 1e-4
    assert min(errors(trained, BENDS[bend](shown))) > TOLERANCE


def test_the_first_steps_of_a_warm_up_and_the_end_of_a_schedule_follow_too() -> None:
    """Rates so small that fp32 rounds most of a step away, and none at all."""
    config = replace(CONFIG, warmup_steps=100_000)
    trained = Trained(config)
    for turn in range(3):
        assert max(errors(trained, trained.step(normal(trained, turn)), config=config)) < TOLERANCE
    over = replace(CONFIG, schedule="wsd", steps=10)
    trained = Trained(over)
    trained.steps = 10
    shown = trained.step(normal(trained, 1))
    assert torch.equal(shown[0], shown[2])
    assert max(errors(trained, shown, config=over)) == 0
    assert min(errors(trained, (*shown[:2], shown[2] + 1e-4, shown[3]), config=over)) == math.inf


@given(st.binary(min_size=1, max_size=8), st.integers(0, 2**32 - 1), st.sampled_from(["muon", "adamw"]))
def test_a_seed_names_one_matrix_and_all_that_a_look_at_it_takes(seed: bytes, version: int, kind: str) -> None:
    layout = Layout.planned(MODEL, PLANS[1], kind)  # type: ignore[arg-type]
    look = select_look(layout, seed=seed, hotkey="m", version=version)
    pool = Pool.of(layout, seed=seed, hotkey="m", version=version)
    if kind == "adamw":
        assert look is None
        return
    assert look is not None
    assert look.span
    assert look.place in layout.matrices
    assert {*pieces_in(look.span)} == {look.piece}
    assert look.piece in pool.weights
    assert {*pieces_in(look.place.span)} <= {*pool.moments}


def test_over_seeds_all_matrices_and_all_their_pieces_are_named() -> None:
    trained = Trained()
    named = {select_look(trained.layout, seed=b"%d" % seed, hotkey="m", version=1) for seed in range(600)}
    assert named == set(trained.looks())


def test_a_pool_of_a_large_stage_holds_one_matrix_whole_and_little_else() -> None:
    matrices = [Place(str(i), (1024, 4096), i << 22, 0, adaptive=False) for i in range(20)]
    layout = Layout(tuple(matrices))
    pool = Pool.of(layout, seed=b"s", hotkey="m", version=1)
    assert pieces_of(4 * layout.values) == 20 << 8
    assert POOL <= len(pool.weights) <= POOL + 1
    assert 256 + POOL / 2 < len(pool.moments) <= POOL + 256
    assert look_pieces(matrices[0]) == 2 * 256 + 3
    assert isinstance(Trained().optimizer, Muon)
    assert PIECE_VALUES * 256 == 1 << 22
