"""The trainer of the comparison trains as stages of a swarm do."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.data import Corpus, ShardEntry, TokenShard
from model.optimizer import Kind
from model.split import split
from model.stage import build_stage, flatten
from scripts.bench.learning import training
from scripts.bench.learning.rows import Form, Row
from scripts.bench.learning.training import DivergedError, train


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the benchmark trains: models so small lose time in waiting for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ROW = Row(form="t", ratio=16, model="pico", hidden=64, optimizer="adamw", steps=27, accumulation=2)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    tokens = torch.randint(1_024, (60_000,), generator=torch.Generator().manual_seed(0)).clamp_max(40).numpy()
    entry = ShardEntry(name="tokens", sha256="", dtype="uint16")
    return Corpus([TokenShard(entry, tokens.astype("uint16"))], seed=0, batch=2, tokens=32)


def _trained(row: Row, corpus: Corpus, *, engines: bool) -> list[torch.Tensor]:
    stages = [build_stage(row.config(), plan, row.seed) for plan in split(row.config(), row.stages)]
    progress = (training._pipelined if engines else training._synchronous)(row, stages, corpus)
    assert list(progress) == list(range(1, row.steps + 1))
    return [flatten(stage) for stage in stages]


@pytest.mark.parametrize(("form", "optimizer"), [("t", "muon"), ("a", "adamw"), ("none+", "nadam")])
def test_one_graph_through_all_stages_trains_as_their_engines_do(form: Form, optimizer: Kind, corpus: Corpus) -> None:
    row = replace(ROW, form=form, ratio=1 if form == "none+" else 16, optimizer=optimizer, accumulation=1)
    for one, other in zip(*(_trained(row, corpus, engines=engines) for engines in (False, True)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_more_in_flight_is_another_training_on_the_same_samples(corpus: Corpus) -> None:
    deep, flat = (_trained(replace(ROW, depth=depth), corpus, engines=True) for depth in (7, 1))
    # The tail's first step sees what any depth would show it; heads step on gradients that others have overtaken.
    assert not torch.allclose(deep[0], flat[0], atol=1e-3)


def test_a_curve_ends_with_the_last_step_and_is_the_same_again(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "VALIDATION", 2)
    curve = train(ROW, corpus)
    assert [steps for steps, _ in curve.losses] == [7, 14, 21, 27]
    assert curve.final < curve.losses[0][1] < 7.5
    assert train(ROW, corpus).losses == curve.losses
    assert train(replace(ROW, seed=1), corpus).losses != curve.losses


def test_a_run_that_diverges_says_so(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object, **__: object) -> torch.Tensor:
        raise DivergedError

    monkeypatch.setattr(training, "_loss", diverge)
    assert train(ROW, corpus).final == float("inf")


def test_cut_stages_learn_nothing_but_the_last(corpus: Corpus) -> None:
    row = replace(ROW, form="cut", ratio=1)
    drawn = [flatten(build_stage(row.config(), plan, row.seed)) for plan in split(row.config(), row.stages)]
    trained = _trained(row, corpus, engines=False)
    for before, after in zip(drawn[:-1], trained[:-1], strict=True):
        shrunk = after / before
        assert shrunk.min() > 0.98, "weight decay takes a little"
        assert shrunk.max() < 1 + 1e-6, "and nothing else moves them"
    assert (trained[-1] / drawn[-1]).max() > 1.1


def test_samples_of_two_seeds_are_apart() -> None:
    first, second = (set(training._samples(replace(ROW, seed=seed))) for seed in (0, 1))
    assert len(first) == ROW.steps * ROW.accumulation
    assert not first & second


def test_a_grid_trains_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.bench.boundary import main

    grid = tmp_path / "grid.toml"
    grid.write_text('[[block]]\nforms = ["none", "t"]\nratios = [16]\noptimizers = ["muon"]\n')
    arguments = ["--grid", str(grid), "--results", str(tmp_path / "results.jsonl")]
    assert main([*arguments, "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
