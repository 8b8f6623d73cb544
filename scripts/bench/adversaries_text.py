"""The adversaries' benchmark as markdown and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from scripts.bench.frontier import DELTA, Setting, chance
from scripts.bench.sentencing import PLANNED, Scale
from scripts.manifests import CLIP, TOLERANCE
from tests.adversaries.kinds import PROFILES, Kind

WIDTH = 120
FLOPS_PERCENT = 3.0
BUDGET = 0.03
"""Of units."""
GOAL = 0.95

Curves = Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]]
"""By direction and kind: (threshold, share of honest units that fail, share of falsified units that fail)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One adversary at one cheated fraction, pattern and audit budget."""

    kind: str
    geometry: str
    """How windows are picked and read."""
    pattern: str
    fraction: float
    budget: float
    trials: int
    rounds: int
    convicted_first_round: float
    convicted_hour: float
    error: float
    """Half of the 95 % interval of the hour's."""
    convicted_all: float
    """Within all rounds played."""
    rounds_to_conviction: float | None
    """Median of those convicted."""
    pay_until: float
    """Sum of its pay until its conviction, in rounds of an honest miner's."""
    weight_before: float
    """Mean weight over an honest miner's in rounds before its conviction."""
    weight_after: float | None
    """In the round that convicts and the one after."""
    pay_long: float
    """Its mean pay in the long run, if it is back when a conviction is over and all goes as it did before."""
    audited: float
    """Share of its units replayed per round, in sum over validators; with what suspicion adds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One target, over all adversaries that it is for."""

    geometry: str
    pattern: str
    budget: float
    goal: float
    """Share of trials that are to convict in the first round, which is an hour."""
    adversaries: int
    met: int
    worst: str
    worst_share: float


def draw(path: Path, curves: Curves) -> None:
    """One panel per direction, one line per kind; a dot where the threshold is the manifest's."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - heavy, and only for a picture

    figure = Figure(figsize=(13, 7))
    panels = figure.subplots(1, len(curves), sharey=True)
    styles = cycle([(f"C{index}", line) for line in ("-", "--") for index in range(10)])
    given = {name: next(styles) for name in sorted({kind for lines in curves.values() for kind in lines})}
    for panel, (way, lines) in zip(panels, curves.items(), strict=True):
        for kind, points in sorted(lines.items()):
            colour, line = given[kind]
            panel.step(
                [x for _, x, _ in points], [y for _, _, y in points], line, where="post", color=colour, label=kind
            )
            at = next((point for point in points if point[0] <= TOLERANCE), points[-1])
            panel.plot(at[1], at[2], "o", color=colour, markersize=5)
        panel.set_title(f"{way} units")
        panel.set_xlabel("honest bf16 units that fail against fp32 (share)")
        panel.set_xlim(-0.02, 1.02)
        panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)
    panels[0].set_ylabel("falsified units that fail (share)")
    figure.suptitle(
        f"Replays of falsified units; dots: tolerance {TOLERANCE:g}. Honest fp32 units fail nowhere on these axes"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def markdown(
    scales: Mapping[str, Scale],
    rates: Mapping[str, Mapping[str, Mapping[str, float]]],
    cells: Sequence[Cell],
    reached: Sequence[Target],
    bought: Sequence[Setting],
    holders: Mapping[str, Mapping[str, float | str]],
    sybil: Mapping[str, float],
    copier: Mapping[str, Mapping[str, float]],
) -> str:
    """The page that stands beside the JSON."""
    any_scale = next(iter(scales.values()))
    tables = []
    for name, scale in scales.items():
        here = [entry for entry in cells if entry.geometry == name]
        if here:
            tables += [f"## Units, {name}", _fill(_geometry(name, scale)), "\n".join(_table(here))]
            tables.append(_fill(_packed(scale, here)))
    parts = [
        "# Adversaries",
        _fill(
            f"""Written by `python -m scripts.bench.adversaries`; figures, seeds and curves are in `adversaries.json`.
            Falsified units are replayed with real stages of a nano model in four stages, at the manifest's tolerance
            of {TOLERANCE:g}; then rounds are played over the validators' own code for picking, deciding and scoring.
            Honest units pass here; false convictions are the subject of `convictions.json`."""
        ),
        _fill(
            f"""Convicted means: by validators with most of the stake. A round is an hour, so the first audited round
            and the first hour are one. {cells[0].trials} trials each, of {cells[0].rounds} rounds at most. One window
            never convicts, so a round in which fewer than two are looked into convicts nobody."""
        ),
        _fill(
            f"""All units falsified, a tenth of them anywhere (spread), or all units of a tenth of the windows (packed);
            kinds that falsify backwards only do so with that share of their backwards. A number behind a kind is
            another strength than its own: near the tolerance it slips through. `±` is half of the 95 % interval, `pay
            until` rounds of an honest miner's pay before conviction, spread and packed; a conviction then takes
            {any_scale.score_rounds} rounds. Weights are over an honest miner's."""
        ),
        *tables,
        "## Targets",
        "\n".join(_targets(reached)),
        _fill(
            f"""Replays are not what is missed: it is windows. A verdict takes two, and where a round has few picked
            windows, each read by one validator on average, some rounds look into fewer. Kinds share their draws, so
            they miss together: in closed form (below) {100 * certain():.1f} % of those that falsify all units are
            convicted in the first round with the planned windows, at a budget of {BUDGET:.0%}. Silence is worst: it
            convicts only with who asked."""
        ),
        f"## What {FLOPS_PERCENT:g} % of the FLOPs buy",
        _fill(_bought(bought)),
        "\n".join(_frontier(bought)),
        "## What a replay sees",
        "\n".join(_powers(rates)),
        "![ROC](adversaries.png)",
        _fill(
            f"""`honest bf16` is no cheater: its matrix products are rounded to bf16 and it is audited at fp32. What
            fails of it at {TOLERANCE:g} says whether a run can admit that class with this tolerance; `orion calibrate`
            says with which it could."""
        ),
        "## Where no unit is replayed",
        "\n".join(_others(holders, sybil, copier)),
    ]
    return "\n\n".join(parts) + "\n"


