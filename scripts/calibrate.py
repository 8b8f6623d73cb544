"""`orion calibrate`: measure how far honest devices differ on a model's units, and write the tolerances that follow.

Units are made by training the model in this process, and computed again by every profile of this machine: CPU kernels
with and without oneDNN, in fp64, with matrix products rounded to bf16, and on a CUDA device
where there is one. The fp64 profile stands for CPUs that are not here: kernels of one arithmetic differ by the order of
their sums, each is about as far from the exact sum, and the factor of two in a tolerance is that of two such distances.
Each unit's outputs are compared between all ordered pairs of profiles as an audit compares them. How a
tolerance follows from the errors, and what is extrapolated, is said in `subnet.trust.tolerance`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import platform
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w
import torch

from model.accounting import total_parameters
from model.config import ConfigError, ModelConfig, preset
from model.corpus import standard_library_corpus
from model.data import Corpus, DataError
from model.engine import StageEngine, replay_backward, replay_forward, replay_tail
from model.optimizer import OptimizerConfig
from model.recompute import Recompute
from model.split import split
from model.stage import Stage, build_stage
from scripts.localnet import cache_folder
from scripts.manifests import ACCUMULATION, BATCH, TOLERANCE, inner_of
from subnet.trust.audit import increment_error, straight
from subnet.trust.decision import GROSS, HONEST_FAILURES
from subnet.trust.finding import Check
from subnet.trust.tolerance import (
    LEAST_ERRORS,
    TABLE,
    Calibration,
    CalibrationError,
    Device,
    Pair,
    Table,
    parse_table,
    too_wide,
)
from subnet.trust.tolerance import STEPS as WIRE_STEPS

WIRE = torch.bfloat16
_FLOOR = WIRE_STEPS["bfloat16"]
STEPS = (0, 10, 20, 40)
"""Optimizer steps after which is measured: fresh weights, warm-up, and a model that has learned."""
PACKAGED = Path(__file__).parent.parent / "subnet" / "trust" / "data" / TABLE


@dataclass(frozen=True, slots=True)
class Profile:
    """One way to compute the same thing."""

    name: str
    device: Device
    threads: int = 1
    onednn: bool = True
    bf16: bool = False
    fp64: bool = False
    cuda: bool = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Compute so inside; what was set before is set again."""
        threads, where = torch.get_num_threads(), "cuda" if self.cuda else "cpu"
        torch.set_num_threads(self.threads)
        try:
            with (
                torch.backends.mkldnn.flags(enabled=self.onednn),
                torch.autocast(where, dtype=torch.bfloat16, enabled=self.bf16, cache_enabled=False),
            ):
                yield
        finally:
            torch.set_num_threads(threads)

    @property
    def where(self) -> torch.device:
        return torch.device("cuda" if self.cuda else "cpu")


def profiles() -> list[Profile]:
    """What this machine can compute with."""
    found = [
        Profile("cpu-1", Device.CPU),
        Profile("cpu-1-native", Device.CPU, onednn=False),
        Profile("cpu-1-fp64", Device.CPU, fp64=True),
        Profile("bf16-1", Device.BF16, bf16=True),
        Profile("bf16-1-native", Device.BF16, onednn=False, bf16=True),
    ]
    if torch.cuda.is_available():
        found += [Profile("cuda", Device.CUDA, cuda=True), Profile("cuda-bf16", Device.BF16, bf16=True, cuda=True)]
    return found


@dataclass(frozen=True, slots=True)
class Unit:
    """Inputs of one unit at one stage, as the wire carries them, fp32 (tokens int64 at the head)."""

    stage: int
    x: torch.Tensor
    gradient: torch.Tensor | None
    """What came back, for a backward unit of a stage that is not the tail."""
    targets: torch.Tensor | None
    """At the tail, whose unit is forward, loss and backward."""
    tokens: torch.Tensor
    """Its sample's, int64 (B, T), for stages that restore them."""


@dataclass(frozen=True, slots=True)
class Computed:
    """What one profile makes of a unit: the tensor it sends on, fp32 after the wire's rounding, and the loss."""

    output: torch.Tensor
    loss: float | None = None


