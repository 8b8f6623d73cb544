"""Every kind of adversary: how surely it is found, how soon, what it gains until then, and what it weighs afterwards.

    python -m scripts.bench.adversaries --out docs/benchmarks      (some minutes)
    python -m scripts.bench.adversaries --quick                    (less than one)

Falsified units are replayed with real stages (`scripts.bench.detection`); rounds of a 100B swarm are then played over
the validators' own decision code with the errors measured (`scripts.bench.sentencing`). Result: OUT/adversaries.json,
.md and .png. A conviction is one by validators with most of the stake.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median

import torch

from scripts.bench.adversaries_text import Cell, Target, draw, markdown
from scripts.bench.detection import CHEATS, STAGES, WEAK, Cheat, Errors, measure, power, roc
from scripts.bench.frontier import settings
from scripts.bench.pointless import copier_dividends, holders_found, sybil_pay
from scripts.bench.report import report
from scripts.bench.sentencing import DENSE, PLANNED, Book, Replay, Trial, drawn, finding, play
from scripts.manifests import TOLERANCE
from subnet.trust.decision import GROSS
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.ledger import Direction, Leaf
from tests.adversaries.kinds import PROFILES, Kind, Plan, Role

HOUR = 3600.0
PATTERNS = (("all", 1.0, False), ("spread", 0.1, False), ("packed", 0.1, True))
"""Name, cheated fraction of units (or, packed, of windows, all of whose units are cheated)."""
BUDGETS = (0.01, 0.03)
THRESHOLDS = (0.0079, TOLERANCE, 0.05, 0.1, 0.2, 0.5)
WITHHELD = Cheat(Kind.WITHHELD_EVIDENCE, PROFILES[Kind.WITHHELD_EVIDENCE].strength)
ZSCORE = 1.96
GEOMETRIES = {"planned": PLANNED, "dense": DENSE}


def replays(cheat: Cheat, errors: Sequence[Errors], plan: Plan, *, steps: int) -> Replay:
    """What a replay of any unit of this cheater finds, by errors measured in the unit's direction."""
    by_direction = {way: [entry for entry in errors if entry.direction is way] for way in Direction}

    def replay(number: int, leaf: Leaf) -> tuple[Finding, ...]:
        honest = Check.FORWARD if leaf.direction is Direction.FORWARD else Check.BACKWARD
        version = number * steps + leaf.version
        cheats = plan.cheats(version=version, sample=leaf.sample, direction=leaf.direction)
        if cheats and cheat == WITHHELD:
            return (finding(leaf, number, Check.WITHHELD, error=1.0, tolerance=0.0, grade=Grade.WITHHELD),)
        seen = by_direction[leaf.direction]
        if not cheats or not seen:
            return (finding(leaf, number, honest, error=0.0, tolerance=TOLERANCE),)
        entry = seen[drawn(plan.seed, number, leaf, len(seen))]
        return tuple(
            finding(leaf, number, check, error=error, tolerance=TOLERANCE) for check, error in entry.by_check.items()
        )

    return replay


def place_of(kind: Kind) -> tuple[int, tuple[Direction, ...]]:
    """Stage that the kind is played at, and the directions an audit draws there."""
    role = PROFILES[kind].role
    if role is Role.HEAD:
        return 0, (Direction.FORWARD,)
    if role is Role.TAIL:
        return STAGES - 1, (Direction.BACKWARD,)
    return 1, tuple(Direction)


Fates = dict[tuple[object, ...], list[Trial]]
"""Trials by all that they depend on: kinds whose every unit fails alike share them, because the seeds are the same."""