def _fill(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH)


def _geometry(name: str, scale: Scale) -> str:
    what = "`orion plan`'s audit defaults" if name == "planned" else "Wider slots, each with a window that all read"
    return f"""{what}: {scale.round_seconds:g} s a round, {scale.steps} local steps of {scale.accumulation} microbatches
        at {scale.microbatch_seconds:g} s, {scale.slots} slots with {scale.windows:g} picked windows each,
        {scale.readers:g} of {scale.validators} validators of equal stake reading one. The bound is
        {scale.rule.bound_convict:.2f} nats, one window counts {scale.rule.cap:.2f} at most."""


def _packed(scale: Scale, cells: Sequence[Cell]) -> str:
    largest = max(entry.budget for entry in cells)
    packed = [entry for entry in cells if entry.pattern == "packed" and entry.budget == largest]
    found = [entry for entry in packed if entry.rounds_to_conviction is not None]
    fade = -_fade(scale)
    text = f"""One window never convicts, so who cheats in few windows is found when two are picked before the first is
        forgotten: a clean window takes back {fade:.2f} nats, so one hit of {scale.rule.cap:.2f} and the next need
        {(2 * scale.rule.cap - scale.rule.bound_convict) / fade:.0f} clean windows at most between them. What is
        falsified meanwhile is a tenth of its units, and a merge scales what it sends down to {CLIP:g} times the median
        norm of its stage."""
    if found:
        worst = max(found, key=lambda entry: entry.pay_until)
        text += f""" At a budget of {largest:.0%} the longest lived kind that is found, {worst.kind}, is paid
            {worst.pay_until:.1f} rounds, is convicted in {worst.convicted_all:.0%} of the trials within {worst.rounds}
            rounds, and then loses {scale.score_rounds}: {worst.pay_long:.0%} of an honest miner's pay in the long run,
            while {1 - worst.fraction:.0%} of its windows are honest work."""
    return text


def certain() -> float:
    """P(convicted in the first round) with the planned windows, all units falsified."""
    return chance(PLANNED, units=2 * PLANNED.steps * PLANNED.accumulation, share=BUDGET, bad=1.0)


def _targets(reached: Sequence[Target]) -> list[str]:
    lines = [
        "| windows | units falsified | budget, units | target in the first hour | met by | worst |",
        "|" + "---|" * 6,
    ]
    patterns = {"all": "all", "spread": "10 %, spread"}
    return lines + [
        f"| {target.geometry} | {patterns[target.pattern]} | {target.budget:.0%} | {target.goal:.0%} | "
        f"{target.met} of {target.adversaries} | {target.worst}, {target.worst_share:.1%} |"
        for target in reached
    ]


def _bought(bought: Sequence[Setting]) -> str:
    """What the frontier says of the target at a tenth of the units."""
    within = [entry for entry in bought if entry.fits]
    good = [entry for entry in within if entry.both >= GOAL]
    best = max(within, key=lambda entry: entry.one)
    text = f"""A budget of 3 % of the units is 4 % of the FLOPs, before any whole step. Here all audits take
        {FLOPS_PERCENT:g} % at most: whole steps come first, units get what is left. `spread` is the chance that a
        falsified tenth of all units convicts within an hour, `one way` that of a tenth of one direction's, or of a
        tail, whose units are half as many: then half as many replays can fail. In closed form
        (`scripts/bench/frontier.py`), which agrees with what is played. The uplink counts weights of bf16 whose deltas
        are {DELTA:g} of them (`deltas.json`). Two readers that do not fit are in the JSON only."""
    if good:
        text += " " + ", ".join(f"{entry.slots} slots of {entry.windows:g}" for entry in good)
        text += f" with one reader reach {GOAL:.0%} for a spread tenth within a tenth of the uplink."
    else:
        text += f" None reaches {GOAL:.0%} for a spread tenth within a tenth of the uplink."
    if best.one < GOAL:
        text += f""" One way nothing within it does: {best.one:.1%} at best, as {GOAL:.0%} of that takes 58 units,
            2.3 % of all, even where every window is picked."""
    return text


