"""Results of a grid as pictures: what each boundary costs at which ratio, and loss against time on given links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.bench.learning.grid import GridError
from scripts.bench.learning.rows import Row
from scripts.bench.learning.tables import Results, Scale, Summary, summaries

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "t": "#1d4e89",
    "a": "#d1495b",
    "b": "#e98a15",
    "truncation": "#7a7a7a",
    "subspace": "#5a9e6f",
    "linear": "#8ecae6",
}
CONTROLS = {"none": ":", "none+": "-", "wide": "-.", "cut": "--"}
SAID = {
    "none": "uncompressed",
    "none+": "uncompressed, with token tables",
    "wide": "uncompressed, wider FFNs",
    "cut": "nothing crosses",
    "t": "t: tokens restored",
    "a": "a (ResBM)",
    "b": "b (ResBM)",
    "linear": "t without tables",
}
INK = "#333333"


def draw(results: Results, path: Path, *, scale: Scale, steps: int) -> None:
    """Loss over ratio, a panel for each optimizer and number of boundaries, as a PNG. Raises `GridError` if there is
    nothing to compare."""
    import matplotlib as mpl  # noqa: PLC0415 - heavy, and only for a picture
    from matplotlib.figure import Figure  # noqa: PLC0415

    found = {
        row: summary
        for row, summary in summaries(results).items()
        if row.usual and row.steps == steps and Scale.of(row) == scale
    }
    compared = Counter((row.optimizer, row.boundaries) for row in found if row.ratio > 1)
    places = [place for place, rows in compared.items() if rows > 1]
    if not places:
        raise GridError(f"no two boundaries of {scale}, and {steps} steps are there to compare: train more rows")
    places.sort(key=lambda place: (place[0] != "muon", place[1]))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2 * len(places) + 1.6, 4.6), dpi=90, layout="constrained")
        panels = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
        for axes, (optimizer, boundaries) in zip(panels, places, strict=True):
            here = {
                row: summary
                for row, summary in found.items()
                if row.optimizer == optimizer and (row.boundaries == boundaries or row.form == "none")
            }
            axes.set_title(f"{optimizer}, {boundaries} boundaries", loc="left", fontsize=11, color=INK)
            _panel(axes, here)
        panels[0].set_ylabel("validation loss, nats per token")
        handles = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
        figure.savefig(path)


def _panel(axes: Axes, found: Mapping[Row, Summary]) -> None:
    for form, style in CONTROLS.items():
        for row, summary in found.items():
            if row.form == form:
                axes.axhline(summary.mean, color=INK, linestyle=style, linewidth=1, label=SAID[form])
                axes.axhspan(
                    summary.mean - summary.spread, summary.mean + summary.spread, color=INK, alpha=0.08, linewidth=0
                )
    for form, colour in COLOURS.items():
        rows = sorted((row for row in found if row.form == form), key=lambda row: row.ratio)
        if rows:
            axes.errorbar(
                [row.ratio for row in rows],
                [found[row].mean for row in rows],
                yerr=[found[row].spread for row in rows],
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1.6,
                capsize=3,
                label=SAID.get(form, form),
            )
    ratios = sorted({row.ratio for row in found if row.ratio > 1})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"{ratio}x" for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel("bytes of a bf16 residual over bytes that cross")
