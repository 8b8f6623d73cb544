"""How fast a run trains: each stage's seconds, its memory and what that lets it keep, the pipeline's pace, and what
rounds, merges and departures leave of it. A chain of shares leads from the cards' peak to MFU, so each loss has a name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.accounting import boundary_bytes, mfu, stage_flops, stage_moments, stage_parameters, total_parameters
from model.devices import HOST_LINK, Device
from model.layout import Layout
from model.memory import (
    DoesNotFitError,
    StageMemory,
    least_recompute,
    mean_open,
    recomputed_share,
    require_fit,
    stage_memory,
)
from model.muon import polar_flops
from model.recompute import Recompute
from model.split import StagePlan, split
from neurons.drive import in_flight
from scripts.plan.options import EVICTION_SECONDS, Run
from subnet.swarm.codec import codec_of
from subnet.swarm.downtime import (
    ROSTER_ROUNDS,
    Churn,
    Rounds,
    butterfly_seconds,
    gather_seconds,
    pace_kept,
    store_seconds,
)
from subnet.swarm.pace import Pace, Pipeline, Replica, pace
from subnet.trust.quota import UPLINK_SHARE

HANDOVERS = 4
"""Copies of a stage's weights between card and host in a round: out and back at the cut, and where it is merged."""
WORTH = 0.9
"""Graphs are held where no more than so many forwards run again in spite of them."""
WEIGHT_TRAFFIC = 3
"""Values that an optimizer step moves per parameter: weight and gradient read, weight written."""
MOMENT_TRAFFIC = 2
"""Per moment: read and written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpeed:
    """One stage."""

    plan: StagePlan
    cards: tuple[Device, ...]
    parameters: int
    flops: int
    """Of a microbatch, forward and backward, recompute not counted."""
    memory: StageMemory
    """On the card that has least of it."""
    recomputed: float
    """Share of units whose forward runs a second time."""
    forward: float
    """Seconds, mean over replicas."""
    backward: float
    open_units: float
    """Between forward and backward, mean of a replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One step of the way from peak to MFU."""

    name: str
    kept: float
    """0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The whole run."""

    parameters: int
    stages: tuple[StageSpeed, ...]
    pipeline: Pipeline
    pace: Pace
    kept_in_flight: int
    """W that nodes keep by themselves (`neurons.drive.in_flight`)."""
    rounds: Rounds
    churn: Churn
    shares: tuple[Share, ...]
    mfu: float
    mfu_training: float
    """While training, with everybody there."""
    tokens_per_second: float
    tokens_per_second_training: float
    dollars_per_hour: float
    dollars_per_million_tokens: float
    days: float
    """To the target."""
    uplink: float
    """Share that boundaries take of what merges and evidence leave of the busiest replica's uplink."""

    @property
    def bubble(self) -> float:
        """Mean share of training time in which a stage does not compute."""
        return 1 - sum(self.pace.utilisation) / len(self.stages)

    @property
    def hardware(self) -> float:
        """Hardware FLOPs utilisation while training: recomputed FLOPs count."""
        return self.mfu_training / self.share("recompute")

    def share(self, name: str) -> float:
        return next(share.kept for share in self.shares if share.name == name)

    @property
    def loss(self) -> Share:
        """The largest loss that an option can lessen."""
        return min((share for share in self.shares if share.name != "kernels"), key=lambda share: share.kept)


def plan_speed(run: Run) -> Speed:
    """Raises `DoesNotFitError`, `PaceError`, `DowntimeError`, `ConfigError`."""
    depth = _depth(run)
    stages = _stages(run, depth)
    pipeline = _pipeline(run, stages, depth)
    steady = pace(pipeline)
    rounds, churn = _rounds(run), _churn(run)
    shares = _shares(run, stages, steady, rounds, churn)
    kept = math.prod(share.kept for share in shares if share.name in ("ends", "merges", "departures", "unmerged"))
    tokens = steady.rate * run.units.tokens
    per_token = sum(stage.flops for stage in stages) / run.units.tokens
    hourly = run.price * len(run.devices)
    return Speed(
        parameters=total_parameters(run.model, run.stages),
        stages=stages,
        pipeline=pipeline,
        pace=steady,
        kept_in_flight=_kept_in_flight(run, pipeline),
        rounds=rounds,
        churn=churn,
        shares=shares,
        mfu=mfu(kept * tokens, per_token, peak_flops=run.peak),
        mfu_training=mfu(tokens, per_token, peak_flops=run.peak),
        tokens_per_second=kept * tokens,
        tokens_per_second_training=tokens,
        dollars_per_hour=hourly,
        dollars_per_million_tokens=hourly / (3600 * kept * tokens / 1e6),
        days=run.tokens / (kept * tokens) / 86_400,
        uplink=_uplink(pipeline, steady),
    )


