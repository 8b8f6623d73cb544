"""What a boundary's bytes are worth in time: losses of the comparison, seconds of `orion plan`.

The plan says how many tokens per second a run of 100b trains over given links with a given boundary. The comparison
says by how much its loss is off at equal tokens; what tokens are worth follows from runs of the control of several
lengths: near there, loss falls by `slope` nats whenever tokens grow by a factor e. A boundary whose loss is higher by d
therefore needs exp(d / slope) times the tokens, and its time to equal loss is that over its tokens per second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.memory import DoesNotFitError
from scripts.bench.learning.rows import Form, Row
from scripts.bench.learning.tables import Results, Summary, control, paired, summaries
from scripts.plan.options import PlanError, PlanOptions, Run, read
from scripts.plan.speed import plan_speed
from subnet.swarm.pace import PaceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One ratio over one link."""

    link: str
    ratio: int
    """1 is the control."""
    tokens_per_second: float | None
    """None where the plan does not fit."""
    needed: float
    """Tokens to the control's loss over the control's."""

    @property
    def seconds(self) -> float:
        """Per token of the control's."""
        return math.inf if self.tokens_per_second is None else self.needed / self.tokens_per_second


def slope(found: Mapping[Row, Summary], row: Row) -> float | None:
    """Nats by which its loss falls when tokens grow by a factor e, over the shortest and longest runs of it that are
    there; None for one length."""
    lengths = {other.steps: value.mean for other, value in found.items() if replace(other, steps=row.steps) == row}
    if len(lengths) < 2:
        return None
    first, last = min(lengths), max(lengths)
    return (lengths[first] - lengths[last]) / math.log(last / first)


def frontier(results: Results, options: PlanOptions, links: Sequence[tuple[str, str]], row: Row) -> list[Point]:
    """Every ratio that `row`'s form was trained with, and its control, over every link (up, down). Empty
    without runs of the control of several lengths."""
    found = summaries(results)
    base = control(row)
    worth = slope(found, base)
    if worth is None or base not in found:
        return []
    ratios = {1: base} | {
        other.ratio: other for other in found if other.form == row.form and replace(other, ratio=row.ratio) == row
    }
    points = []
    for up, down in links:
        run = read(replace(options, up=up, down=down))
        for ratio, other in sorted(ratios.items()):
            both = paired(found[other], found[base])
            if both is None:
                continue
            points.append(
                Point(
                    link=up,
                    ratio=ratio,
                    tokens_per_second=_speed(run, row.form, ratio),
                    needed=math.exp((both[0] - both[1]) / worth),
                )
            )
    return points


def _speed(run: Run, form: Form, ratio: int) -> float | None:
    try:
        return plan_speed(replace(run, model=_bounded(run.model, form, ratio))).tokens_per_second
    except (PlanError, DoesNotFitError, PaceError):
        return None


def _bounded(model: ModelConfig, form: Form, ratio: int) -> ModelConfig:
    rank = model.boundary.rank
    if ratio == 1:
        return replace(model, boundary=BoundaryConfig(rank=rank))
    width = model.hidden // ratio
    tables = rank if form == "t" else 0
    return replace(model, boundary=BoundaryConfig(form=BoundaryForm(form), width=width, rank=tables))


def frontier_table(points: Sequence[Point]) -> list[str]:
    """Links down, ratios across: tokens per second, and time to equal loss over the best of the row."""
    ratios = sorted({point.ratio for point in points})
    lines = [f"| link | {' | '.join(f'{ratio}x' for ratio in ratios)} |", "|---" * (1 + len(ratios)) + "|"]
    for link in dict.fromkeys(point.link for point in points):
        here = {point.ratio: point for point in points if point.link == link}
        best = min(point.seconds for point in here.values())
        cells = [
            "does not fit"
            if here[ratio].tokens_per_second is None
            else f"{here[ratio].tokens_per_second:,.0f} tokens/s, {here[ratio].seconds / best:.2f}"
            for ratio in ratios
        ]
        lines.append(f"| {link} | {' | '.join(cells)} |")
    return lines