def compute(stage: Stage, unit: Unit, profile: Profile) -> Computed:
    """One unit by the audit's own functions."""
    dtype = torch.float64 if profile.fp64 else torch.float32
    with profile.active():
        x = unit.x.to(profile.where, dtype if unit.x.is_floating_point() else None)
        tokens = unit.tokens.to(profile.where)
        if unit.targets is not None:
            loss, out = replay_tail(stage, x, unit.targets.to(profile.where), tokens, accumulation=ACCUMULATION)
        elif unit.gradient is not None:
            loss, out = None, replay_backward(stage, x, unit.gradient.to(profile.where, dtype), tokens)
        else:
            loss, out = None, replay_forward(stage, x, tokens)
    assert out is not None  # noqa: S101 - `units` makes no backward for the head
    return Computed(_wire(out), loss)


def _wire(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", WIRE).float()


def errors_of(unit: Unit, claimed: Computed, replayed: Computed, *, carries: bool) -> Iterator[tuple[Check, float]]:
    """As `subnet.trust.audit.replay` measures them."""
    carried = unit.gradient if unit.gradient is not None else unit.x
    carry = straight(None if unit.targets is not None else carried, replayed.output, carries=carries)
    check = Check.FORWARD if unit.targets is None and unit.gradient is None else Check.BACKWARD
    yield check, increment_error(claimed.output, replayed.output, carry)
    if claimed.loss is not None and replayed.loss is not None:
        yield Check.LOSS, abs(claimed.loss - replayed.loss) / max(abs(replayed.loss), 1e-6)


class Pipeline:
    """A model in `stages` stages, trained one microbatch after the other in this process."""

    def __init__(self, name: str, stages: int, *, seed: int, inner: OptimizerConfig | None = None) -> None:
        """`inner` is by default the local run's of that model. Raises `ConfigError` or `DataError`."""
        self.config: ModelConfig = preset(name)
        self.plans = split(self.config, stages)
        corpus = standard_library_corpus(cache_folder(), vocab=self.config.vocab)
        self.corpus = Corpus.open(
            corpus.folder,
            corpus.entries,
            seed=seed,
            batch=BATCH,
            tokens=self.config.context,
            vocab=self.config.vocab,
        )
        total = total_parameters(self.config, stages)
        self.engines = [
            StageEngine(
                build_stage(self.config, plan, seed),
                inner or inner_of(name),
                plan,
                n_total_params=total,
                accumulation=ACCUMULATION,
                recompute=Recompute.KEEP,
                capacity=1,
            )
            for plan in self.plans
        ]
        self._sample = 0

    @property
    def steps(self) -> int:
        return self.engines[0].steps

    def units(self) -> list[Unit]:
        """The units of the next microbatch with the present weights, which stay as they are."""
        tokens, targets = self.next()
        xs = [tokens]
        for engine in self.engines[:-1]:
            xs.append(_wire(replay_forward(engine.stage, xs[-1], tokens)))
        found = [Unit(index, x, None, None, tokens) for index, x in enumerate(xs[:-1])]
        last = len(self.engines) - 1
        found.append(Unit(last, xs[-1], None, targets, tokens))
        _, g = replay_tail(self.engines[-1].stage, xs[-1], targets, tokens, accumulation=ACCUMULATION)
        for index in range(last - 1, 0, -1):
            assert g is not None  # noqa: S101 - a stage that is not the head has an input gradient
            found.append(Unit(index, xs[index], _wire(g), None, tokens))
            g = replay_backward(self.engines[index].stage, xs[index], _wire(g), tokens)
        return found

    def train(self, steps: int) -> None:
        """Go on until so many optimizer steps are done."""
        while self.steps < steps:
            for _ in range(ACCUMULATION):
                self._microbatch()
            for engine in self.engines:
                engine.step()

    def _microbatch(self) -> None:
        tokens, targets = self.next()
        x = tokens
        for engine in self.engines[:-1]:
            x = _wire(engine.forward(0, x, tokens))
        _, g = self.engines[-1].tail(0, x, targets, tokens)
        for engine in reversed(self.engines[:-1]):
            assert g is not None  # noqa: S101 - as above
            g = engine.backward(0, _wire(g))

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) tokens and their targets, of the next sample."""
        tokens = self.corpus.sample(self._sample)
        self._sample += 1
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


Errors = Mapping[tuple[Profile, Profile, Check], Sequence[float]]
"""By (miner, auditor, check), in the order of units."""


def measure(pipeline: Pipeline, *, steps: Sequence[int], microbatches: int, among: Sequence[Profile]) -> Errors:
    """Errors between all ordered pairs of different profiles, over units of so many microbatches after each of `steps`
    optimizer steps."""
    errors: dict[tuple[Profile, Profile, Check], list[float]] = defaultdict(list)
    for goal in steps:
        pipeline.train(goal)
        units = [unit for _ in range(microbatches) for unit in pipeline.units()]
        results = {profile: _all(pipeline, units, profile) for profile in among}
        for index, unit in enumerate(units):
            made = {profile: results[profile][index] for profile in among}
            for miner, auditor in itertools.permutations(among, 2):
                for check, error in errors_of(unit, made[miner], made[auditor], carries=pipeline.config.carries):
                    errors[miner, auditor, check].append(error)
    return errors


def _all(pipeline: Pipeline, units: Sequence[Unit], profile: Profile) -> list[Computed]:
    dtype = torch.float64 if profile.fp64 else torch.float32
    stages = [copy.deepcopy(engine.stage).to(profile.where, dtype) for engine in pipeline.engines]
    return [compute(stages[unit.stage], unit, profile) for unit in units]


def by_class(errors: Errors) -> dict[tuple[Device, Device, Check], list[float]]:
    """Pooled over the profiles of each class."""
    pooled: dict[tuple[Device, Device, Check], list[float]] = defaultdict(list)
    for (miner, auditor, check), values in errors.items():
        pooled[miner.device, auditor.device, check] += values
    return pooled


def calibrate(*, model: str, stages: int, microbatches: int, seed: int, out: Path | None) -> int:
    """Measure, write the table, print it; 0 done, 1 refused. `out` None is the package's own table."""
    path = PACKAGED if out is None else out
    try:
        table = parse_table(path.read_text()) if path.exists() else Table(calibration=[])
        among, per_state = profiles(), max(1, microbatches // len(STEPS))
        errors = measure(Pipeline(model, stages, seed=seed), steps=STEPS, microbatches=per_state, among=among)
        pooled = sorted(by_class(errors).items())
        pairs = [Pair.of(*key, values, floor=_FLOOR) for key, values in pooled if len(values) >= LEAST_ERRORS]
    except (CalibrationError, ConfigError, DataError) as error:
        print(f"orion calibrate: {error}", file=sys.stderr)
        return 1
    entry = Calibration(
        model=model,
        stages=stages,
        wire_dtype="bfloat16",
        torch=torch.__version__,
        processor=_processor(),
        profiles=[profile.name for profile in among],
        steps=list(STEPS),
        seed=seed,
        q0=HONEST_FAILURES,
        gross=GROSS,
        pairs=pairs,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    content = table.having(entry).model_dump(mode="json")
    path.write_text("# Written by orion calibrate; read by subnet.trust.tolerance.\n" + tomli_w.dumps(content))
    for pair in pairs:
        print(
            f"{pair.devices[0]:>5} by {pair.devices[1]:<5} {pair.check.value:<9} p50 {pair.p50:<9.3g} "
            f"p99 {pair.p99:<9.3g} largest {pair.largest:<9.3g} of {pair.units}: tolerance {pair.tolerance:g}"
        )
    for (miner, auditor, check), values in pooled:
        if len(values) < LEAST_ERRORS:
            print(
                f"{miner.name.lower()} by {auditor.name.lower()} at {check.value}: {len(values)} errors, "
                f"{LEAST_ERRORS} are needed, so the manifest's tolerance holds: raise --microbatches"
            )
    for pair in too_wide(entry, TOLERANCE):
        print(
            f"{pair.devices[0]} by {pair.devices[1]} at {pair.check.value} needs {pair.tolerance:g}, local runs have "
            f"audit.tolerance {TOLERANCE:g}: raise it or leave this class out"
        )
    print(f"written to {path}")
    return 0


def _processor() -> str:
    """The processor's own name where the system tells it."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