def _depth(run: Run) -> int:
    """W: as given, or what nodes keep. What it lets be kept changes times, so twice."""
    if run.style.depth is not None:
        return run.style.depth
    depth = run.depth_limit
    for _ in range(2):
        depth = _kept_in_flight(run, _pipeline(run, _stages(run, depth), depth))
    return depth


def _kept_in_flight(run: Run, pipeline: Pipeline) -> int:
    """By the nodes' own rule, from what a head would measure: its units, and pushes to the second stage."""
    head = pipeline.stages[0][0]
    push = 2 * run.latency + 8 * pipeline.forward_bytes / min(head.up, head.down)
    return in_flight(stages=run.stages, unit_seconds=head.unit, push_seconds=push)


def _stages(run: Run, depth: int) -> tuple[StageSpeed, ...]:
    plans = split(run.model, run.stages)
    poorest = [min(cards, key=lambda card: card.memory) for cards in run.cards]
    waiting = [mean_open(depth, run.stages, plan.index) for plan in plans]
    opened = [max(1, math.ceil(units)) for units in waiting]
    require_fit(run.model, run.stages, poorest, run.units, open_units=opened)
    return tuple(
        _stage(run, plan, card, units, most)
        for plan, card, units, most in zip(plans, poorest, waiting, opened, strict=True)
    )


def _stage(run: Run, plan: StagePlan, poorest: Device, waiting: float, opened: int) -> StageSpeed:
    memory = _memory(run, plan, poorest, waiting, opened)
    forward_flops, backward_flops = (
        run.units.tokens * n for n in stage_flops(run.model, plan, tokens=run.units.sequence)
    )
    recomputed = 0.0 if plan.is_last else recomputed_share(waiting, memory.graphs, run.accumulation)
    cards = run.cards[plan.index]
    parameters = stage_parameters(run.model, plan)
    forward = [forward_flops / run.flops(card) for card in cards]
    backward = [
        (backward_flops + recomputed * forward_flops) / run.flops(card) + _step(run, plan, card) for card in cards
    ]
    return StageSpeed(
        plan=plan,
        cards=cards,
        parameters=parameters,
        flops=forward_flops + backward_flops,
        memory=memory,
        recomputed=recomputed,
        forward=sum(forward) / len(cards),
        backward=sum(backward) / len(cards),
        open_units=waiting,
    )


def _memory(run: Run, plan: StagePlan, card: Device, waiting: float, opened: int) -> StageMemory:
    """The least recompute that fits, where that spares a tenth of the recomputed forwards; or what was asked for."""
    wanted = run.style.recompute
    least = least_recompute(run.model, plan, card, run.units, open_units=opened)
    pays = plan.is_last or recomputed_share(waiting, least.graphs, run.accumulation) <= WORTH
    if wanted is None:
        return least if pays else least_recompute(run.model, plan, card, run.units, open_units=opened, most_graphs=0)
    graphs = least.graphs if pays and wanted is not Recompute.FULL else 0
    asked = stage_memory(run.model, plan, card, run.units, open_units=opened, recompute=wanted, graphs=graphs)
    if asked.free < 0:
        raise DoesNotFitError(
            f"stage {plan.index} with --recompute {wanted} needs {asked.total / 1e9:.1f} GB, "
            f"{-asked.free / 1e9:.1f} GB more than the {card.memory / 1e9:.0f} GB of a {card.name}; "
            f"what would fit: --recompute {least.recompute}"
        )
    return asked


def _step(run: Run, plan: StagePlan, card: Device) -> float:
    """Seconds that a local step costs each of its microbatches: the optimizer's memory traffic and, of Muon, its FLOPs,
    and the copy of weights and moments to the host that evidence begins with."""
    weights = run.units.value_bytes * stage_parameters(run.model, plan)
    moments = run.units.moment_bytes * stage_moments(run.model, plan, run.units.optimizer)
    seconds = (WEIGHT_TRAFFIC * weights + MOMENT_TRAFFIC * moments) / card.bandwidth
    matrices = Layout.planned(run.model, plan, run.units.optimizer).matrices
    seconds += sum(polar_flops(place.shape) for place in matrices) / run.flops(card)
    if run.style.evidence:
        seconds += (weights + moments) / HOST_LINK
    return seconds / run.accumulation


def _pipeline(run: Run, stages: tuple[StageSpeed, ...], depth: int) -> Pipeline:
    size = boundary_bytes(run.model, tokens=run.units.tokens, itemsize=run.units.value_bytes)
    up = run.up * _uplink_left(run)
    replicas = []
    for stage in stages:
        slowness = [1 / run.flops(card) for card in stage.cards]
        mean = sum(slowness) / len(slowness)
        replicas.append(tuple(_replica(run, stage, each / mean, up=up) for each in slowness))
    return Pipeline(
        stages=tuple(replicas),
        forward_bytes=size,
        backward_bytes=size,
        latency=run.latency,
        depth=depth,
        routing=run.style.routing,
    )