def cell(
    cheat: Cheat,
    errors: Sequence[Errors],
    geometry: str,
    *,
    pattern: tuple[str, float, bool],
    budget: float,
    trials: int,
    rounds: int,
    seed: int,
    known: Fates | None = None,
) -> Cell:
    name, fraction, packed = pattern
    scale, (stage, directions) = GEOMETRIES[geometry], place_of(cheat.kind)
    units = 2 * scale.steps * scale.accumulation if stage == 0 else None
    book = Book.of(scale, directions=directions, units=units)
    here = [entry for entry in errors if entry.stage == stage]
    as_units = Kind.REPLAY if cheat == WITHHELD else cheat.kind
    key = (geometry, pattern, budget, stage, PROFILES[as_units].falsifies, *outcomes(cheat, here))
    known = {} if known is None else known
    if key not in known:
        known[key] = []
        for trial in range(trials):
            plan = Plan.of(as_units, share=fraction, packed=packed, seed=seed + trial)
            replay = replays(cheat, here, plan, steps=scale.steps)
            known[key].append(play(scale, book, replay, share=budget, rounds=rounds, seed=seed + trial))
    return summed(cheat, name, fraction, budget, geometry, book, known[key], rounds=rounds)


def outcomes(cheat: Cheat, errors: Sequence[Errors]) -> tuple[object, ...]:
    """What replays of its units come to, by direction: the one outcome, or all of its errors where they differ."""
    if cheat == WITHHELD:
        return ("withheld",)
    found: list[object] = []
    for way in Direction:
        worsts = [entry.worst for entry in errors if entry.direction is way]
        grades = {0 if worst <= TOLERANCE else 1 if worst <= GROSS * TOLERANCE else 2 for worst in worsts}
        found.append(tuple(grades) if len(grades) <= 1 else tuple(worsts))
    return tuple(found)


def summed(
    cheat: Cheat,
    pattern: str,
    fraction: float,
    budget: float,
    geometry: str,
    book: Book,
    fates: Sequence[Trial],
    *,
    rounds: int,
) -> Cell:
    """The figures of many trials."""
    scale = GEOMETRIES[geometry]
    within = max(1, int(HOUR / scale.round_seconds))
    firsts = [fate.first for fate in fates]
    hour = mean(first is not None and first < within for first in firsts)
    before = [pay for fate, first in zip(fates, firsts, strict=True) for pay in fate.pay[:first]]
    after = [
        pay for fate, first in zip(fates, firsts, strict=True) if first is not None for pay in fate.pay[first:][:2]
    ]
    found = [first + 1 for first in firsts if first is not None]
    paid = mean(sum(fate.pay[:first]) for fate, first in zip(fates, firsts, strict=True))
    return Cell(
        kind=cheat.name,
        geometry=geometry,
        pattern=pattern,
        fraction=fraction,
        budget=budget,
        trials=len(fates),
        rounds=rounds,
        convicted_first_round=_brief(mean(first == 0 for first in firsts)),
        convicted_hour=_brief(hour),
        error=_brief(ZSCORE * (hour * (1 - hour) / len(fates)) ** 0.5),
        convicted_all=_brief(len(found) / len(fates)),
        rounds_to_conviction=median(found) if found else None,
        pay_until=_brief(paid),
        weight_before=_brief(mean(before)) if before else 1.0,
        weight_after=_brief(mean(after)) if after else None,
        pay_long=_brief(paid / (paid + scale.score_rounds) if found else 1.0),
        audited=_brief(sum(fate.replayed for fate in fates) / sum(len(fate.pay) for fate in fates) / book.units),
    )


def powers(errors: Mapping[Cheat, Sequence[Errors]], noisy: Sequence[Errors]) -> dict[str, dict[str, dict[str, float]]]:
    """By kind and place: share of units beyond each threshold; and of honest bf16 units beside fp32 ones."""
    named: dict[str, Sequence[Errors]] = {cheat.name: found for cheat, found in errors.items()}
    table = {}
    for name, found in (*named.items(), ("honest bf16", noisy)):
        rows = {}
        for place in sorted({(entry.stage, entry.direction) for entry in found}):
            here = [entry for entry in found if (entry.stage, entry.direction) == place]
            rows[f"{_role(place[0])} {place[1].name.lower()}"] = {
                "units": len(here),
                "median_error": _brief(median(entry.worst for entry in here)),
                **{f"beyond {t:g}": _brief(power(here, t)) for t in THRESHOLDS},
            }
        table[name] = rows
    return table


def _role(stage: int) -> str:
    return "head" if stage == 0 else "tail" if stage == STAGES - 1 else f"body {stage}"


