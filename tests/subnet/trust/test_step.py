"""Steps that torch's optimizers took, honestly and otherwise, and what the arithmetic of a stretch says of them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.layout import Layout, Place
from model.optimizer import (
    Kind,
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    learning_rate,
    nano_optimizer,
    takes_muon,
)
from model.split import split
from model.stage import Stage, build_stage, flatten
from subnet.trust.step import Entered, Stretch, Values, entered, gradient_error, moments_beside, spans_of, step_error
from subnet.trust.tree import PIECE_VALUES

_MODEL = ModelConfig(
    vocab=48,
    hidden=16,
    layers=3,
    heads=2,
    kv_heads=2,
    ffn=24,
    context=16,
    boundary=BoundaryConfig(form=BoundaryForm.A, width=8),
)
_PLANS = split(_MODEL, 3)
_ADAMW = OptimizerConfig(kind="adamw", lr=4e-3, weight_decay=0.1, warmup_steps=5)
_NADAM = replace(_ADAMW, kind="nadam")
_KINDS = pytest.mark.parametrize("config", [_ADAMW, _NADAM], ids=["adamw", "nadam"])


@given(st.lists(st.tuples(st.integers(1, 3 * PIECE_VALUES), st.booleans()), min_size=1, max_size=6), st.data())
def test_a_step_on_some_pieces_takes_the_moments_of_their_values_and_no_piece_more(
    parameters: list[tuple[int, bool]], data: st.DataObject
) -> None:
    layout = laid_out(parameters)
    adaptive = np.repeat(*np.array(parameters).T[::-1]).astype(bool)
    number = layout.values + np.cumsum(adaptive) - 1
    count = -(-layout.values // PIECE_VALUES)
    pieces = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    beside = moments_beside(sorted(pieces), layout)
    inside = np.concatenate([np.arange(piece * PIECE_VALUES, (piece + 1) * PIECE_VALUES) for piece in pieces])
    inside = inside[inside < layout.values]
    moments = np.concatenate([inside, number[inside][adaptive[inside]]])
    assert set(beside) == {int(value) for value in np.unique(moments // PIECE_VALUES)}
    assert list(beside) == sorted(beside)
    assert len(beside) <= 3 * len(pieces)
    assert sum(len(spans_of(piece, layout)[0]) for piece in range(count)) == layout.values
    assert sum(len(spans_of(piece, layout)[1]) for piece in range(count)) == adaptive.sum()
    assert layout.moments == layout.values + adaptive.sum()


def laid_out(parameters: list[tuple[int, bool]]) -> Layout:
    """Parameters of so many values, and whether they have second moments."""
    places, start, second = [], 0, 0
    for number, (size, adaptive) in enumerate(parameters):
        places.append(Place(str(number), (size,), start, second, adaptive))
        start, second = start + size, second + size * adaptive
    return Layout(tuple(places))


@dataclass
class Trained:
    """A stage that steps on gradients which it is given."""

    config: OptimizerConfig
    index: int = 1
    steps: int = 0

    def __post_init__(self) -> None:
        self.plan = _PLANS[self.index]
        self.stage: Stage = build_stage(_MODEL, self.plan, 5)
        self.optimizer = build_optimizer(self.config, self.stage, self.plan)
        self.count = flatten(self.stage).numel()

    @property
    def values(self) -> Values:
        return Values(flatten(self.stage), self._moment("exp_avg"), self._moment("exp_avg_sq"))

    def _moment(self, name: str) -> torch.Tensor:
        state = self.optimizer.state
        having = [p for n, p in self._named if name == "exp_avg" or not takes_muon(self.config.kind, n, p)]
        parts = [state[p][name] if p in state else torch.zeros_like(p) for p in having]
        return torch.cat([part.detach().reshape(-1) for part in parts])

    @property
    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return sorted(self.stage.named_parameters())

    def step(self, gradient: torch.Tensor, *, lr: float | None = None) -> tuple[Values, Values]:
        before = self.values
        parts = torch.split(gradient, [p.numel() for _, p in self._named])
        for (_, parameter), part in zip(self._named, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps) if lr is None else lr
        self.optimizer.step()
        self.steps += 1
        return before, self.values


def judge(
    trained: Trained, before: Values, after: Values, *, config: OptimizerConfig | None = None, steps: int | None = None
) -> tuple[Entered, float]:
    """Of the last step, on the whole stage."""
    config = config or trained.config
    stretch = Stretch.of(trained.stage, range(trained.count), config)
    number = trained.steps - 1 if steps is None else steps
    took = entered(before, after, config=config, plan=trained.plan)
    error = step_error(before, after, took, stretch, config=config, plan=trained.plan, steps=number)
    return took, error


def normal(trained: Trained, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(trained.count, generator=torch.Generator().manual_seed(seed))


def gradients(trained: Trained, count: int) -> Iterator[torch.Tensor]:
    """Of every size that fp32 has room for the square of, in all mixtures; sparse, constant and zero ones too."""
    generator = torch.Generator().manual_seed(7)
    for turn in range(count):
        sizes = torch.empty(trained.count).uniform_(-28, 12 if turn % 3 else -8, generator=generator)
        found = torch.randn(trained.count, generator=generator) * 10.0 ** (sizes if turn % 4 else sizes[0])
        if turn % 5 == 1:
            found[torch.rand(trained.count, generator=generator) < 0.9] = 0
        yield torch.zeros_like(found) if turn % 17 == 11 else found


CONFIGS = {
    f"{kind} {name}": replace(config, kind=kind)
    for kind in get_args(Kind)
    for name, config in {
        "as nano": nano_optimizer("nadam"),
        "no warm-up, no decay": OptimizerConfig(lr=4e-3, weight_decay=0.0),
        "short memory": OptimizerConfig(lr=4e-3, betas=(0.3, 0.5), warmup_steps=3),
        "no memory": OptimizerConfig(lr=4e-3, betas=(0.0, 0.0)),
        "long memory": OptimizerConfig(lr=1e-6, betas=(0.99, 0.9999)),
        "coarse": OptimizerConfig(lr=0.5, eps=1e-3, weight_decay=1.5),
        "fine eps": OptimizerConfig(lr=4e-3, eps=1e-15),
    }.items()
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_honest_step_follows_and_tells_its_gradient(kind: str) -> None:
    trained, worst = Trained(CONFIGS[kind], index=len(kind) % 3), 0.0
    stretch = Stretch.of(trained.stage, range(trained.count), trained.config)
    for gradient in gradients(trained, 80):
        before, after = trained.step(gradient)
        took, error = judge(trained, before, after)
        assert gradient_error(took, gradient, stretch) == 0.0, "rounding explains all of it"
        worst = max(worst, error)
    assert 0 < worst <= 1


@pytest.mark.parametrize("index", range(3))
def test_of_a_muon_step_all_is_seen_of_what_takes_adamw_and_nothing_of_matrices(index: int) -> None:
    config = replace(_ADAMW, kind="muon")
    trained = Trained(config, index=index)
    for turn in range(3):
        trained.step(normal(trained, turn))
    before, after = trained.step(normal(trained, 9))
    stretch = Stretch.of(trained.stage, range(trained.count), config)
    assert len(before.second) == int(stretch.adaptive.sum())
    assert judge(trained, before, after)[1] <= 1
    for place, adaptive in enumerate(stretch.adaptive.tolist()):
        if place % 97 == 0 or adaptive:
            moved = after.weights.index_add(0, torch.tensor([place]), torch.tensor([1e-3]))
            assert (judge(trained, before, replace(after, weights=moved))[1] > 1) == adaptive, place
    later = torch.nonzero(~stretch.adaptive).flatten()[:1]
    only = Stretch.of(trained.stage, range(int(later), int(later) + 1), config)
    one = [Values(x.weights[later], x.first[later], torch.empty(0)) for x in (before, after)]
    took = entered(*one, config=config, plan=trained.plan)
    assert step_error(*one, took, only, config=config, plan=trained.plan, steps=trained.steps - 1) == 0.0


@_KINDS
def test_long_after_the_first_step_it_still_follows(config: OptimizerConfig) -> None:
    """What torch keeps in fp32 over many steps, NAdam's product of momenta, is in the bound."""
    trained = Trained(replace(config, betas=(0.99, 0.999)), index=0)
    for turn in range(700):
        before, after = trained.step(normal(trained, turn, 1e-3))
        if turn % 50 == 49:
            assert judge(trained, before, after)[1] <= 1


