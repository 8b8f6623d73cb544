"""Tolerances: how far two honest devices may differ, measured (`orion calibrate`), kept as data, looked up by pair.

A tolerance is to be exceeded by an honest unit with probability at most q0, and `gross` times it with at most q0
squared (`subnet.trust.decision`). Neither is seen in a few thousand units, so both are extrapolated: the excesses over
the 90th percentile are fitted with a generalized Pareto law by probability-weighted moments (Hosking and Wallis 1987;
its limit for any tail is Pickands 1975), whose shape is not taken to be below 0, because a tail that seems to end is
not believed. A factor of two over the largest error seen is kept in any case (facts: sota §5.1, p99.99 x 2). So

    tolerance = max(2 * largest seen, quantile(1 - q0), quantile(1 - q0^2) / gross, the wire's step)

The wire's step is the floor because errors are not smooth below it: most units of one class agree to the bit after the
wire's rounding, and the first value that rounds the other way is a whole step off, however small the noise was.

A device class is named in a miner's record, before anybody knows what is picked. Whatever it names, no tolerance is
above the manifest's, so a class that is too noisy for it fails, and a false name wins nothing over naming none.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.config import PRESETS
from subnet.manifest import Manifest
from subnet.trust.audit import Tolerance
from subnet.trust.decision import GROSS, HONEST_FAILURES
from subnet.trust.finding import UNIT_CHECKS, Check

TABLE = "tolerances.toml"
"""Package data in `subnet/trust/data`."""
TAIL = 0.1
"""Share of the errors that the tail is fitted to."""
LEAST_ERRORS = 150
"""From fewer no tail is fitted."""
SAFETY = 2.0
STEPS = {"bfloat16": 2.0**-7, "float32": 2.0**-20}
"""By wire dtype: twice the step between neighbouring numbers, relative to the number, as an increment is smaller than
the sum it stands in; for fp32, whose values are not rounded again, a few of its own steps."""
MOST_SHAPE = 0.5
"""Heavier than this a tail has no variance and a fit to so few excesses means nothing."""


class CalibrationError(Exception):
    """A table or a measurement that gives no tolerance: one line with value, limit and remedy."""


class Device(IntEnum):
    """Device classes as records name them. New ones are appended: the numbers are on chain."""

    UNNAMED = 0
    CPU = 1
    """Any CPU at fp32, with any number of threads and any kernel library."""
    BF16 = 2
    """Matrix products rounded to bf16, the rest fp32: what tensor cores do, and what a CPU can emulate."""
    CUDA = 3
    """A CUDA device at fp32."""

    @classmethod
    def numbered(cls, number: int) -> Device:
        """The class of this number; one that is not known here is as good as none."""
        return cls(number) if number in set(cls) else cls.UNNAMED


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """A generalized Pareto law for what exceeds `threshold`, which a `share` of all errors do."""

    threshold: float
    share: float
    scale: float
    shape: float

    def quantile(self, exceeded: float) -> float:
        """The error that is exceeded with this probability, at most `share`."""
        if self.scale == 0 or exceeded >= self.share:
            return self.threshold
        ratio = self.share / exceeded
        if self.shape < 1e-9:
            return self.threshold + self.scale * math.log(ratio)
        return self.threshold + self.scale / self.shape * (math.pow(ratio, self.shape) - 1)


def fit_tail(errors: Sequence[float]) -> Tail:
    """The tail of relative errors. Raises `CalibrationError` for too few or infinite ones."""
    ordered = np.sort(np.asarray(errors, dtype=np.float64))
    count = int(len(ordered) * TAIL)
    if len(ordered) < LEAST_ERRORS or not np.isfinite(ordered).all():
        raise CalibrationError(
            f"{len(ordered)} errors, the largest {ordered[-1] if len(ordered) else math.nan:.3g}, give no tail: "
            f"{LEAST_ERRORS} finite ones are needed, raise --microbatches"
        )
    threshold = float(ordered[-count - 1])
    excess = ordered[-count:] - threshold
    mean = float(excess.mean())
    if mean == 0:
        return Tail(threshold=threshold, share=TAIL, scale=0.0, shape=0.0)
    # E[x (1 - F(x))], from plotting positions; shape = 2 - mean / (mean - 2 * weighted) in today's sign.
    weighted = float((excess * (1 - (np.arange(1, count + 1) - 0.35) / count)).mean())
    shape = min(MOST_SHAPE, max(0.0, 2 - mean / (mean - 2 * weighted)))
    return Tail(threshold=threshold, share=count / len(ordered), scale=mean * (1 - shape), shape=shape)


class Pair(BaseModel):
    """What was measured between two device classes at one check, and the tolerance that follows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: tuple[str, str]
    """Class of the miner, class of the auditor."""
    check: Check
    tolerance: Annotated[float, Field(gt=0)]
    units: Annotated[int, Field(gt=0)]
    """Errors measured, over all profiles of both classes and all states of training."""
    p50: float
    p99: float
    largest: float
    shape: float
    """Of the fitted tail; 0 is exponential."""
    fit_q0: float
    """The error that the fit exceeds with probability q0."""
    fit_gross: float
    """With q0 squared."""

    @classmethod
    def of(cls, miner: Device, auditor: Device, check: Check, errors: Sequence[float], *, floor: float) -> Pair:
        """`floor` is the least tolerance. Raises `CalibrationError`."""
        tail = fit_tail(errors)
        largest = max(errors)
        mild, gross = tail.quantile(HONEST_FAILURES), tail.quantile(HONEST_FAILURES**2)
        return cls(
            devices=(miner.name.lower(), auditor.name.lower()),
            check=check,
            tolerance=_upward(max(SAFETY * largest, mild, gross / GROSS, floor)),
            units=len(errors),
            p50=_brief(float(np.quantile(errors, 0.5))),
            p99=_brief(float(np.quantile(errors, 0.99))),
            largest=_brief(largest),
            shape=_brief(tail.shape),
            fit_q0=_brief(mild),
            fit_gross=_brief(gross),
        )


