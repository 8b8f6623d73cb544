"""What `orion plan` prints: forty lines for a person, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby

from model.accounting import FORMULA
from model.config import ConfigError
from model.memory import DoesNotFitError
from scripts.plan.audits import GB, AuditPlan, plan_audits
from scripts.plan.options import PlanError, PlanOptions, Run, read
from scripts.plan.speed import Share, Speed, StageSpeed, plan_speed
from subnet.commandline import FAILURE, USAGE
from subnet.quantities import QuantityError
from subnet.swarm.downtime import DowntimeError
from subnet.swarm.pace import PaceError
from subnet.trust.cost import CostError
from subnet.trust.quota import ROUNDS_KEPT

KNOBS = {
    "recompute": "--gpu with more memory, or fewer tokens in a microbatch (--batch, --sequence)",
    "steps": "--accumulation",
    "imbalance": "--stages, or --gpu with equal cards",
    "links": "--up and --down",
    "queues": "--routing lanes, another --depth, or a smaller --rtt",
    "ends": "a longer --round-minutes",
    "merges": "--as orion, whose merges overlap, or a longer --round-minutes",
    "departures": "more --replicas, or a shorter --round-minutes",
    "unmerged": "a shorter --round-minutes",
}
"""What lessens a loss."""
MOST_ROWS = 8
"""Stages, or runs of equal ones, that a person is shown."""
EXPLAINED = {
    "kernels": "what the card reaches of its peak while it computes",
    "recompute": "forwards that run twice",
    "steps": "optimizer, and the copy that evidence begins with",
    "imbalance": "stages that wait for the slowest",
    "links": "bandwidth",
    "queues": "too few in flight for how replicas are chosen",
    "ends": "a round's ends: pipelines fill, drain and take a last step",
    "merges": "training stands still, or weights change hands",
    "departures": "stages that miss a replica",
    "unmerged": "gradients that die with their miner",
}


def show_plan(options: PlanOptions, *, as_json: bool) -> int:
    """Print it; 0 if everything fits, 1 if not, 2 if the options describe no run."""
    try:
        run = read(options)
        speed = plan_speed(run)
        audits = plan_audits(options, run, speed)
    except (PlanError, ConfigError, QuantityError, PaceError, DowntimeError, CostError) as error:
        print(f"orion plan: {error}", file=sys.stderr)
        usage = isinstance(error, PlanError | ConfigError | QuantityError) and not isinstance(error, DoesNotFitError)
        return USAGE if usage else FAILURE
    if as_json:
        print(json.dumps(facts(options, speed, audits), indent=2))
    else:
        print("\n".join(text(options, run, speed, audits)))
    return 0 if audits is None or all(limit.fits for limit in audits.limits) else 1


def facts(options: PlanOptions, speed: Speed, audits: AuditPlan | None) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "options": asdict(options),
        "parameters": speed.parameters,
        "mfu": speed.mfu,
        "mfu_training": speed.mfu_training,
        "mfu_formula": FORMULA,
        "hardware_utilisation": speed.hardware,
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_training": speed.tokens_per_second_training,
        "depth": speed.pipeline.depth,
        "depth_of_nodes": speed.kept_in_flight,
        "routing": speed.pipeline.routing,
        "bubble": speed.bubble,
        "microbatch_seconds": options.replicas / speed.pace.rate,
        "round_trip_seconds": speed.pace.round_trip,
        "flight_seconds": speed.pace.flight,
        "round_seconds": speed.rounds.length,
        "merge_seconds": speed.rounds.merge,
        "merge_overlapped": speed.rounds.overlapped,
        "absence_seconds": speed.churn.absence,
        "dollars_per_hour": speed.dollars_per_hour,
        "dollars_per_million_tokens": speed.dollars_per_million_tokens,
        "days": speed.days,
        "binding": speed.loss.name,
        "binding_option": KNOBS[speed.loss.name],
        "pace_binding": speed.pace.binding,
        "shares": {share.name: share.kept for share in speed.shares},
        "uplink_share": speed.uplink,
        "stages": [
            _stage_facts(stage, utilisation) | ({} if audits is None else _audit_facts(audits, stage.plan.index))
            for stage, utilisation in zip(speed.stages, speed.pace.utilisation, strict=True)
        ],
        "audit": None
        if audits is None
        else {
            "window_seconds": audits.shape.window_seconds,
            "windows_picked_per_hour": audits.cost.picked_per_hour,
            "windows_kept": audits.cost.picked_kept,
            "flops_share": audits.cost.flops_share,
            "bytes_share": audits.cost.bytes_share,
            "bytes_per_hour": audits.cost.audit_bytes,
            "limits": [{**asdict(limit), "fits": limit.fits} for limit in audits.limits],
        },
    }


def _stage_facts(stage: StageSpeed, utilisation: float) -> dict[str, object]:
    memory = stage.memory
    return {
        "stage": stage.plan.index,
        "layers": stage.plan.layers,
        "parameters": stage.parameters,
        "flops": stage.flops,
        "gpus": [card.name for card in stage.cards],
        "forward_seconds": stage.forward,
        "backward_seconds": stage.backward,
        "utilisation": utilisation,
        "open_units": stage.open_units,
        "recompute": memory.recompute,
        "recomputed_share": stage.recomputed,
        "memory": {**asdict(memory), "total": memory.total, "free": memory.free},
    }


def _audit_facts(audits: AuditPlan, stage: int) -> dict[str, object]:
    load = audits.cost.stages[stage]
    return {**asdict(load), "audit_bytes": load.audit_bytes, "merge_bytes": audits.merge_bytes[stage]}


def text(options: PlanOptions, run: Run, speed: Speed, audits: AuditPlan | None) -> Iterator[str]:
    """Lines for a person."""
    yield (
        f"{options.model}: {speed.parameters / GB:.1f} billion parameters, {options.stages} stages x "
        f"{options.replicas} {options.gpu}, as {options.style}"
    )
    yield (
        f"{speed.mfu:.1%} MFU, {speed.tokens_per_second:,.0f} tokens/s; while training with everybody there "
        f"{speed.mfu_training:.1%}, {speed.tokens_per_second_training:,.0f} tokens/s"
    )
    yield f"MFU: {FORMULA}"
    yield (
        f"${speed.dollars_per_hour:,.2f} per hour, ${speed.dollars_per_million_tokens:.2f} per million tokens, "
        f"{speed.days:,.1f} days for {options.tokens} tokens"
    )
    yield (
        f"in flight: {speed.pipeline.depth} microbatches of {run.units.tokens:,} tokens per head (nodes keep "
        f"{speed.kept_in_flight}), replicas by {speed.pipeline.routing};"
    )
    yield (
        f"  a microbatch per replica every {options.replicas / speed.pace.rate:.2f} s, {speed.pace.flight:.0f} s "
        f"through all stages (empty: {speed.pace.round_trip:.0f} s), stages idle {speed.bubble:.0%}"
    )
    yield (
        f"rounds of {speed.rounds.length / 60:.0f} min, a merge of {speed.rounds.merge:,.0f} s "
        f"{'behind the next round' if speed.rounds.overlapped else 'while nobody trains'}; boundaries take "
        f"{speed.uplink:.1%} of an uplink"
    )
    yield (f"a miner stays {run.stay_hours:,.0f} h, then its place is empty for {speed.churn.absence / 60:.0f} min")
    yield ""
    yield from _way(speed.shares)
    yield f"what binds: {speed.loss.name}; to change: {KNOBS[speed.loss.name]}"
    yield ""
    yield from _table(speed, audits)
    yield ""
    if audits is None:
        yield "no evidence is kept, so nothing can be audited"
        return
    whole = audits.cost
    yield (
        f"audits: {whole.picked_per_hour:.2g} windows of {audits.shape.window_seconds:.0f} s per miner and hour, "
        f"{options.share:.2%} of units, {options.steps:.0%} of picked steps; room for {whole.picked_kept} windows in "
        f"{ROUNDS_KEPT} rounds"
    )
    for limit in audits.limits:
        verdict = "fits" if limit.fits else f"does not fit: change {limit.option}"
        yield f"{limit.name:<33} {limit.needed:>8,.1f} of {limit.available:>8,.1f} {limit.unit:<11} {verdict}"


def _way(shares: tuple[Share, ...]) -> Iterator[str]:
    """From the cards' peak to MFU, what costs nothing left out."""
    left = 1.0
    for share in shares:
        left *= share.kept
        if share.kept < 0.9995:
            yield f"{share.name:<11} {share.kept:>6.1%} kept, {left:>6.1%} left   {EXPLAINED[share.name]}"


