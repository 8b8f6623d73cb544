"""Results of a grid as markdown: means over seeds with their spread, and what a boundary costs beside its control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import mean, stdev

from scripts.bench.learning.rows import Row
from scripts.bench.learning.training import Curve

Results = Mapping[Row, Curve]


@dataclass(frozen=True, slots=True)
class Summary:
    """One row over its seeds."""

    losses: Mapping[int, float]
    """By seed."""
    parameters: int

    @property
    def mean(self) -> float:
        return mean(self.losses.values())

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return stdev(self.losses.values()) if len(self.losses) > 1 else 0.0

    def __str__(self) -> str:
        more = f" ± {self.spread:.3f}" if len(self.losses) > 1 else ""
        return f"{self.mean:.3f}{more}"


def summaries(results: Results) -> dict[Row, Summary]:
    """By row with seed 0, whatever its seeds are."""
    found: dict[Row, dict[int, Curve]] = {}
    for row, curve in results.items():
        found.setdefault(replace(row, seed=0), {})[row.seed] = curve
    return {
        row: Summary({seed: curve.final for seed, curve in curves.items()}, next(iter(curves.values())).parameters)
        for row, curves in found.items()
    }


def control(row: Row) -> Row:
    """What a boundary is held against: for `t` the uncompressed model with its tables, for all others without."""
    if row.form in ("t", "none+", "cut"):
        return replace(row, form="none+", ratio=1)
    return replace(row, form="none", ratio=1, boundaries=1 if row.depth == 1 else row.boundaries)


def cost(row: Row, found: Mapping[Row, Summary]) -> float | None:
    """By how much its loss is above its control's, as a share, over the seeds that both have: samples differ more than
    forms do. None where there are none."""
    return _above(found.get(row), found.get(control(row)))


def paired(own: Summary, other: Summary) -> tuple[float, float] | None:
    """Both means over the seeds that both have; None where there are none."""
    seeds = own.losses.keys() & other.losses.keys()
    if not seeds:
        return None
    return mean(own.losses[seed] for seed in seeds), mean(other.losses[seed] for seed in seeds)


def _above(own: Summary | None, other: Summary | None) -> float | None:
    both = None if own is None or other is None else paired(own, other)
    return None if both is None else both[0] / both[1] - 1


def boundary_table(results: Results, *, boundaries: int, optimizer: str, steps: int) -> list[str]:
    """Forms down, ratios across: loss, and in brackets by how much it is above its control's. Of one `Scale`."""
    found = summaries(results)
    here = [
        row
        for row in found
        if row.usual
        and (row.optimizer, row.steps) == (optimizer, steps)
        and (row.boundaries == boundaries or row.form == "none")
    ]
    ratios = sorted({row.ratio for row in here if row.ratio > 1})
    lines = [f"| form | parameters | 1x | {' | '.join(f'{ratio}x' for ratio in ratios)} |"]
    lines.append("|---" * (3 + len(ratios)) + "|")
    for form in dict.fromkeys(row.form for row in sorted(here, key=_order)):
        rows = {row.ratio: row for row in here if row.form == form}
        sizes = {found[row].parameters for row in rows.values()}
        size = f"{min(sizes) / 1e6:.2f} M" if len(sizes) == 1 else f"{min(sizes) / 1e6:.2f} to {max(sizes) / 1e6:.2f} M"
        cells = [_cell(rows.get(ratio), found) for ratio in (1, *ratios)]
        lines.append(f"| {form} | {size} | {' | '.join(cells)} |")
    return lines


def _order(row: Row) -> int:
    return ("none", "none+", "wide", "cut", "truncation", "a", "b", "linear", "subspace", "t").index(row.form)


def _cell(row: Row | None, found: Mapping[Row, Summary]) -> str:
    if row is None:
        return ""
    return _beside(found[row], None if control(row) == row else cost(row, found))


def _beside(own: Summary, above: float | None) -> str:
    """A loss, and in brackets by how much it is above another, as a share."""
    return f"{own}" if above is None else f"{own} ({100 * above:+.1f} %)"