class Calibration(BaseModel):
    """One model's table, with its origin."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """A preset's name."""
    stages: int
    """Noise grows with a stage's depth, so the table is good for this split only."""
    wire_dtype: Literal["float32", "bfloat16"]
    torch: str
    processor: str
    profiles: list[str]
    steps: list[int]
    """Optimizer steps after which was measured."""
    seed: int
    q0: float
    gross: float
    pairs: list[Pair]

    def fits(self, manifest: Manifest) -> bool:
        return (
            manifest.model.config() == PRESETS.get(self.model)
            and manifest.swarm.stages == self.stages
            and manifest.model.wire_dtype == self.wire_dtype
        )

    def find(self, miner: Device, auditor: Device, check: Check) -> Pair | None:
        names = (miner.name.lower(), auditor.name.lower())
        return next((pair for pair in self.pairs if pair.devices == names and pair.check == check), None)


class Table(BaseModel):
    """All that was calibrated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: list[Calibration]

    def of(self, manifest: Manifest) -> Calibration | None:
        return next((entry for entry in self.calibration if entry.fits(manifest)), None)

    def having(self, entry: Calibration) -> Table:
        """The table with this entry in the place of an older one of the same model and split."""
        others = [known for known in self.calibration if (known.model, known.stages) != (entry.model, entry.stages)]
        return Table(calibration=sorted([*others, entry], key=lambda known: (known.model, known.stages)))


def parse_table(text: str) -> Table:
    """Raises `CalibrationError`."""
    try:
        return Table.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise CalibrationError(
            f"{TABLE} is no table of tolerances ({reason}): write it with orion calibrate"
        ) from error


@cache
def shipped() -> Table:
    """The table that this package carries."""
    return parse_table((files("subnet.trust") / "data" / TABLE).read_text())


def tolerance_between(manifest: Manifest, table: Table, *, miner: Device, auditor: Device) -> Tolerance:
    """The largest accepted error of each check: the pair's, and the manifest's where none was measured or it is
    lower."""
    entry, widest = table.of(manifest), manifest.audit.tolerance
    known: dict[Check, float] = {}
    for check in UNIT_CHECKS if entry is not None else ():
        pair = entry.find(miner, auditor, check) if entry is not None else None
        if pair is not None:
            known[check] = min(pair.tolerance, widest)
    return lambda check: known.get(check, widest)


def too_wide(entry: Calibration, widest: float) -> Iterable[Pair]:
    """Pairs whose honest units would fail at a manifest's `widest` tolerance."""
    return [pair for pair in entry.pairs if pair.tolerance > widest]


def _upward(value: float) -> float:
    """To two digits, never down."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.3g}")


def _brief(value: float) -> float:
    return float(f"{value:.3g}")
