"""From a story to what the page shows: pure functions, one per section."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby

from neurons.telemetry import Merged, MinerScored
from scripts.dashboard.facts import Facts
from scripts.dashboard.measure import measured
from scripts.dashboard.state import (
    Audits,
    Curves,
    FailedCheck,
    Fault,
    Grid,
    LastMerge,
    Log,
    Merge,
    Miner,
    Role,
    Round,
    Rounds,
    Run,
    Score,
    Scores,
    Sentence,
    Stage,
    State,
    Status,
    Totals,
    Validator,
    Verdict,
    WeightRow,
    Weights,
)
from scripts.dashboard.story import Findings, Story
from scripts.dashboard.yardstick import NOTHING_NAMED, Yardstick
from scripts.live import AWAY
from scripts.tally import Conviction, MinerTally

ROUNDS = 40
VERDICTS = 60


def snapshot(
    story: Story,
    facts: Facts | None,
    *,
    folder: str,
    yardstick: Yardstick = NOTHING_NAMED,
    flops_per_token: int | None = None,
    torn: int = 0,
    problem: str = "",
    at: float | None = None,
    end: float | None = None,
) -> State:
    """What the page shows. `at` and `end` differ from the story's last event only in a replay."""
    last = story.tally.last_event
    status: Status = "waiting" if story.begin is None else "finished" if story.tally.over else "running"
    return State(
        run=Run(
            name=folder if facts is None else facts.run.name,
            folder=folder,
            status=status,
            round=story.tally.round,
            rounds=None if facts is None else facts.round.count,
            begin=story.begin,
            at=last if at is None else at,
            end=last if end is None else end,
            torn=torn,
            problem=problem,
        ),
        totals=_totals(story, facts, yardstick, flops_per_token),
        grid=_grid(story),
        curves=_curves(story, facts, math.inf if story.tally.over else (last or 0.0)),
        rounds=_rounds(story),
        audits=_audits(story),
        scores=_scores(story),
        weights=_weights(story),
        log=Log(story.notes),
    )


def _totals(story: Story, facts: Facts | None, yardstick: Yardstick, flops_per_token: int | None) -> Totals:
    tally = story.tally
    traffic = [miner.traffic for miner in tally.miners.values()]
    newest = max(tally.validation, default=None)
    known = facts is not None
    against = measured(story, facts, yardstick, flops_per_token)
    return Totals(
        loss=tally.recent_loss if tally.recent else None,
        validation=None if newest is None else tally.validation[newest],
        validation_round=newest,
        tokens=tally.tokens if known else None,
        tokens_per_second=tally.tokens_per_second if known and tally.recent else None,
        microbatches=tally.completed,
        in_flight=sum(len(number.in_flight) for number in tally.rounds.values() if not number.closed),
        lost=tally.lost,
        rerouted=tally.rerouted,
        adopted=tally.adopted,
        gradients_lost=tally.gradients_lost,
        forward_bytes=sum(item.forward for item in traffic),
        backward_bytes=sum(item.backward for item in traffic),
        merge_bytes=sum(item.merge for item in traffic),
        audits_passed=tally.audits_passed,
        audits_failed=tally.audits_failed,
        audit_flops_share=tally.audit_flops_share,
        audit_bytes_share=tally.audit_bytes_share,
        convicted=len({verdict.hotkey for verdict in tally.convictions if verdict.until > tally.round}),
        weights_set=tally.weights_set,
        flops_per_second=against.flops_per_second,
        mfu=against.mfu,
        formula=against.formula,
        card="" if yardstick.card is None else yardstick.card.name,
        miners=against.miners,
        miner_hours=against.miner_hours,
        dollars=against.dollars,
        dollars_per_million=against.dollars_per_million,
        target=yardstick.target,
        progress=against.progress,
        seconds_left=against.seconds_left,
        killed=tally.churn.killed,
        frozen=tally.churn.frozen,
        joined=tally.churn.joined,
        left=tally.churn.left,
        benched=tally.churn.benched,
        restarted=tally.churn.restarted,
        resumed=tally.churn.resumed,
    )


# -- who is where -----------------------------------------------------------------------------------------------------


def _grid(story: Story) -> Grid:
    tally = story.tally
    tallies = [*tally.miners.values(), *_unseen(story)]
    widths = [len(beginning.replicas) for beginning in story.beginnings.values()]
    held = [miner.stage + 1 for miner in tallies if miner.stage is not None]
    count = max([*widths, *held], default=0)
    stages: list[list[Miner]] = [[] for _ in range(count)]
    away = []
    for tallied in sorted(tallies, key=lambda miner: by_number(miner.name)):
        if story.roles.get(tallied.name, "miner") != "miner":
            continue
        miner = _miner(story, tallied)
        if miner.stage is None or miner.state in AWAY:
            away.append(miner)
        else:
            stages[miner.stage].append(miner)
    return Grid(
        stages=[Stage(index, _role(index, count), miners) for index, miners in enumerate(stages)],
        away=away,
        validators=[
            _validator(story, name) for name in sorted(story.roles, key=by_number) if story.roles[name] == "validator"
        ],
    )


