"""`orion plan`: what a run of some shape costs before anybody rents anything.

Arithmetic only, from the numbers given: what a miner must keep for audits and send to validators, what validators must
fetch and compute, and whether that fits a rented machine and its link.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from model.accounting import FORMULA, total_parameters, training_flops_per_token
from model.config import ConfigError, preset
from model.devices import device
from subnet.metagraph import BLOCK_SECONDS
from subnet.quantities import QuantityError, parse_bandwidth
from subnet.trust.cost import HOUR, QUANTILE, Cost, CostError, Rules, Shape, cost
from subnet.trust.quota import ROUNDS_KEPT, UPLINK_SHARE

GB = 1e9
COLUMNS = ("pending", "cut", "picked", "cuts", "to train", "evidence", "weights")


class PlanError(ValueError):
    """A plan that cannot be made: one line with the value, the limit and the option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Flags of `orion plan`, as given."""

    model: str
    stages: int
    replicas: int
    gpu: str
    mfu: float
    up: str
    down: str
    host_gb: float
    disk_gb: float
    sequence: int
    batch: int
    accumulation: int
    round_minutes: float
    validators: int
    slot_blocks: int
    windows: float
    share: float
    steps: float
    readers: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Something that has to fit."""

    name: str
    needed: float
    available: float
    unit: str
    option: str
    """What to change where it does not."""

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPlan:
    """What `orion plan` says of audits."""

    parameters: int
    tokens_per_second: float
    shape: Shape
    rules: Rules
    cost: Cost
    limits: tuple[Limit, ...]


def make_plan(options: PlanOptions) -> AuditPlan:
    """Raises `PlanError`, `CostError`, `ConfigError`, `QuantityError`."""
    peak = device(options.gpu).peak
    if not 0 < options.mfu <= 1:
        raise PlanError(f"--mfu is {options.mfu:g}; it must be above 0 and at most 1: change it")
    if options.validators < 1:
        raise PlanError(f"--validators is {options.validators}; it must be at least 1: raise it")
    config = preset(options.model)
    up, down = parse_bandwidth("up", options.up), parse_bandwidth("down", options.down)
    flops = training_flops_per_token(config, stages=options.stages, tokens=options.sequence)
    per_pipeline = options.mfu * options.stages * peak / flops
    shape = Shape(
        model=config,
        stages=options.stages,
        replicas=options.replicas,
        batch=options.batch,
        sequence=options.sequence,
        accumulation=options.accumulation,
        microbatch_seconds=options.batch * options.sequence / per_pipeline,
        round_seconds=60 * options.round_minutes,
        weight_bytes=2,
        wire_bytes=2,
    )
    rules = Rules(
        slot_seconds=options.slot_blocks * BLOCK_SECONDS,
        delay_seconds=4 * BLOCK_SECONDS,
        windows=options.windows,
        share=options.share,
        steps=options.steps,
        pieces=4,
        validators=options.validators,
        readers=options.readers,
        delta=options.delta,
    )
    whole = cost(shape, rules)
    validator = whole.audit_bytes / options.validators / HOUR
    compute = whole.audit_flops / options.validators / (options.mfu * peak)
    limits = (
        Limit(
            name="evidence in a miner's host memory",
            needed=whole.largest.host_bytes / GB,
            available=options.host_gb,
            unit="GB",
            option="--slot-blocks or --accumulation",
        ),
        Limit(
            name="evidence on a miner's disk",
            needed=whole.fullest.disk_bytes / GB,
            available=options.disk_gb,
            unit="GB",
            option="--windows or --round-minutes",
        ),
        Limit(
            name="evidence on a miner's uplink",
            needed=8 * whole.busiest.audit_bytes / HOUR / 1e6,
            available=UPLINK_SHARE * up / 1e6,
            unit="Mbit/s",
            option="--windows or --readers",
        ),
        Limit(
            name="a validator's downlink",
            needed=8 * validator / 1e6,
            available=down / 1e6,
            unit="Mbit/s",
            option="--validators or --readers",
        ),
        Limit(
            name="a validator's GPU",
            needed=compute,
            available=HOUR,
            unit="s per hour",
            option="--validators or --share",
        ),
        Limit(
            name="audits' share of FLOPs",
            needed=100 * whole.flops_share,
            available=3.0,
            unit="%",
            option="--share or --steps",
        ),
    )
    return AuditPlan(
        parameters=total_parameters(config, options.stages),
        tokens_per_second=options.replicas * per_pipeline,
        shape=shape,
        rules=rules,
        cost=whole,
        limits=limits,
    )


