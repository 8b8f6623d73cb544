"""Trains the model of one row in this process, as a pipeline would: every stage on what crossed its boundary.

Synchronously (depth 1) one graph leads through all stages, with what crosses rounded as the wire rounds it, both ways.
With more microbatches in flight each stage has an engine of its own, as a miner has, and works in the order of a
pipeline whose hops all take the same time: a microbatch that leaves the head at time u is at stage s at u + s·h, and
its gradient is back there at u + (2(S-1) - s)·h, where h is chosen such that `depth` are in flight at the head. So
forwards and backwards meet other weights, as they do in a swarm.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.accounting import total_parameters
from model.data import Corpus
from model.engine import StageEngine
from model.optimizer import build_optimizer, clip_bound, clip_gradients, learning_rate
from model.recompute import Recompute
from model.split import split
from model.stage import Stage, build_stage
from scripts.bench.learning.rows import Row
from scripts.bench.learning.wire import Crossing, arrived

VALIDATION = 24
"""Held-out batches, spread over all that there are."""
POINTS = 4
"""How often the validation loss is taken on the way, the end included."""


CPU = torch.device("cpu")


class DivergedError(Exception):
    """A loss that is no number any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What came of a row."""

    losses: tuple[tuple[int, float], ...]
    """Steps done and validation loss, nats per token; infinite from where the run diverged."""
    parameters: int
    seconds: float

    @property
    def final(self) -> float:
        return self.losses[-1][1]


def train(row: Row, corpus: Corpus, device: torch.device = CPU) -> Curve:
    """The whole run of a row; samples are drawn by its seed."""
    config = row.config()
    stages = [build_stage(config, plan, row.seed).to(device) for plan in split(config, row.stages)]
    start = time.perf_counter()
    losses: list[tuple[int, float]] = []
    marks = {math.ceil(row.steps * (point + 1) / POINTS) for point in range(POINTS)}
    try:
        progress = _synchronous(row, stages, corpus) if row.depth == 1 else _pipelined(row, stages, corpus)
        losses.extend((done, validation_loss(row, stages, corpus)) for done in progress if done in marks)
    except DivergedError:
        losses.append((row.steps, math.inf))
    return Curve(
        losses=tuple(losses),
        parameters=sum(p.numel() for stage in stages for p in stage.parameters()),
        seconds=time.perf_counter() - start,
    )


@torch.no_grad()
def validation_loss(row: Row, stages: Sequence[Stage], corpus: Corpus) -> float:
    """Mean over held-out batches of the mean over tokens, through boundaries as the wire rounds them."""
    every = max(1, corpus.validation_samples // VALIDATION)
    count = min(VALIDATION, corpus.validation_samples)
    device = _device(stages)
    noise = torch.Generator(device)
    batches = (corpus.validation_sample(index * every).to(device) for index in range(count))
    losses = [float(_loss(row, stages, rows, noise)) for rows in batches]
    return sum(losses) / count


def _loss(row: Row, stages: Sequence[Stage], rows: Tensor, noise: torch.Generator) -> Tensor:
    tokens, targets = rows[:, :-1], rows[:, 1:]
    passed = 0.0 if row.form == "cut" else 1.0
    x = tokens
    for stage in stages[:-1]:
        x = Crossing.apply(stage(x, tokens), row.bits, noise, passed)  # type: ignore[no-untyped-call]
    return stages[-1].loss(x, targets, tokens)


def _device(stages: Sequence[Stage]) -> torch.device:
    return next(stages[0].parameters()).device


def _samples(row: Row) -> Iterator[int]:
    """Sample ids, apart from those of other seeds."""
    first = row.seed * 1_000_000
    return iter(range(first, first + row.steps * row.accumulation))


def _synchronous(row: Row, stages: Sequence[Stage], corpus: Corpus) -> Iterator[int]:
    """Steps done, after each."""
    inner = row.inner()
    optimizers = [build_optimizer(inner, stage, stage.plan) for stage in stages]
    counts = [sum(p.numel() for p in stage.parameters()) for stage in stages]
    bounds = [clip_bound(inner, count, sum(counts)) for count in counts]
    device = _device(stages)
    samples, noise = _samples(row), torch.Generator(device).manual_seed(row.seed)
    for step in range(row.steps):
        for _ in range(row.accumulation):
            loss = _loss(row, stages, corpus.sample(next(samples)).to(device), noise)
            if not math.isfinite(float(loss.detach())):
                raise DivergedError
            torch.autograd.backward(loss / row.accumulation)
        for stage, optimizer, bound in zip(stages, optimizers, bounds, strict=True):
            clip_gradients([p.grad for p in stage.parameters() if p.grad is not None], bound)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(inner, step)
            optimizer.step()
            optimizer.zero_grad()
        yield step + 1


def _pipelined(row: Row, stages: Sequence[Stage], corpus: Corpus) -> Iterator[int]:
    """Steps that the tail has done, after each; the others have done theirs when the last one is yielded."""
    total = total_parameters(row.config(), row.stages)
    engines = [
        StageEngine(
            stage,
            row.inner(),
            stage.plan,
            n_total_params=total,
            accumulation=row.accumulation,
            recompute=Recompute.KEEP,
            capacity=row.depth + 1,
        )
        for stage in stages
    ]
    last = len(engines) - 1
    hop = (row.depth - 1) / (2 * last)
    held: dict[int, Tensor] = {}
    device = _device(stages)
    noise = torch.Generator(device).manual_seed(row.seed)
    events = [(float(number), 1, 0, sample) for number, sample in enumerate(_samples(row))]
    heapq.heapify(events)
    steps = 0
    while events:
        now, _, index, sample = heapq.heappop(events)
        engine, rows = engines[index], corpus.sample(sample).to(device)
        tokens, targets = rows[:, :-1], rows[:, 1:]
        if index == last:
            loss, g = engine.tail(sample, held.pop(sample), targets, tokens)
            if not math.isfinite(loss):
                raise DivergedError
        elif sample in engine.pending():
            g = engine.backward(sample, held.pop(sample))
        else:
            y = engine.forward(sample, held.pop(sample, tokens), tokens)
            held[sample] = arrived(y, row.bits)
            heapq.heappush(events, (now + hop, 1, index + 1, sample))
            continue
        if g is not None:
            held[sample] = arrived(g, row.bits, noise)
            heapq.heappush(events, (now + hop, 0, index - 1, sample))
        if engine.units_accumulated == row.accumulation:
            engine.step()
            if index == last:
                steps += 1
                if steps < row.steps:
                    yield steps
    yield steps