Bend = Callable[[Values, Values], Values]
_17 = torch.tensor([17])
BENDS: dict[str, Bend] = {
    "weights that stay": lambda before, after: replace(after, weights=before.weights),
    "nothing stepped": lambda before, _: before,
    "half a step": lambda before, after: replace(after, weights=(before.weights + after.weights) / 2),
    "a step back": lambda before, after: replace(after, weights=2 * before.weights - after.weights),
    "moments that stay": lambda before, after: replace(after, first=before.first, second=before.second),
    "second moments that stay": lambda before, after: replace(after, second=before.second),
    "scaled second moments": lambda _, after: replace(after, second=after.second * 1.001),
    "other first moments": lambda _, after: replace(after, first=after.first * -1),
    "one weight moved": lambda _, after: replace(after, weights=after.weights.index_add(0, _17, torch.tensor([1e-4]))),
    "not a number": lambda _, after: replace(after, weights=after.weights * math.nan),
    "a negative second moment": lambda _, after: replace(after, second=-after.second),
    "an endless moment": lambda _, after: replace(after, first=after.first / 0.0),
}  # fmt: skip


@_KINDS
@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("warm", [0, 30], ids=["first step", "later"])
def test_what_is_shown_otherwise_does_not_follow(config: OptimizerConfig, bend: str, warm: int) -> None:
    trained = Trained(config)
    for turn in range(warm):
        trained.step(normal(trained, turn))
    before, after = trained.step(normal(trained, 99))
    assert judge(trained, before, after)[1] <= 1
    assert judge(trained, before, BENDS[bend](before, after))[1] > 1