def curves(
    errors: Mapping[Cheat, Sequence[Errors]], noisy: Sequence[Errors]
) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """ROC by direction and kind: (threshold, honest bf16 units that fail, falsified units that fail)."""
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for way in Direction:
        good = [entry for entry in noisy if entry.direction is way]
        lines = {}
        for cheat, entries in errors.items():
            bad = [entry for entry in entries if entry.direction is way]
            if bad and good:
                lines[cheat.name] = [(_brief(t), _brief(x), _brief(y)) for t, x, y in roc(bad, good)]
        found[way.name.lower()] = lines
    return found


def _brief(value: float) -> float:
    return float(f"{value:.4g}")


def targets(cells: Sequence[Cell]) -> Iterator[Target]:
    """Who is to be convicted how soon, and of how many adversaries that is so: all units falsified in the first round,
    10 % spread with 95 % within an hour at the larger budget. Those near the tolerance are not among them."""
    weak = {cheat.name for cheat in WEAK}
    goals = [("all", budget, 1.0) for budget in BUDGETS] + [("spread", max(BUDGETS), 0.95)]
    for geometry in dict.fromkeys(entry.geometry for entry in cells):
        for pattern, budget, goal in goals:
            reached = {
                entry.kind: entry.convicted_first_round if pattern == "all" else entry.convicted_hour
                for entry in cells
                if (entry.geometry, entry.pattern, entry.budget) == (geometry, pattern, budget)
                and entry.kind not in weak
            }
            if reached:
                worst = min(reached, key=lambda kind: reached[kind])
                yield Target(
                    geometry=geometry,
                    pattern=pattern,
                    budget=budget,
                    goal=goal,
                    adversaries=len(reached),
                    met=sum(share >= goal for share in reached.values()),
                    worst=worst,
                    worst_share=reached[worst],
                )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.adversaries", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--quick", action="store_true", help="few units, trials and rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=None, help="per adversary, pattern and budget (default: 30)")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of each trial (default: 8)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    trials = options.trials or (3 if options.quick else 30)
    rounds = options.rounds or (3 if options.quick else 8)
    began = time.monotonic()
    errors, noisy = measure(microbatches=1 if options.quick else 8, steps=4 if options.quick else 40, seed=options.seed)
    measured = time.monotonic() - began
    known: Fates = {}
    cells = [
        cell(
            cheat,
            errors.get(cheat, ()),
            geometry,
            pattern=pattern,
            budget=budget,
            trials=trials,
            rounds=rounds,
            seed=options.seed * 1_000_003,
            known=known,
        )
        for geometry, cheats in (("planned", (*CHEATS, WITHHELD, *WEAK)), ("dense", (*CHEATS, WITHHELD)))
        for cheat in cheats
        for budget in BUDGETS
        for pattern in PATTERNS
    ]
    reached, rates, lines = list(targets(cells)), powers(errors, noisy), curves(errors, noisy)
    bought = list(settings())
    holders = holders_found(validators=PLANNED.validators, trials=trials * 10, seed=options.seed)
    sybil, copier = sybil_pay(rounds=rounds), copier_dividends()
    figures = {
        "geometries": {
            name: asdict(scale) | {"steps": scale.steps, "bound": scale.rule.bound_convict, "cap": scale.rule.cap}
            for name, scale in GEOMETRIES.items()
        },
        "seed": options.seed,
        "tolerance": TOLERANCE,
        "seconds": {"measuring": round(measured, 1), "playing": round(time.monotonic() - began - measured, 1)},
        "power": rates,
        "cells": [asdict(entry) for entry in cells],
        "holders": holders,
        "sybil": sybil,
        "weight_copier": copier,
        "targets": [asdict(target) for target in reached],
        "frontier": [asdict(entry) for entry in bought],
        "roc": lines,
    }
    report("adversaries", options.out, figures)
    draw(options.out / "adversaries.png", lines)
    page = markdown(GEOMETRIES, rates, cells, reached, bought, holders, sybil, copier)
    (options.out / "adversaries.md").write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