def _unseen(story: Story) -> list[MinerTally]:
    """Miners that validators speak of and whose own log is not in the folder, as in that of a single validator."""
    seen = set(story.tally.hotkeys.values())
    stages = {hotkey: findings.stage for hotkey, findings in story.findings.items()}
    stages |= {hotkey: score.stage for hotkey, score in story.tally.scores.items()}
    return [
        MinerTally(story.called(hotkey), hotkey, stage, state="unseen")
        for hotkey, stage in stages.items()
        if hotkey not in seen
    ]


def by_number(name: str) -> tuple[str, int, str]:
    """Orders miner-2 before miner-10."""
    stem, _, number = name.rpartition("-")
    return (stem, int(number), "") if number.isascii() and number.isdigit() else (name, -1, "")


def _role(index: int, count: int) -> Role:
    if count == 1:
        return "whole"
    return "head" if index == 0 else "tail" if index == count - 1 else "body"


def _miner(story: Story, miner: MinerTally) -> Miner:
    tally = story.tally
    merged = story.last_merge.get(miner.name)
    scores = _latest_scores(story, miner.hotkey)
    uid = scores[0].uid if scores else None
    shares = [] if uid is None else [weights.get(uid, 0.0) for weights in tally.weights.values()]
    findings = story.findings.get(miner.hotkey, Findings(miner.stage or 0))
    return Miner(
        name=miner.name,
        hotkey=miner.hotkey,
        uid=uid,
        stage=miner.stage,
        state=miner.state,
        steps=miner.steps,
        units=miner.units,
        fetching=miner.fetching,
        merge=None if merged is None else LastMerge(merged.round, merged.included, merged.void),
        sentence=_sentence([verdict for verdict in tally.convictions if verdict.hotkey == miner.hotkey], tally.round),
        starts=miner.starts,
        failure=tally.failures.get(miner.name, ""),
        plays=tally.adversaries.get(miner.name, ""),
        passed=findings.passed,
        failed=findings.failed,
        other_failed=findings.other_failed,
        weight=_mean(shares),
        score=_mean([score.score for score in scores]),
    )


def _sentence(verdicts: list[Conviction], now: int) -> Sentence | None:
    if not verdicts:
        return None
    until = max(verdict.until for verdict in verdicts)
    return Sentence(
        validators=sorted({verdict.validator for verdict in verdicts}, key=by_number),
        until=until,
        in_force=until > now,
        reason=verdicts[-1].reason,
    )


def _latest_scores(story: Story, hotkey: str) -> list[MinerScored]:
    for number in sorted(story.scores, reverse=True):
        found = [score for (_, of), score in story.scores[number].items() if of == hotkey]
        if found:
            return found
    return []


def _validator(story: Story, name: str) -> Validator:
    tally = story.tally
    costs = [cost for (_, validator), cost in tally.audit_costs.items() if validator == name]
    return Validator(
        name=name,
        state="failed" if name in tally.failures else "done" if name in tally.finished else "working",
        failure=tally.failures.get(name, ""),
        units=sum(cost.units for cost in costs),
        flops=sum(cost.flops for cost in costs),
        bytes=sum(cost.bytes for cost in costs),
        convictions=sum(verdict.validator == name for verdict in tally.convictions),
    )


# -- how it goes ------------------------------------------------------------------------------------------------------


def _curves(story: Story, facts: Facts | None, now: float) -> Curves:
    tally = story.tally
    tokens = None if facts is None else facts.tokens_per_microbatch
    rate = story.rate.whole(now)
    validated = sorted(tally.validation)
    return Curves(
        loss_time=[point.time for point in story.losses.points],
        loss_done=[point.done for point in story.losses.points],
        loss=[point.loss for point in story.losses.points],
        loss_width=story.losses.width,
        validation_round=validated,
        validation_time=[
            story.beginnings[number].time if number in story.beginnings else story.validated_at[number]
            for number in validated
        ],
        validation_done=[
            sum(len(round_.done) for before, round_ in tally.rounds.items() if before < number) for number in validated
        ],
        validation=[tally.validation[number] for number in validated],
        rate_time=[time for time, _ in rate],
        rate=[per_second * (tokens or 1) for _, per_second in rate],
        rate_seconds=story.rate.seconds,
        tokens_per_microbatch=tokens,
    )


def _rounds(story: Story) -> Rounds:
    tally = story.tally
    merged = {number for number, _ in story.merges}
    numbers = sorted({*tally.rounds, *tally.validation, *story.beginnings, *merged}, reverse=True)
    return Rounds([_round(story, number) for number in numbers[:ROUNDS]], max(0, len(numbers) - ROUNDS))