@_KINDS
@pytest.mark.parametrize("warm", [0, 2, 30])
def test_another_rate_decay_or_beta_does_not_follow(config: OptimizerConfig, warm: int) -> None:
    others = {
        "rate": replace(config, lr=config.lr * 1.001),
        "decay": replace(config, weight_decay=0.0),
        "beta": replace(config, betas=(config.betas[0], 0.96)),
        "first beta": replace(config, betas=(0.91, config.betas[1])),
        "eps": replace(config, eps=1e-3),
        "kind": replace(config, kind="nadam" if config.kind == "adamw" else "adamw"),
    }
    for name, other in others.items():
        trained = Trained(other)
        for turn in range(warm):
            trained.step(normal(trained, turn))
        before, after = trained.step(normal(trained, 99))
        _, error = judge(trained, before, after, config=config)
        assert error > 1, name


@_KINDS
def test_another_number_of_steps_does_not_follow(config: OptimizerConfig) -> None:
    trained = Trained(config)
    for turn in range(8):
        before, after = trained.step(normal(trained, turn))
    assert judge(trained, before, after)[1] <= 1
    assert all(judge(trained, before, after, steps=number)[1] > 1 for number in (0, 3, 6, 8, 50, 2**32 - 1))


@_KINDS
def test_decay_is_that_of_each_value_own_parameter(config: OptimizerConfig) -> None:
    trained = Trained(config)
    before, after = trained.step(torch.zeros(trained.count))
    took, error = judge(trained, before, after)
    assert error <= 1
    stretch = Stretch.of(trained.stage, range(trained.count), config)
    assert {0.0, 0.1} == set(stretch.decay.tolist())
    swapped = replace(stretch, decay=0.1 - stretch.decay)
    assert step_error(before, after, took, swapped, config=config, plan=trained.plan, steps=0) > 1