def depth_table(results: Results) -> list[str]:
    """Optimizers, steps and rates down, microbatches in flight across: loss, and in brackets against depth 1."""
    found = summaries(results)
    deep = [row for row in found if row.depth > 1]
    depths = sorted({row.depth for row in deep})
    lines = [f"| optimizer | rate | microbatches a step | form | 1 | {' | '.join(map(str, depths))} |"]
    lines.append("|---" * (5 + len(depths)) + "|")
    for base in dict.fromkeys(replace(row, depth=1) for row in deep):
        flat = found.get(base) or found.get(replace(base, boundaries=1))
        cells = ["" if flat is None else str(flat)]
        for depth in depths:
            own = found.get(replace(base, depth=depth))
            cells.append("" if own is None else _beside(own, _above(own, flat)))
        what = f"{base.optimizer} | {base.inner().lr:g} | {base.accumulation} | {base.called}"
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def variant_table(results: Results) -> list[str]:
    """Other ranks, tables over pairs and 8-bit codes: loss, and in brackets against the form as it is by default."""
    found = {row: value for row, value in summaries(results).items() if row.lr is None and row.depth == 1}
    lines = ["| optimizer | form | boundaries | rank | pairs | bits | parameters | loss |", "|---" * 8 + "|"]
    for row, own in found.items():
        if row == row.plain:
            continue
        lines.append(
            f"| {row.optimizer} | {row.called} | {row.boundaries} | {row.table_rank} | {row.pairs} | {row.bits} "
            f"| {own.parameters / 1e6:.2f} M | {_beside(own, _above(own, found.get(row.plain)))} |"
        )
    return lines


def rate_table(results: Results) -> list[str]:
    """Sweeps of the rate: optimizers down, rates across."""
    found = {row: value for row, value in summaries(results).items() if row.lr is not None and row.depth == 1}
    rates = sorted({row.lr for row in found if row.lr is not None})
    lines = [f"| optimizer | form | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (2 + len(rates)) + "|"]
    for base in dict.fromkeys(replace(row, lr=None) for row in found):
        cells = [str(found.get(replace(base, lr=rate), "")) for rate in rates]
        lines.append(f"| {base.optimizer} | {base.called} | {' | '.join(cells)} |")
    return lines


def width_table(results: Results) -> list[str]:
    """Widths down, ratios of form t that several have across: loss, and in brackets what the boundary costs. Of one
    model, optimizer, number of boundaries and steps."""
    found = {row: value for row, value in summaries(results).items() if row.usual and row.form in ("none+", "t")}
    widths = Counter(row.ratio for row in found if row.form == "t")
    ratios = sorted(ratio for ratio, count in widths.items() if count > 1)
    lines = [f"| width | none+ | {' | '.join(f't {ratio}x' for ratio in ratios)} |", "|---" * (2 + len(ratios)) + "|"]
    for width in sorted({row.hidden for row in found}):
        rows = {row.ratio: row for row in found if row.hidden == width}
        lines.append(f"| {width} | {' | '.join(_cell(rows.get(ratio), found) for ratio in (1, *ratios))} |")
    return lines


@dataclass(frozen=True, slots=True, order=True)
class Scale:
    """What rows must share to be compared."""

    model: str
    data: str
    hidden: int

    @classmethod
    def of(cls, row: Row) -> Scale:
        return cls(row.model, row.data or "", row.hidden)

    def __str__(self) -> str:
        return f"{self.model}, width {self.hidden}" + (f", data {self.data}" if self.data else "")


def pages(results: Results) -> Iterator[tuple[str, list[str]]]:
    """Every table there is something for, with its title."""
    for scale in sorted({Scale.of(row) for row in results}):
        here = {row: curve for row, curve in results.items() if Scale.of(row) == scale}
        places = sorted({(r.steps, r.optimizer, r.boundaries) for r in here if r.usual and r.ratio > 1})
        for steps, optimizer, boundaries in places:
            title = f"{scale}: {optimizer}, {boundaries} boundaries, {steps} steps"
            yield title, boundary_table(here, boundaries=boundaries, optimizer=optimizer, steps=steps)
        if any(row.depth > 1 for row in here):
            yield f"{scale}: microbatches in flight", depth_table(here)
        if any(row != row.plain for row in here):
            yield f"{scale}: what t may be made of", variant_table(here)
        if any(row.lr is not None for row in here):
            yield f"{scale}: rates of learning", rate_table(here)
    yield from _widths(results)


def _widths(results: Results) -> Iterator[tuple[str, list[str]]]:
    """A table for whatever was trained at several widths with form t."""
    groups: dict[tuple[str, str, str, int, int], dict[Row, Curve]] = {}
    for row, curve in results.items():
        if row.usual:
            place = (row.model, row.data or "", row.optimizer, row.boundaries, row.steps)
            groups.setdefault(place, {})[row] = curve
    for (model, data, optimizer, boundaries, steps), here in sorted(groups.items(), key=lambda group: group[0]):
        if len({row.hidden for row in here if row.form == "t"}) > 1:
            name = model + (f", data {data}" if data else "")
            yield f"{name}: widths, {optimizer}, {boundaries} boundaries, {steps} steps", width_table(here)
