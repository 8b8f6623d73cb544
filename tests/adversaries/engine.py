"""Engines of adversaries. Around them everything is the real miner's, so their ledgers are sound: leaves name the
digests of what was really sent, tensors are archived, windows and heads follow. Only an audit can tell.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from model.engine import CapacityError, DuplicateUnitError, StageEngine, _Unit
from model.optimizer import OptimizerConfig
from model.recompute import Recompute
from model.split import StagePlan
from model.stage import Stage
from subnet.trust.ledger import Direction
from tests.adversaries.kinds import Kind, Plan
from tests.adversaries.units import DISTORTIONS, Past, Result, Unit, Weights, distort, falsify


class Memory:
    """What a cheater keeps of earlier units and steps, as far as its kind needs it."""

    def __init__(self, plan: Plan, tokens: Callable[[], Tensor] | None = None) -> None:
        """`tokens` gives those of another sample, at a head."""
        self._plan = plan
        self._tokens = tokens
        self._weights: list[Weights] = []
        self._sent: dict[Direction, tuple[Tensor | None, float]] = {}
        self.siblings: dict[Direction, tuple[Tensor | None, float]] = {}
        """What a sibling sent, and its loss."""

    def stepped(self, stage: Stage) -> None:
        """A window begins."""
        if self._plan.kind is Kind.STALE_WEIGHTS:
            self._weights.append({name: p.detach().clone() for name, p in stage.named_parameters()})
            del self._weights[: -round(self._plan.strength) - 1]

    def sent(self, direction: Direction, output: Tensor | None, loss: float) -> None:
        """Something honest was sent; the first of a direction is kept."""
        if self._plan.kind is Kind.REPLAY:
            self._sent.setdefault(direction, (output, loss))

    def ready(self, direction: Direction) -> bool:
        """Whether there is anything to repeat, for a kind that repeats."""
        needed = {Kind.REPLAY: self._sent, Kind.COPYCAT: self.siblings}.get(self._plan.kind)
        return needed is None or direction in needed

    def of(self, direction: Direction) -> Past:
        """What there is for a unit of this direction."""
        output, loss = self._sent.get(direction, (None, 0.0))
        sibling, sibling_loss = self.siblings.get(direction, (None, 0.0))
        return Past(
            weights=self._weights[0] if len(self._weights) > self._plan.strength else None,
            output=output,
            loss=loss,
            sibling=sibling,
            sibling_loss=sibling_loss,
            tokens=self._tokens() if self._tokens is not None and self._plan.kind is Kind.WRONG_DATA else None,
        )


class CheatingEngine(StageEngine):
    """Falsifies units by its plan; what a falsified backward adds to its step is what its `Result` says."""

    def __init__(
        self,
        stage: Stage,
        optimizer_config: OptimizerConfig,
        plan: StagePlan,
        *,
        cheat: Plan,
        memory: Memory,
        n_total_params: int,
        accumulation: int,
        recompute: Recompute,
        capacity: int,
        graphs: int | None = None,
    ) -> None:
        """Keys of units are sample ids."""
        super().__init__(
            stage,
            optimizer_config,
            plan,
            n_total_params=n_total_params,
            accumulation=accumulation,
            recompute=recompute,
            capacity=capacity,
            graphs=graphs,
        )
        self._cheat = cheat
        self._memory = memory
        self._generator = torch.Generator().manual_seed(cheat.seed)
        memory.stepped(stage)

    def forward(self, key: Hashable, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        if self._cheats(key, Direction.FORWARD) and self._cheat.kind not in DISTORTIONS:
            sent = self._falsified(Unit(direction=Direction.FORWARD, x=x, restored=tokens)).output
            assert sent is not None
            self._hold(key, x, tokens)
            return sent
        y = super().forward(key, x, tokens)
        result = self._said(key, Direction.FORWARD, Result(output=y))
        assert result.output is not None
        return result.output

    def backward(self, key: Hashable, g: Tensor) -> Tensor | None:
        open_ = self._units.get(key)
        if open_ is None or not self._cheats(key, Direction.BACKWARD) or self._cheat.kind in DISTORTIONS:
            dx = super().backward(key, g)
            return self._said(key, Direction.BACKWARD, Result(output=dx)).output
        result = self._falsified(Unit(direction=Direction.BACKWARD, x=open_.x, g=g, restored=open_.tokens))
        self.drop(key)
        self._add(result)
        return result.output

    def tail(
        self, key: Hashable, x: Tensor, targets: Tensor, tokens: Tensor | None = None
    ) -> tuple[float, Tensor | None]:
        if self._cheats(key, Direction.BACKWARD) and self._cheat.kind not in DISTORTIONS:
            accumulation = self.accumulation
            unit = Unit(direction=Direction.BACKWARD, x=x, targets=targets, restored=tokens, accumulation=accumulation)
            result = self._falsified(unit)
            self._add(result)
        else:
            loss, dx = super().tail(key, x, targets, tokens)
            result = self._said(key, Direction.BACKWARD, Result(output=dx, loss=loss))
        return result.loss, result.output

    def _said(self, key: Hashable, direction: Direction, true: Result) -> Result:
        """What is said of a unit that was computed; one that is not distorted may be repeated later."""
        if self._cheat.kind in DISTORTIONS and self._cheats(key, direction):
            strength = self._cheat.strength
            return distort(self._cheat.kind, true, strength=strength, generator=self._generator)
        self._memory.sent(direction, true.output, true.loss)
        return true

    def _hold(self, key: Hashable, x: Tensor, tokens: Tensor | None) -> None:
        """Open a unit without computing it."""
        if key in self._units:
            raise DuplicateUnitError(f"unit {key} is open already: wait for its backward or drop it")
        if len(self._units) >= self.capacity:
            raise CapacityError(f"{len(self._units)} units are open and capacity is {self.capacity}")
        self._used = True
        self._units[key] = _Unit(x, tokens)

    def discard_gradients(self) -> None:
        super().discard_gradients()
        self._memory.stepped(self.stage)

    def _cheats(self, key: Hashable, direction: Direction) -> bool:
        assert isinstance(key, int)
        return self._memory.ready(direction) and self._cheat.cheats(
            version=self.version, sample=key, direction=direction
        )

    def _falsified(self, unit: Unit) -> Result:
        past = self._memory.of(unit.direction)
        strength = self._cheat.strength
        return falsify(self._cheat.kind, self.stage, unit, strength=strength, generator=self._generator, past=past)

    def _add(self, result: Result) -> None:
        """Count the unit. Where nothing was computed its gradient is zero: a step follows all the same."""
        self._used = True
        for name, parameter in self.stage.named_parameters():
            gradient = result.gradients.get(name)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if gradient is not None:
                parameter.grad += gradient
        self._accumulated += 1


class SharedEngine(StageEngine):
    """One of several identities on one GPU: it computes while no other process holds the device."""

    device: Path
    """A file that stands for it."""

    def forward(self, key: Hashable, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        with self._held():
            return super().forward(key, x, tokens)

    def backward(self, key: Hashable, g: Tensor) -> Tensor | None:
        with self._held():
            return super().backward(key, g)

    def tail(
        self, key: Hashable, x: Tensor, targets: Tensor, tokens: Tensor | None = None
    ) -> tuple[float, Tensor | None]:
        with self._held():
            return super().tail(key, x, targets, tokens)

    @contextmanager
    def _held(self) -> Iterator[None]:
        with self.device.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