def test_a_stretch_is_a_part_of_the_whole() -> None:
    trained = Trained(_ADAMW)
    whole = Stretch.of(trained.stage, range(trained.count), _ADAMW)
    for span in (range(1), range(5, 700), range(trained.count - 3, trained.count)):
        part = Stretch.of(trained.stage, span, _ADAMW)
        inside = slice(span.start, span.stop)
        assert torch.equal(part.decay, whole.decay[inside])
        assert torch.equal(part.rows, whole.rows[inside])
        assert torch.equal(part.parameters, whole.parameters[inside])
    for span in (range(0), range(trained.count - 1, trained.count + 1)):
        with pytest.raises(IndexError):
            Stretch.of(trained.stage, span, _ADAMW)
    rows = sum(p.numel() // p.shape[-1] for p in trained.stage.parameters())
    assert len(set(whole.rows.tolist())) == rows
    assert len(set(whole.parameters.tolist())) == len(list(trained.stage.parameters()))


# -- the gradient -----------------------------------------------------------------------------------------------------

TOLERANCE = 0.02


@_KINDS
@pytest.mark.parametrize("warm", [0, 30], ids=["first step", "later"])
def test_another_gradient_than_the_replayed_one_is_seen(config: OptimizerConfig, warm: int) -> None:
    strange = torch.randn(Trained(config).count, generator=torch.Generator().manual_seed(3))
    others: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "zero": torch.zeros_like,
        "flipped": torch.neg,
        "scaled": lambda g: 1.05 * g,
        "noisy": lambda g: g + 0.05 * strange,
        "another unit's": lambda g: g.roll(1),
        "one unit of sixteen left out": lambda g: g - strange / 16,
        "signs alone": torch.sign,
    }  # fmt: skip
    for name, other in others.items():
        trained = Trained(config)
        for turn in range(warm):
            trained.step(normal(trained, turn))
        true = normal(trained, 99)
        before, after = trained.step(other(true))
        took, error = judge(trained, before, after)
        stretch = Stretch.of(trained.stage, range(trained.count), config)
        assert error <= 1, "the step itself is in order"
        assert gradient_error(took, true, stretch) > TOLERANCE, name
        assert gradient_error(took, other(true), stretch) == 0.0


def test_a_gradient_where_there_is_none_is_seen_however_small() -> None:
    config = _ADAMW
    trained = Trained(config, index=0)
    true = normal(trained, 1)
    stretch = Stretch.of(trained.stage, range(trained.count), config)
    embedding = [name for name, _ in sorted(trained.stage.named_parameters())].index("embedding.weight")
    silent = (stretch.parameters == embedding) & (stretch.rows % 2 == 0)
    true[silent] = 0
    took, error = judge(trained, *trained.step(true))
    assert error <= 1
    assert gradient_error(took, true, stretch) == 0
    trained = Trained(config, index=0)
    bent = torch.where(silent, 1e-9 * normal(trained, 2), true)
    took, error = judge(trained, *trained.step(bent))
    assert error <= 1
    assert gradient_error(took, true, stretch) == math.inf


def test_one_row_in_a_thousand_may_be_off_but_not_by_much() -> None:
    rows = 2_000
    count = rows * 4
    both = torch.ones(count, dtype=torch.bool)
    stretch = Stretch(range(count), torch.zeros(count), torch.arange(count) // 4, torch.zeros(count), both)
    true = torch.randn(count, generator=torch.Generator().manual_seed(0))
    took = true.double()
    took[:8] *= 1.1
    assert gradient_error(Entered(took, torch.zeros(1)), true, stretch) < TOLERANCE
    took[:8] *= 10
    assert gradient_error(Entered(took, torch.zeros(1)), true, stretch) > TOLERANCE


def test_what_is_not_finite_is_off_without_end() -> None:
    trained = Trained(_ADAMW)
    stretch = Stretch.of(trained.stage, range(trained.count), _ADAMW)
    true = normal(trained, 0)
    took, _ = judge(trained, *trained.step(true))
    assert gradient_error(took, true / 0, stretch) == math.inf
    assert gradient_error(replace(took, gradient=took.gradient * math.nan), true, stretch) == math.inf


def test_clipping_scales_what_is_too_long_and_nothing_else() -> None:
    for bound, values, expected in (
        (1.0, [3.0, 4.0], [0.6, 0.8]),
        (5.0, [3.0, 4.0], [3.0, 4.0]),
        (0.0, [3.0, 4.0], [3.0, 4.0]),
        (1.0, [math.inf, 4.0], [math.inf, 4.0]),
    ):
        gradients = [torch.tensor(values[:1]), torch.tensor(values[1:])]
        norm, clipped = clip_gradients(gradients, bound)
        assert clipped == (expected != values)
        assert math.isinf(norm) or norm == 5
        torch.testing.assert_close(torch.cat(gradients), torch.tensor(expected))
