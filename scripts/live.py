"""What a person watches while a swarm runs: one table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from neurons.telemetry import Downloading
from scripts.tally import MinerTally, Tally
from subnet.quantities import duration, size

_COLOURS = {
    "starting": "dim",
    "waiting": "yellow",
    "joining": "magenta",
    "active": "green",
    "training": "green",
    "merging": "cyan",
    "merged": "blue",
    "benched": "dark_orange",
    "out": "dim",
    "left": "dim",
    "frozen": "bright_blue",
    "dead": "red",
}
AWAY = frozenset({"waiting", "benched", "out", "left"})
"""States of miners that hold no stage, or hold it no more."""
NEWS_LINES = 8
LINE_SECONDS = 5.0


def grid(tally: Tally, stages: int) -> Table:
    """Stages across, as many as there are at least, replicas down; a cell is a miner's state, steps and units."""
    held = [miner.stage + 1 for miner in tally.miners.values() if miner.stage is not None]
    stages = max([stages, *held])
    table = Table(title=None, expand=False, pad_edge=False)
    columns: list[list[MinerTally]] = [[] for _ in range(stages)]
    for miner in sorted(tally.miners.values(), key=lambda miner: miner.name):
        if miner.stage is not None and miner.state not in AWAY:
            columns[miner.stage].append(miner)
    for stage in range(stages):
        role = "head" if stage == 0 else "tail" if stage == stages - 1 else "body"
        table.add_column(f"stage {stage} ({role})", justify="left", min_width=18)
    for row in range(max((len(column) for column in columns), default=0)):
        table.add_row(*(_cell(column[row]) if row < len(column) else Text("") for column in columns))
    return table


def _cell(miner: MinerTally) -> Text:
    text = Text(miner.name, style="bold")
    text.append(f" {miner.state}", style=_COLOURS.get(miner.state, ""))
    if miner.fetching is None:
        text.append(f"\n{miner.steps} steps  {miner.units} units", style="dim")
    else:
        text.append(f"\n{fetched(miner.fetching)}", style="dim")
    return text


def fetched(load: Downloading) -> str:
    """How far a stage's state is."""
    left = f", {duration((load.total - load.bytes) / load.rate)} left" if load.rate else ""
    return f"{load.bytes / load.total:.0%} of {size(load.total)}, {size(load.rate)}/s{left}"


def away(tally: Tally) -> Text:
    """Miners that stand in no stage: name and state; empty if there are none."""
    text = Text()
    for miner in sorted(tally.miners.values(), key=lambda miner: miner.name):
        if miner.state in AWAY or (miner.stage is None and miner.state != "starting"):
            text.append(f"{miner.name} ", style="bold")
            text.append(f"{miner.state}  ", style=_COLOURS.get(miner.state, ""))
    return text


def facts(tally: Tally) -> Table:
    """The numbers under the grid."""
    table = Table.grid(padding=(0, 3))
    traffic = [miner.traffic for miner in tally.miners.values()]
    moved = sum(item.forward + item.backward + item.merge for item in traffic)
    table.add_row("loss", f"{tally.recent_loss:.3f}", "tokens", f"{tally.tokens:,}")
    last = max(tally.validation, default=None)
    validation = "-" if last is None else f"{tally.validation[last]:.3f} (round {last})"
    table.add_row("validation", validation, "tokens/s", f"{tally.tokens_per_second:,.0f}")
    table.add_row(
        "audits", f"{tally.audits_passed} passed, {tally.audits_failed} failed", "bytes moved", f"{moved / 1e6:,.1f} MB"
    )
    table.add_row("microbatches", f"{tally.completed} done, {tally.lost} lost", "weights set", str(tally.weights_set))
    churn = tally.churn
    table.add_row(
        "churn",
        f"{churn.joined} joined, {churn.left} left, {churn.benched} benched",
        "ended",
        f"{churn.killed} killed, {churn.restarted} started again, {tally.gradients_lost} gradients lost",
    )
    return table


def weights(tally: Tally) -> Table:
    """Last weights by validator."""
    table = Table(title=None, pad_edge=False)
    table.add_column("weights by uid")
    uids = sorted({uid for shares in tally.weights.values() for uid in shares})
    for uid in uids:
        table.add_column(str(uid), justify="right")
    for name in sorted(tally.weights):
        table.add_row(name, *(f"{tally.weights[name].get(uid, 0):.3f}" for uid in uids))
    return table


class View:
    """Shows the tally; `show` is called a few times a second."""

    def __init__(self, console: Console, *, title: str, stages: int, plain: bool) -> None:
        self._console = console
        self._title = title
        self._stages = stages
        self._plain = plain or not console.is_terminal
        self._news: list[str] = []
        self._live = None if self._plain else Live(console=console, refresh_per_second=4, transient=False)
        self._last_line = 0.0

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """One line of news."""
        self._news.append(line)
        if self._live is None:
            self._console.print(line, highlight=False)

    def show(self, tally: Tally, *, elapsed: float) -> None:
        """Bring the view up to date; `elapsed` is seconds since the start."""
        for line in tally.news:
            self.say(f"{elapsed:6.1f} s  {line}")
        tally.news.clear()
        if self._live is not None:
            self._live.update(self._panel(tally, elapsed))
            return
        loads = {miner.name: miner.fetching for miner in tally.miners.values() if miner.fetching is not None}
        if elapsed - self._last_line < LINE_SECONDS or not (tally.completed or loads):
            return
        self._last_line = elapsed
        for name, load in loads.items():
            self._console.print(f"{elapsed:6.1f} s  {name} fetches its state: {fetched(load)}", highlight=False)
        if tally.completed:
            self._console.print(
                f"{elapsed:6.1f} s  round {tally.round}  loss {tally.recent_loss:.3f}  "
                f"{tally.tokens:,} tokens  {tally.tokens_per_second:,.0f} tokens/s  {tally.lost} lost",
                highlight=False,
            )

    def _panel(self, tally: Tally, elapsed: float) -> RenderableType:
        parts: Sequence[RenderableType] = [grid(tally, self._stages), away(tally), facts(tally)]
        if tally.weights:
            parts = [*parts, weights(tally)]
        news = Text("\n".join(self._news[-NEWS_LINES:]), style="dim")
        return Panel(
            Group(*parts, Columns([news])),
            title=f"{self._title} · round {max(tally.round, 0)} · {elapsed:.0f} s",
            expand=False,
        )
