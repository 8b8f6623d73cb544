"""What auditing a run costs at the pace that was planned, and whether it fits machines and links."""

from __future__ import annotations

from dataclasses import dataclass

from scripts.plan.options import PlanOptions, Run
from scripts.plan.speed import Speed
from subnet.metagraph import BLOCK_SECONDS
from subnet.swarm.public import VALUE_BYTES
from subnet.trust.cost import HOUR, Cost, Rules, Shape, cost
from subnet.trust.quota import UPLINK_SHARE

GB = 1e9
MERGE_VALUES = 3
"""Of each parameter, in fp32 on the host: public state, what was sent of one's own, what error feedback owes."""
FLOPS_LIMIT = 0.03
"""Of training's, for all audits."""


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
    """What audits add, and everything that has to fit beside the cards' own memory."""

    shape: Shape
    rules: Rules
    cost: Cost
    merge_bytes: tuple[int, ...]
    """Host memory of each stage for merges."""
    limits: tuple[Limit, ...]


def plan_audits(options: PlanOptions, run: Run, speed: Speed) -> AuditPlan | None:
    """None where no evidence is kept. Raises `CostError`."""
    if not run.style.evidence:
        return None
    shape = Shape(
        model=run.model,
        stages=run.stages,
        replicas=run.replicas,
        batch=run.units.batch,
        sequence=run.units.sequence,
        accumulation=run.accumulation,
        microbatch_seconds=run.replicas / speed.pace.rate,
        round_seconds=run.round_seconds,
        optimizer=run.units.optimizer,
        weight_bytes=run.units.value_bytes,
        wire_bytes=run.units.value_bytes,
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
    merge_bytes = tuple(MERGE_VALUES * VALUE_BYTES * stage.parameters for stage in speed.stages)
    return AuditPlan(
        shape=shape,
        rules=rules,
        cost=whole,
        merge_bytes=merge_bytes,
        limits=_limits(options, run, whole, merge_bytes),
    )


def _limits(options: PlanOptions, run: Run, whole: Cost, merge_bytes: tuple[int, ...]) -> tuple[Limit, ...]:
    validator = whole.audit_bytes / options.validators / HOUR
    weakest = min(run.flops(card) for card in run.devices)
    host = max(load.host_bytes + merging for load, merging in zip(whole.stages, merge_bytes, strict=True))
    return (
        Limit(
            name="host memory, evidence and merges",
            needed=host / GB,
            available=run.host / GB,
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
            available=UPLINK_SHARE * run.up / 1e6,
            unit="Mbit/s",
            option="--up, --windows or --readers",
        ),
        Limit(
            name="a validator's downlink",
            needed=8 * validator / 1e6,
            available=run.down / 1e6,
            unit="Mbit/s",
            option="--validators or --readers",
        ),
        Limit(
            name="a validator's GPU",
            needed=whole.audit_flops / options.validators / weakest,
            available=HOUR,
            unit="s per hour",
            option="--validators or --share",
        ),
        Limit(
            name="audits' share of FLOPs",
            needed=100 * whole.flops_share,
            available=100 * FLOPS_LIMIT,
            unit="%",
            option="--share or --steps",
        ),
    )