def _round(story: Story, number: int) -> Round:
    tallied, beginning = story.tally.rounds.get(number), story.beginnings.get(number)
    return Round(
        number=number,
        time=None if beginning is None else beginning.time,
        block=None if beginning is None else beginning.block,
        done=len(tallied.done) if tallied else 0,
        in_flight=len(tallied.in_flight) if tallied else 0,
        closed=tallied.closed if tallied else False,
        loss=tallied.loss / len(tallied.done) if tallied and tallied.done else None,
        validation=story.tally.validation.get(number),
        merges=[
            _merge(stage, list(reported.values()))
            for (merged, stage), reported in sorted(story.merges.items())
            if merged == number
        ],
    )


def _merge(stage: int, reported: list[Merged]) -> Merge:
    return Merge(
        stage=stage,
        reported=len(reported),
        included=sum(one.included for one in reported),
        sources=max(one.sources for one in reported),
        void=any(one.void for one in reported),
        identical=len({one.weights for one in reported}) == 1,
        bytes=sum(one.received for one in reported),
        seconds=max(one.seconds for one in reported),
        carried=max(one.carried for one in reported),
    )


# -- trust ------------------------------------------------------------------------------------------------------------


def _audits(story: Story) -> Audits:
    tally = story.tally
    stages = {miner.hotkey: miner.stage for miner in tally.miners.values()}
    ordered = sorted(tally.convictions, key=lambda verdict: (-verdict.round, verdict.hotkey))
    verdicts = [
        _verdict(story.called(hotkey), stages.get(hotkey), number, list(group), tally.round)
        for (number, hotkey), group in groupby(ordered, key=lambda verdict: (verdict.round, verdict.hotkey))
    ]
    return Audits(
        verdicts=sorted(verdicts, key=lambda verdict: (-verdict.round, by_number(verdict.miner)))[:VERDICTS],
        failed=[
            FailedCheck(
                round=check.round,
                validator=validator,
                miner=story.called(check.hotkey),
                stage=check.stage,
                check=check.check,
                grade=check.grade,
                error=check.error if check.error >= 0 and math.isfinite(check.error) else None,
                tolerance=check.tolerance,
                sample=check.sample,
                reason=check.reason,
                reported=bool(check.accuser),
            )
            for validator, check in reversed(story.failures)
        ],
        faults=[
            Fault(fault.round, fault.stage, story.called(fault.hotkey), fault.fault, fault.reason)
            for fault in reversed(tally.merge_faults)
        ][:VERDICTS],
    )


def _verdict(miner: str, stage: int | None, number: int, given: list[Conviction], now: int) -> Verdict:
    until = max(verdict.until for verdict in given)
    return Verdict(
        round=number,
        miner=miner,
        stage=stage,
        validators=sorted({verdict.validator for verdict in given}, key=by_number),
        until=until,
        in_force=until > now,
        reasons=list(dict.fromkeys(verdict.reason for verdict in given)),
    )


def _scores(story: Story) -> Scores:
    return Scores(
        rounds=sorted(story.scores, reverse=True),
        scores=[
            Score(
                validator=validator,
                miner=story.called(hotkey),
                uid=one.uid,
                round=one.round,
                stage=one.stage,
                claimed=one.claimed,
                forward=one.forward,
                backward=one.backward,
                unpaid=one.unpaid,
                forward_flops=one.forward_flops,
                flops=one.flops,
                correctness=one.correctness,
                timeliness=one.timeliness,
                missed=one.missed,
                scarcity=one.scarcity,
                score=one.score,
                mean=one.mean,
                rounds=one.rounds,
                share=one.share,
                burn=one.burn,
                weight=one.weight,
            )
            for number in sorted(story.scores, reverse=True)
            for (validator, hotkey), one in sorted(story.scores[number].items(), key=lambda entry: entry[0][0])
        ],
    )


def _weights(story: Story) -> Weights:
    tally = story.tally
    validators = sorted(tally.weights, key=by_number)
    rounds = {validator: number for number, validator, _ in tally.weights_history}
    names = {one.uid: (story.called(hotkey), one.stage) for hotkey, one in tally.scores.items()}
    barred = {verdict.hotkey for verdict in tally.convictions if verdict.until > tally.round}
    hotkeys = {one.uid: hotkey for hotkey, one in tally.scores.items()}
    uids = sorted({*names, *(uid for given in tally.weights.values() for uid in given)}) if validators else []
    rows = []
    for uid in uids:
        given = [tally.weights[validator].get(uid, 0.0) for validator in validators]
        miner, stage = names.get(uid, ("", None))
        rows.append(WeightRow(uid, miner, stage, given, _mean(given) or 0.0, hotkeys.get(uid) in barred))
    return Weights(validators, [rounds[validator] for validator in validators], rows)


def _mean(values: Iterable[float]) -> float | None:
    held = list(values)
    return sum(held) / len(held) if held else None