def _uplink_left(run: Run) -> float:
    """Share of an uplink that evidence and merges leave for boundaries. Raises `DoesNotFitError`."""
    rounds = _rounds(run)
    taken = rounds.merge / rounds.length if rounds.overlapped else 0.0
    taken += UPLINK_SHARE if run.style.evidence else 0.0
    if taken >= 1:
        raise DoesNotFitError(
            f"merges and evidence take {taken:.0%} of an uplink of {run.up / 1e6:,.0f} Mbit/s: raise --up or "
            "--round-minutes, or choose --codec topk2bit"
        )
    return 1 - taken


def _replica(run: Run, stage: StageSpeed, factor: float, *, up: float) -> Replica:
    forward, backward = factor * stage.forward, factor * stage.backward
    if stage.plan.is_last:
        forward, backward = 0.0, forward + backward
    return Replica(forward=forward, backward=backward, up=up, down=run.down)


def _rounds(run: Run) -> Rounds:
    parameters = max(stage_parameters(run.model, plan) for plan in split(run.model, run.stages))
    if run.style.merge == "store":
        seconds = store_seconds(run.units.value_bytes * parameters, replicas=run.replicas, up=run.up, down=run.down)
    else:
        codec = codec_of(run.codec)
        merge = gather_seconds if codec.error_feedback else butterfly_seconds
        seconds = merge(codec, parameters, replicas=run.replicas, up=run.up, down=run.down)
    overlapped = run.style.merge == "overlapped"
    return Rounds(
        length=run.round_seconds,
        held_back=run.style.held_back,
        last_step=run.style.last_step,
        merge=seconds,
        overlapped=overlapped,
        pause=HANDOVERS * run.units.value_bytes * parameters / HOST_LINK if overlapped else 0.0,
    )


def _churn(run: Run) -> Churn:
    """How long a place stays empty: by the roster's rounds, or until a silent miner is evicted, a newcomer has the
    state, and the next merge has begun."""
    rounds = _rounds(run)
    if rounds.overlapped:
        absence = ROSTER_ROUNDS * rounds.length
    else:
        state = max(
            run.units.value_bytes * stage_parameters(run.model, plan)
            + run.units.moment_bytes * stage_moments(run.model, plan, run.units.optimizer)
            for plan in split(run.model, run.stages)
        )
        absence = EVICTION_SECONDS + 8 * state / run.down + (rounds.length + rounds.merge) / 2
    return Churn(rate=1 / run.stay_hours, absence=absence)


def _shares(run: Run, stages: tuple[StageSpeed, ...], steady: Pace, rounds: Rounds, churn: Churn) -> tuple[Share, ...]:
    """Each share is a rate in microbatches per second over the one before it, first without any loss."""
    useful = sum(stage.flops for stage in stages)
    reached = sum(run.flops(card) for card in run.devices)
    again = sum(stage.recomputed * run.units.tokens * _forward(run, stage) for stage in stages)
    computing = reached / (useful + again)
    working = len(run.devices) / sum(
        len(stage.cards) / rate for stage, rate in zip(stages, steady.compute, strict=True)
    )
    slowest = min(steady.compute)
    return (
        Share(name="kernels", kept=reached / run.peak),
        Share(name="recompute", kept=useful / (useful + again)),
        Share(name="steps", kept=working / computing),
        Share(name="imbalance", kept=slowest / working),
        Share(name="links", kept=steady.capacity / slowest),
        Share(name="queues", kept=steady.rate / steady.capacity),
        Share(name="ends", kept=1 - rounds.ends_share(steady.round_trip, steady.flight)),
        Share(name="merges", kept=1 - rounds.merge_share),
        Share(
            name="departures",
            kept=pace_kept(steady.compute, [len(stage.cards) for stage in stages], churn.away),
        ),
        Share(name="unmerged", kept=1 - churn.unmerged_share(rounds.length)),
    )


def _forward(run: Run, stage: StageSpeed) -> int:
    return stage_flops(run.model, stage.plan, tokens=run.units.sequence)[0]


def _uplink(pipeline: Pipeline, steady: Pace) -> float:
    if len(pipeline.stages) == 1:
        return 0.0
    between = pipeline.stages[1 : len(pipeline.stages) - 1] or pipeline.stages[:1]
    sent = 8 * (pipeline.forward_bytes + (pipeline.backward_bytes if len(pipeline.stages) > 2 else 0))
    return max(steady.rate / len(stage) * sent / min(replica.up for replica in stage) for stage in between)
