"""The timeline picture: stages x time, the whole simulation above and a close-up of single units below."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.simulate.swarm import Result
from scripts.simulate.timeline import Recorder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORWARD, BACKWARD, GONE, MERGE, INK = "#8ecae6", "#1d4e89", "#d1495b", "#f2c14e", "#333333"
CURVE_SLICES = 60


class PictureError(Exception):
    """It cannot be drawn: one line with the reason and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """What the picture says in words."""

    title: str
    subtitle: str
    tokens: int
    """Of a microbatch."""
    expected: float
    """Tokens per second that the closed form says."""
    merges: tuple[tuple[float, float], ...]
    """When merges ran, seconds."""


def draw(recorder: Recorder, result: Result, caption: Caption, path: Path) -> None:
    """Write the PNG. Raises `PictureError`."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - heavy, and only for a picture
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise PictureError("--picture needs matplotlib: pip install 'orion-subnet[pictures]'") from None
    with mpl.rc_context({"font.size": 9, "hatch.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False}):
        rows = recorder.rows
        overview = min(5.5, max(2.2, 0.115 * rows))
        close_up = min(5.5, max(2.0, 0.115 * rows))
        heights = [1.3, overview, close_up]
        figure = Figure(figsize=(12, sum(heights) + 2.4), dpi=75, layout="constrained")
        figure.suptitle(caption.title, fontsize=14, fontweight="bold", x=0.01, ha="left")
        axes = figure.subplots(3, 1, height_ratios=heights)
        _curve(axes[0], recorder, result, caption)
        _overview(axes[1], recorder, result, caption)
        _close_up(axes[2], recorder)
        try:
            figure.savefig(path)
        except OSError as error:
            raise PictureError(f"--picture {path} cannot be written ({error.strerror}): give another path") from error


def _curve(axes: Axes, recorder: Recorder, result: Result, caption: Caption) -> None:
    """Tokens per second over time."""
    counts, edges = np.histogram(result.completed, bins=CURVE_SLICES, range=(0, recorder.seconds))
    rates = counts * caption.tokens / (recorder.seconds / CURVE_SLICES)
    axes.set_title(caption.subtitle, loc="left", fontsize=10, color=INK, pad=10)
    axes.stairs(rates, edges / 60, color=BACKWARD, fill=True, alpha=0.3)
    axes.stairs(rates, edges / 60, color=BACKWARD, linewidth=1.2)
    axes.axhline(caption.expected, color=INK, linestyle="--", linewidth=1)
    axes.annotate(
        f"closed form\n{caption.expected:,.0f}",
        (1, caption.expected),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        ha="left",
        va="center",
        color=INK,
        annotation_clip=False,
    )
    axes.set_ylabel("tokens/s")
    axes.set_ylim(0, 1.25 * max(caption.expected, float(rates.max(initial=0.0))))
    axes.set_xlim(0, recorder.seconds / 60)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(labelbottom=False)


def _overview(axes: Axes, recorder: Recorder, result: Result, caption: Caption) -> None:
    """How busy every row is, who is gone, and when merges run."""
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415
    from matplotlib.patches import Patch, Rectangle  # noqa: PLC0415

    minutes, rows = recorder.seconds / 60, recorder.rows
    shades = LinearSegmentedColormap.from_list("busy", ["#ffffff", FORWARD, BACKWARD])
    image = axes.imshow(
        np.clip(recorder.busy, 0, 1),
        aspect="auto",
        interpolation="nearest",
        cmap=shades,
        vmin=0,
        vmax=1,
        extent=(0, minutes, rows, 0),
    )
    if not recorder.by_stage:
        for vacancy in recorder.vacancies:
            corner, width = (vacancy.start / 60, vacancy.row), (vacancy.end - vacancy.start) / 60
            axes.add_patch(
                Rectangle(corner, width, 1, facecolor="white", edgecolor=GONE, hatch="//////", linewidth=0.8)
            )
        for stage in range(1, recorder.stages):
            axes.axhline(stage * recorder.replicas, color="white", linewidth=1.6)
    struck = [
        (failure.at / 60, failure.stage if recorder.by_stage else failure.stage * recorder.replicas + failure.place)
        for failure in result.failures
    ]
    for minute, row in struck:
        axes.plot(minute, row + 0.5, marker="X", color=GONE, markeredgecolor="white", markersize=9, clip_on=False)
    strip = 0.035 * rows
    for start, end in caption.merges:
        box = Rectangle((start / 60, -1.6 * strip), (end - start) / 60, strip, clip_on=False)
        box.set(facecolor=MERGE, edgecolor=INK, hatch="....", linewidth=0.5)
        axes.add_patch(box)
    each = 1 if recorder.by_stage else recorder.replicas
    step = max(1, recorder.stages // 16)
    shown = range(0, recorder.stages, step)
    axes.set_yticks([(stage + 0.5) * each for stage in shown], [f"stage {stage}" for stage in shown])
    axes.set_xlim(0, minutes)
    axes.set_ylim(rows, -2 * strip)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("minutes")
    rows_are = "a row is a stage" if recorder.by_stage else "a row is a replica"
    handles: list[Patch] = []
    if struck:
        handles.append(Patch(facecolor="white", edgecolor=GONE, hatch="//////", label="nobody there (X: it died)"))
    if caption.merges:
        handles.append(Patch(facecolor=MERGE, edgecolor=INK, hatch="....", label="merge of the round before"))
    if handles:
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, frameon=False)
    axes.set_title(f"the whole time, {rows_are}", loc="left", fontsize=10)
    bar = axes.inset_axes((1.015, 0.15, 0.012, 0.7))
    axes.figure.colorbar(image, cax=bar, format="{x:.0%}")
    bar.set_title("at work", fontsize=9, loc="left")


def _close_up(axes: Axes, recorder: Recorder) -> None:
    """Every unit of a short while."""
    from matplotlib.patches import Patch  # noqa: PLC0415

    start, end = recorder.close_up
    for backward, colour, hatch in ((False, FORWARD, ""), (True, BACKWARD, "\\\\\\")):
        for row in range(recorder.rows):
            spans = [
                (max(unit.start, start), min(unit.end, end) - max(unit.start, start))
                for unit in recorder.units
                if unit.row == row and unit.backward is backward
            ]
            axes.broken_barh(spans, (row + 0.08, 0.84), facecolor=colour, edgecolor="white", hatch=hatch, linewidth=0.5)
    for vacancy in recorder.vacancies:
        inside = max(vacancy.start, start), min(vacancy.end, end)
        if inside[1] > inside[0] and not recorder.by_stage:
            axes.broken_barh(
                [(inside[0], inside[1] - inside[0])],
                (vacancy.row, 1),
                facecolor="white",
                edgecolor=GONE,
                hatch="//////",
                linewidth=0.8,
            )
    each = 1 if recorder.by_stage else recorder.replicas
    for stage in range(1, recorder.stages):
        axes.axhline(stage * each, color="#cccccc", linewidth=0.6, zorder=0)
    shown = range(0, recorder.stages, max(1, recorder.stages // 16))
    axes.set_yticks([(stage + 0.5) * each for stage in shown], [f"stage {stage}" for stage in shown])
    axes.set_xlim(start, end)
    axes.set_ylim(recorder.rows, 0)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds")
    whose = ", one replica of each stage" if recorder.by_stage else ""
    axes.set_title(f"close-up of {end - start:.0f} s{whose}", loc="left", fontsize=10)
    handles = [
        Patch(facecolor=FORWARD, edgecolor="white", label="forward (plain)"),
        Patch(facecolor=BACKWARD, edgecolor="white", hatch="\\\\\\", label="backward (hatched)"),
        Patch(facecolor="white", edgecolor="#bbbbbb", label="idle"),
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1.0), ncols=3, frameon=False)