def _frontier(bought: Sequence[Setting]) -> list[str]:
    head = "| slots x picked | readers | whole steps an hour | units | FLOPs | uplink, Mbit/s | host memory, GB | "
    lines = [head + "spread: 1 h | one way: 1 h |", "|" + "---|" * 9]
    for entry in bought:
        if entry.readers > 1 and not entry.fits:
            continue
        beyond = "" if entry.fits else f", limit {entry.uplink_limit_mbit:g}"
        lines.append(
            f"| {entry.slots} x {entry.windows:g} | {entry.readers:g} | {entry.whole_steps:g} | {entry.share:.2%} | "
            f"{entry.flops_percent:.2f} % | {entry.uplink_mbit:.0f}{beyond} | {entry.memory_gb:.0f} | "
            f"{entry.both:.1%} | {entry.one:.1%} |"
        )
    return lines


def _others(
    holders: Mapping[str, Mapping[str, float | str]],
    sybil: Mapping[str, float],
    copier: Mapping[str, Mapping[str, float]],
) -> list[str]:
    late = ", ".join(f"{ratio:.3f}" for ratio in copier["one_conviction_per_epoch"].values())
    copied = (
        f"never convicted; {copier['static_scores']['lag_1']:.3f} of an honest validator's dividends while no score "
        f"moves; with a conviction an epoch {late}, one, two, four epochs late"
    )
    rows = [
        (kind, f"{float(found['convicted_round']):.0%} convicted in its round", f"{found['moved']}; {found['where']}")
        for kind, found in holders.items()
    ]
    rows += [
        ("forged-receipts", "no replay: settlement pays none of its forged units", "nothing"),
        (
            "sybil",
            f"never convicted; {sybil['pay']:.2f} of one honest miner's pay for {sybil['identities']:g}",
            "a vote",
        ),
        ("weight-copier", copied, "the cost of auditing"),
    ]
    lines = ["| adversary | figure | what it gains | what stops it or makes it pointless |", "|---|---|---|---|"]
    return lines + [f"| {kind} | {what} | {gain} | {PROFILES[Kind(kind)].stopped_by} |" for kind, what, gain in rows]


def _fade(scale: Scale) -> float:
    """What a clean picked window adds, all its units replayed: below 0."""
    return scale.rule.weight(mild=0, gross=0, passed=2 * scale.accumulation)


def _powers(rates: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Share of falsified units beyond thresholds, by kind and place."""
    some = next(iter(next(iter(rates.values())).values()))
    names = [name for name in some if name.startswith("beyond")]
    lines = ["| adversary | units | median error | " + " | ".join(names) + " |", "|" + "---|" * (3 + len(names))]
    for kind, places in rates.items():
        for place, row in places.items():
            shares = " | ".join(f"{row[name]:.0%}" for name in names)
            lines.append(f"| {kind} | {place} | {row['median_error']:.3g} | {shares} |")
    return lines


def _table(cells: Sequence[Cell]) -> list[str]:
    """One row per kind and budget: P(conviction) in the first round, hour, median rounds, by pattern."""
    head = "| adversary | budget | all units: 1st round | 10 % spread: 1 h | median rounds | 10 % packed: 1 h | "
    lines = [
        head + "all rounds | median rounds | pay until (spread, packed) | weight before → after |",
        "|" + "---|" * 10,
    ]
    for kind in dict.fromkeys(entry.kind for entry in cells):
        for budget in sorted({entry.budget for entry in cells}):
            by = {entry.pattern: entry for entry in cells if (entry.kind, entry.budget) == (kind, budget)}
            everything, spread, packed = by["all"], by["spread"], by["packed"]
            lines.append(
                f"| {kind} | {budget:.0%} | {everything.convicted_first_round:.1%} | {spread.convicted_hour:.1%} "
                f"± {spread.error:.1%} | {_rounds(spread)} | {packed.convicted_hour:.1%} ± {packed.error:.1%} | "
                f"{packed.convicted_all:.1%} | {_rounds(packed)} | {spread.pay_until:.2f}, {packed.pay_until:.2f} | "
                f"{everything.weight_before:.2f} → {_weight(everything)} |"
            )
    return lines


def _rounds(entry: Cell) -> str:
    return "never" if entry.rounds_to_conviction is None else f"{entry.rounds_to_conviction:g}"


def _weight(entry: Cell) -> str:
    return "not convicted" if entry.weight_after is None else f"{entry.weight_after:.2f}"