def _table(speed: Speed, audits: AuditPlan | None) -> Iterator[str]:
    """Stages that look alike in one line."""
    yield f"{'':>5} {'':>6} {'':>8} {'':>5} {'GB on the card':>48} {'on the host':>14}"
    yield (
        f"{'stage':>5} {'layers':>6} {'params':>8} {'TFLOP':>5} {'weights':>7} {'grads':>5} {'optim':>5} {'flight':>6} "
        f"{'work':>5} {'in all':>7} {'of':>4}   {'ring':>5} {'merge':>5} {'busy':>5}  recompute"
    )
    rows = [_row(stage, busy, audits) for stage, busy in zip(speed.stages, speed.pace.utilisation, strict=True)]
    first, lines = 0, []
    for row, alike in groupby(rows):
        count = len(list(alike))
        span = f"{first}" if count == 1 else f"{first}-{first + count - 1}"
        first += count
        lines.append(f"{span:>5} {row}")
    hidden = lines[MOST_ROWS // 2 : -(MOST_ROWS // 2)]
    if len(hidden) > 1:
        lines[MOST_ROWS // 2 : -(MOST_ROWS // 2)] = [f"{'...':>5} {len(hidden)} lines more: --json has all stages"]
    yield from lines


def _row(stage: StageSpeed, busy: float, audits: AuditPlan | None) -> str:
    memory = stage.memory
    small = (memory.gradients, memory.optimizer)
    ring = 0.0 if audits is None else audits.cost.stages[stage.plan.index].host_bytes
    merging = 0.0 if audits is None else audits.merge_bytes[stage.plan.index]
    held = f", {memory.graphs} held" if memory.graphs else ""
    return (
        f"{stage.plan.layers:>6} {stage.parameters / GB:>6.2f} B {stage.flops / 1e12:>5.0f} "
        f"{memory.weights / GB:>7.1f} {' '.join(f'{part / GB:>5.1f}' for part in small)} {memory.in_flight / GB:>6.0f} "
        f"{(memory.workspace + memory.reserve) / GB:>5.1f} {memory.total / GB:>7.0f} {memory.card / GB:>4.0f}   "
        f"{ring / GB:>5.0f} {merging / GB:>5.0f} {busy:>5.0%}  {memory.recompute}{held}"
    )
