"""What 3 % of the FLOPs buy: how surely a cheater with a tenth of its units is convicted within a round of an hour.

In closed form, by the rules that `scripts.bench.sentencing` plays. A verdict takes two picked windows with failures.
Each validator reads its part of the picked windows and replays its part of the budget there; one failure anywhere is
enough, since it then looks into all picked windows, finds more in each, and the others replay what it reports. So

    P = sum over n >= 2 of P(n windows are picked) * (1 - (1 - r * d)^validators)

with r the chance that a validator reads one of n at least, and d that one of its replayed units fails. What a setting
costs is what `orion plan` says of it; whole steps are fixed by the hour, and units get what they leave of the FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import comb

from scripts.bench.sentencing import PLANNED, Scale
from scripts.cli import plan_options
from scripts.plan.audits import GB, AuditPlan, plan_audits
from scripts.plan.options import Run, read
from scripts.plan.speed import Speed, plan_speed
from subnet.metagraph import BLOCK_SECONDS
from subnet.trust.audit import budget

FRACTION = 0.1
"""Of its units, or of those of one direction, that the cheater falsifies."""
DELTA = 0.6
"""Bytes of a weight delta over those of bf16 weights, after a round of 20 steps at a rate of 3e-4 (`deltas.json`)."""
PICKS = ((20, 0.1), (20, 0.2), (20, 0.25), (20, 0.3), (20, 0.4), (10, 0.5), (4, 1.0))
"""Slots in a round and picked windows in each."""
WHOLE_STEPS = (0.3, 0.1)
"""Replayed whole, per miner and hour."""
READERS = (1.0, 2.0)
FLOPS = "audits' share of FLOPs"
UPLINK = "evidence on a miner's uplink"
SHARE_STEP = 0.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to spend the budget, and what it buys."""

    slots: int
    windows: float
    readers: float
    whole_steps: float
    """An hour."""
    share: float
    """Of units, the largest that leaves all audits within their share of FLOPs."""
    flops_percent: float
    uplink_mbit: float
    uplink_limit_mbit: float
    memory_gb: float
    both: float
    """P(convicted within the round) of who falsifies both directions."""
    one: float
    """The same of who falsifies one direction."""

    @property
    def fits(self) -> bool:
        """Whether a tenth of the uplink is enough."""
        return self.uplink_mbit <= self.uplink_limit_mbit


def chance(scale: Scale, *, units: int, share: float, bad: float) -> float:
    """P(convicted in its first round) of who falsifies a fraction `bad` of what is drawn from, each unit beyond doubt.

    That holds where windows are so large that each has a falsified unit. `scale` has at most one picked window a slot;
    `units` are the miner's in a round, of which validators replay `share` in sum. A round's first window is read by
    all, if it is picked. The window before which a merge is taken over is picked always; it is left out, because who
    cheats knows that.
    """
    found = 1 - (1 - bad) ** budget(units, share=share, stake_share=1 / scale.validators)
    part = min(1.0, scale.readers / scale.validators)
    whole = 0.0
    for count in range(2, scale.slots + 1):
        picked = comb(scale.slots, count) * scale.windows**count * (1 - scale.windows) ** (scale.slots - count)
        first = count / scale.slots * min(1.0, scale.slots / scale.steps)
        for weight, reads in ((first, 1.0), (1 - first, 1 - (1 - part) ** count)):
            whole += picked * weight * (1 - (1 - reads * found) ** scale.validators)
    return whole


def settings() -> Iterator[Setting]:
    """All of them. Raises what `plan_speed` and `plan_audits` raise."""
    for slots, windows in PICKS:
        for whole_steps in WHOLE_STEPS:
            for readers in READERS:
                yield setting(slots, windows, readers, whole_steps)


def setting(slots: int, windows: float, readers: float, whole_steps: float) -> Setting:
    scale = replace(PLANNED, slots=slots, windows=windows, readers=readers)
    share = 0.0
    while fits(planned(scale, whole_steps, share + SHARE_STEP)):
        share = round(share + SHARE_STEP, 6)
    plan = planned(scale, whole_steps, share)
    limits = {limit.name: limit for limit in plan.limits}
    units = 2 * scale.steps * scale.accumulation
    return Setting(
        slots=slots,
        windows=windows,
        readers=readers,
        whole_steps=whole_steps,
        share=share,
        flops_percent=round(limits[FLOPS].needed, 3),
        uplink_mbit=round(limits[UPLINK].needed, 1),
        uplink_limit_mbit=round(limits[UPLINK].available, 1),
        memory_gb=round(plan.cost.largest.host_bytes / GB, 1),
        both=round(chance(scale, units=units, share=share, bad=FRACTION), 4),
        one=round(chance(scale, units=units, share=share, bad=FRACTION / 2), 4),
    )


def fits(plan: AuditPlan) -> bool:
    """Whether its FLOPs do."""
    return next(limit.fits for limit in plan.limits if limit.name == FLOPS)


def planned(scale: Scale, whole_steps: float, share: float) -> AuditPlan:
    """What `orion plan` says of it, everything else as its defaults are."""
    hours = scale.round_seconds / 3600
    options = replace(
        plan_options({"round_minutes": 60 * hours}),
        slot_blocks=round(scale.round_seconds / scale.slots / BLOCK_SECONDS),
        windows=scale.windows,
        steps=whole_steps * hours / (scale.slots * scale.windows),
        share=share,
        readers=scale.readers,
        delta=DELTA,
    )
    plan = plan_audits(options, *_run(60 * hours))
    if plan is None:
        raise TypeError("the defaults of `orion plan` keep no evidence")
    return plan


@cache
def _run(round_minutes: float) -> tuple[Run, Speed]:
    """How fast it runs does not depend on how it is audited."""
    run = read(plan_options({"round_minutes": round_minutes}))
    return run, plan_speed(run)
