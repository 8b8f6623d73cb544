"""`orion simulate`: the nodes' own routing, depth, repair and merge under a virtual clock, beside the closed form.

The plan (`scripts.plan`) gives seconds, bytes and links of every stage; the simulation plays them out event by event.
docs/simulate.md says what is played and what is left out.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from model.accounting import FORMULA, stage_parameters
from model.config import ConfigError
from model.memory import DoesNotFitError
from model.split import split
from scripts.plan.options import PlanError, PlanOptions, Run, read
from scripts.plan.speed import Speed, plan_speed
from scripts.simulate.accounts import Idle
from scripts.simulate.merges import Played, play
from scripts.simulate.picture import Caption, PictureError, draw
from scripts.simulate.setting import Churn, Rounds, Setting, SettingError
from scripts.simulate.swarm import Result, failures_of, simulate
from scripts.simulate.timeline import Recorder
from subnet.commandline import FAILURE, USAGE
from subnet.quantities import QuantityError
from subnet.swarm.butterfly import ButterflyError
from subnet.swarm.downtime import DowntimeError
from subnet.swarm.pace import PaceError

CLOSE_UP = 16
"""Units of the slowest stage that the picture's close-up is long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """Flags of `orion simulate` beside the plan's."""

    minutes: float
    failures_per_hour: float
    ready_minutes: float
    seed: int
    picture: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A plan, and what became of it."""

    run: Run
    speed: Speed
    """By closed form, at the depth that heads keep."""
    setting: Setting
    result: Result
    merge: Played | None
    """None where nothing is merged, or not by the nodes among themselves."""

    @property
    def tokens_per_second(self) -> float:
        """Of all whole rounds, without what died unmerged; of the whole time, if it has no whole round."""
        rounds = self.setting.rounds.length
        seconds = rounds * (self.setting.seconds // rounds) or self.setting.seconds
        died = sum(units for at, units in self.result.unmerged if at <= seconds) / self.setting.stages
        return self.run.units.tokens * (self.result.rate(end=seconds) - died / seconds)

    @property
    def tokens_per_second_training(self) -> float:
        """Between a round's filling and its draining."""
        rounds, flight, seconds = self.setting.rounds, self.speed.pace.flight, self.setting.seconds
        completed, time, begins = 0.0, 0.0, 0.0
        while begins < seconds:
            start, end = begins + flight, min(seconds, begins + rounds.close - 1.5 * flight)
            if end > start:
                completed += (end - start) * self.result.rate(start, end)
                time += end - start
            begins += rounds.length
        return self.run.units.tokens * completed / time if time else math.nan

    @property
    def mfu(self) -> float:
        return self.speed.mfu * self.tokens_per_second / self.speed.tokens_per_second

    @property
    def hidden(self) -> float:
        """Share of a merge's time in which the next round trains."""
        if self.merge is None or not self.merge.seconds:
            return 0.0
        idle = self.setting.rounds.length - self.setting.rounds.close
        return max(0.0, self.merge.seconds - idle) / self.merge.seconds


def show_simulation(plan: PlanOptions, options: SimulateOptions, *, as_json: bool) -> int:
    """Print it and draw it; 1 if it does not fit or cannot be drawn, 2 if the options describe no swarm."""
    try:
        run, speed, setting = prepare(plan, options)
        recorder = None if options.picture is None else _recorder(setting, speed)
        played = _merge(run, options.seed)
        result = simulate(setting, recorder, transfers=() if played is None else played.transfers)
        simulation = Simulation(run=run, speed=speed, setting=setting, result=result, merge=played)
        if recorder is not None and options.picture is not None:
            draw(recorder, result, _caption(plan, simulation), options.picture)
    except (
        *(PlanError, ConfigError, QuantityError, PaceError, DowntimeError),
        *(SettingError, ButterflyError, PictureError),
    ) as error:
        print(f"orion simulate: {error}", file=sys.stderr)
        usage = isinstance(error, PlanError | ConfigError | QuantityError | SettingError)
        return USAGE if usage and not isinstance(error, DoesNotFitError) else FAILURE
    if as_json:
        print(json.dumps(facts(plan, simulation), indent=2))
    else:
        print("\n".join(text(plan, simulation)))
    return 0


def prepare(plan: PlanOptions, options: SimulateOptions) -> tuple[Run, Speed, Setting]:
    """The plan of the run at the depth that its heads keep, and what is to be played. Raises what `read` and
    `plan_speed` do, and `SettingError`."""
    measured = plan.depth is None and plan.style == "orion"
    nodes = plan.stages * plan.replicas
    stay = nodes / options.failures_per_hour if options.failures_per_hour > 0 else 1e9
    plan = replace(plan, stay_hours=stay)
    run = read(plan)
    speed = plan_speed(run)
    length = speed.rounds.length
    setting = Setting(
        pipeline=speed.pipeline,
        seconds=60 * options.minutes,
        rounds=Rounds(length=length, close=length - speed.rounds.last_step)
        if speed.rounds.overlapped
        else Rounds(length=length + speed.rounds.merge, close=length),
        churn=Churn(failures_per_hour=options.failures_per_hour, ready_after=60 * options.ready_minutes),
        measured_depth=measured,
        seed=options.seed,
    )
    return run, speed, setting


def facts(plan: PlanOptions, simulation: Simulation) -> dict[str, object]:
    """What `--json` prints."""
    speed, result, merge = simulation.speed, simulation.result, simulation.merge
    return {
        "options": asdict(plan),
        "seed": simulation.setting.seed,
        "seconds": result.seconds,
        "nodes": simulation.setting.stages * simulation.setting.replicas,
        "events": result.calls,
        "depth": result.depth,
        "tokens_per_second": simulation.tokens_per_second,
        "tokens_per_second_training": simulation.tokens_per_second_training,
        "mfu": simulation.mfu,
        "mfu_formula": FORMULA,
        "closed_form": {
            "depth": speed.pipeline.depth,
            "tokens_per_second": speed.tokens_per_second,
            "tokens_per_second_training": speed.tokens_per_second_training,
            "mfu": speed.mfu,
        },
        "difference": simulation.tokens_per_second / speed.tokens_per_second - 1,
        "difference_training": simulation.tokens_per_second_training / speed.tokens_per_second_training - 1,
        "microbatches": {
            "started": result.started,
            "completed": len(result.completed),
            "lost": result.lost,
            "in_flight": result.in_flight,
            "flight_seconds": result.flight_seconds,
            "adopted": result.adopted,
            "chased": result.chased,
            "refused": result.refused,
        },
        "failures": [asdict(failure) for failure in result.failures],
        "gradients_lost": result.gradients_lost,
        "merge": None
        if merge is None
        else {
            "seconds": merge.seconds,
            "moving_seconds": merge.moving,
            "hidden": simulation.hidden,
            "bytes": merge.sent,
            "bytes_closed_form": merge.expected,
            "identical": merge.agreed,
        },
        "stages": [
            {
                "stage": index,
                "utilisation": stage.utilisation,
                "forward_seconds": stage.forward,
                "backward_seconds": stage.backward,
                "idle_seconds": {cause.value: seconds for cause, seconds in stage.idle.items()},
            }
            for index, stage in enumerate(result.stages)
        ],
    }


def text(plan: PlanOptions, simulation: Simulation) -> Iterator[str]:
    """Lines for a person."""
    speed, result, setting, merge = simulation.speed, simulation.result, simulation.setting, simulation.merge
    yield (
        f"{_shape(plan)}: {result.seconds / 60:g} minutes, seed {setting.seed}, {result.calls:,} events among "
        f"{setting.stages * setting.replicas:,} nodes"
    )
    yield ""
    yield f"{'':<32} {'closed form':>12} {'simulation':>12} {'difference':>11}"
    yield _row(
        "tokens/s between fill and drain", speed.tokens_per_second_training, simulation.tokens_per_second_training
    )
    yield _row("tokens/s of whole rounds", speed.tokens_per_second, simulation.tokens_per_second)
    yield _row("MFU, %", 100 * speed.mfu, 100 * simulation.mfu, decimals=1)
    yield _row("in flight per head", speed.pipeline.depth, result.depth, decimals=1)
    yield _row("seconds of a flight", speed.pace.flight, result.flight_seconds, decimals=1)
    if merge is not None:
        yield _row("GB that a merge sends, a replica", merge.expected / 1e9, merge.sent / 1e9, decimals=3)
    yield f"MFU: {FORMULA}"
    yield ""
    yield (
        f"microbatches: {result.started:,} started, {len(result.completed):,} completed, {result.lost:,} lost, "
        f"{result.in_flight:,} in flight at the end"
    )
    yield (
        f"failures: {len(result.failures)}; {result.adopted:,} units taken over, {result.chased:,} activations offered "
        f"again, {result.gradients_lost:,} units of gradients lost"
    )
    if merge is not None:
        same = "replicas identical" if merge.agreed else "replicas differ"
        yield (
            f"a merge: {merge.seconds:.0f} s from cut to new state, {merge.moving:.1f} s of them with bytes under way, "
            f"{simulation.hidden:.0%} behind training; {same}"
        )
    yield ""
    yield f"{'stage':>5} {'at work':>9}" + "".join(f"{cause.value:>10}" for cause in Idle) + "   (% of all its time)"
    for index, stage in enumerate(result.stages):
        idle = "".join(f"{100 * stage.idle[cause] / stage.total:>10.1f}" for cause in Idle)
        yield f"{index:>5} {100 * stage.utilisation:>9.1f}{idle}"
    yield ""
    yield (
        f"closed form says {speed.tokens_per_second:,.0f} tokens/s, simulation {simulation.tokens_per_second:,.0f}, "
        f"difference {100 * (simulation.tokens_per_second / speed.tokens_per_second - 1):+.1f} %"
    )
    if result.failures:
        yield "the closed form is the mean over all that chance may do in the long run, the simulation one case of it,"
        yield "which begins with everybody there"


def _row(name: str, expected: float, found: float, *, decimals: int = 0) -> str:
    difference = f"{100 * (found / expected - 1):>+9.1f} %" if expected else f"{'':>11}"
    return f"{name:<32} {expected:>12,.{decimals}f} {found:>12,.{decimals}f} {difference}"


def _shape(plan: PlanOptions) -> str:
    return f"{plan.model}: {plan.stages} stages x {plan.replicas} {plan.gpu}"


def _merge(run: Run, seed: int) -> Played | None:
    if run.replicas == 1 or run.style.merge == "store":
        return None
    return play(
        parameters=max(stage_parameters(run.model, plan) for plan in split(run.model, run.stages)),
        replicas=run.replicas,
        codec=run.codec,
        up=run.up,
        down=run.down,
        latency=run.latency,
        seed=seed,
    )


def _recorder(setting: Setting, speed: Speed) -> Recorder:
    """Its close-up begins shortly before the first failure, if there is one, else when the pipeline is full."""
    unit = max(replica.unit for stage in setting.pipeline.stages for replica in stage)
    first = next((failure.at - 3 * unit for failure in failures_of(setting)), 2 * speed.pace.flight)
    start = max(0.0, min(first, setting.seconds - CLOSE_UP * unit))
    return Recorder(
        stages=setting.stages,
        replicas=setting.replicas,
        seconds=setting.seconds,
        close_up=(start, start + CLOSE_UP * unit),
    )


def _caption(plan: PlanOptions, simulation: Simulation) -> Caption:
    setting, result, merge = simulation.setting, simulation.result, simulation.merge
    rounds, merges = setting.rounds, []
    closes = rounds.close
    while merge is not None and closes < setting.seconds:
        merges.append((closes, min(setting.seconds, closes + merge.seconds)))
        closes += rounds.length
    return Caption(
        title=f"{_shape(plan)}, {result.seconds / 60:g} minutes",
        subtitle=(
            f"{simulation.tokens_per_second:,.0f} tokens/s (closed form {simulation.speed.tokens_per_second:,.0f}), "
            f"MFU {simulation.mfu:.1%}; {result.depth:.0f} in flight per head; {len(result.failures)} failures, "
            f"{result.lost} microbatches lost; seed {setting.seed}"
        ),
        tokens=simulation.run.units.tokens,
        expected=simulation.speed.tokens_per_second,
        merges=tuple(merges),
    )