def show_plan(options: PlanOptions, *, as_json: bool) -> int:
    """Print it; 0 if everything fits, 1 if not or if it cannot be made."""
    try:
        plan = make_plan(options)
    except (PlanError, CostError, ConfigError, QuantityError) as error:
        print(f"orion plan: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts(options, plan), indent=2) if as_json else "\n".join(text(options, plan)))
    return 0 if all(limit.fits for limit in plan.limits) else 1


def facts(options: PlanOptions, plan: AuditPlan) -> dict[str, object]:
    """What `--json` prints."""
    whole = plan.cost
    return {
        "options": asdict(options),
        "parameters": plan.parameters,
        "mfu": options.mfu,
        "mfu_formula": FORMULA,
        "tokens_per_second": plan.tokens_per_second,
        "audit": {
            "microbatch_seconds": plan.shape.microbatch_seconds,
            "window_seconds": plan.shape.window_seconds,
            "windows_picked_per_hour": whole.picked_per_hour,
            "windows_kept": whole.picked_kept,
            "flops_share": whole.flops_share,
            "bytes_share": whole.bytes_share,
            "bytes_per_hour": whole.audit_bytes,
            "limits": [{**asdict(limit), "fits": limit.fits} for limit in plan.limits],
        },
        "stages": [{**asdict(stage), "audit_bytes": stage.audit_bytes} for stage in whole.stages],
    }


def text(options: PlanOptions, plan: AuditPlan) -> Iterator[str]:
    """Lines for a person."""
    shape, whole = plan.shape, plan.cost
    yield (
        f"{options.model}: {plan.parameters / GB:.1f} billion parameters, {options.stages} stages x "
        f"{options.replicas} {options.gpu}"
    )
    yield (
        f"at {options.mfu:.0%} MFU: {plan.tokens_per_second:,.0f} tokens/s, a microbatch every "
        f"{shape.microbatch_seconds:.2f} s, a local step every {shape.window_seconds:.0f} s"
    )
    yield f"MFU: {FORMULA}"
    yield (
        f"audits: {whole.picked_per_hour:.2g} windows per miner and hour, {options.share:.2%} of units and "
        f"{options.steps:.0%} of picked steps replayed, by {options.validators} validators in sum"
    )
    yield f"room for {whole.picked_kept} picked windows: as many as {QUANTILE:.1%} of {ROUNDS_KEPT} rounds have at most"
    yield ""
    yield f"{'':>5} {'':>12} {'in host memory, GB':>19} {'on disk, GB':>19} {'sent, GB per hour':>29}"
    yield " ".join((f"{'stage':>5} {'parameters':>12}", *map("{:>9}".format, COLUMNS)))
    for stage in whole.stages:
        kept = (stage.pending_bytes, stage.cut_bytes, stage.picked_bytes, stage.cuts_bytes)
        sent = (stage.training_bytes, stage.audit_bytes, stage.weight_bytes)
        numbers = [f"{number / GB:>9.1f}" for number in (*kept, *sent)]
        yield " ".join((f"{stage.stage:>5} {stage.parameters / GB:>10.2f} B", *numbers))
    yield ""
    for limit in plan.limits:
        verdict = "fits" if limit.fits else f"does not fit: change {limit.option}"
        yield f"{limit.name:<36} {limit.needed:>9,.1f} of {limit.available:>8,.1f} {limit.unit:<11} {verdict}"
    yield f"{'audits against bytes that train':<36} {100 * whole.bytes_share:>9,.1f} %"
