"""A run's figures against its yardstick: how much of the cards is used, what it costs, how far it is."""

from __future__ import annotations

from dataclasses import dataclass

from scripts.dashboard.facts import Facts
from scripts.dashboard.story import Story
from scripts.dashboard.yardstick import HOUR, Yardstick

FORMULA = "6N + 6LTd"
"""`model.accounting.FORMULA`, as short as a figure has room for."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What there is no ground for is None."""

    flops_per_second: float | None = None
    mfu: float | None = None
    formula: str = FORMULA
    miners: float | None = None
    miner_hours: float | None = None
    dollars: float | None = None
    dollars_per_million: float | None = None
    progress: float | None = None
    seconds_left: float | None = None


def measured(story: Story, facts: Facts | None, yardstick: Yardstick, flops_per_token: int | None) -> Measured:
    """Rates are over the time in which the run trained (`Tally.tokens_per_second`), merges and churn included."""
    tally, meter = story.tally, story.meter
    rate = tally.tokens_per_second if facts is not None else 0.0
    flops = rate * flops_per_token if rate and flops_per_token is not None else None
    progress, left = _progress(story, facts, yardstick, rate)
    if not _all_there(story):
        return Measured(flops_per_second=flops, progress=progress, seconds_left=left)
    miners = meter.trained * rate / tally.tokens if rate else None
    hours = meter.seconds / HOUR
    dollars = None if yardstick.price is None else hours * yardstick.price
    return Measured(
        flops_per_second=flops,
        mfu=flops / (miners * yardstick.card.peak) if flops and miners and yardstick.card is not None else None,
        miners=miners,
        miner_hours=hours,
        dollars=dollars,
        dollars_per_million=None
        if dollars is None or facts is None or not tally.tokens
        else dollars / tally.tokens * 1e6,
        progress=progress,
        seconds_left=left,
    )


def _all_there(story: Story) -> bool:
    """Whether the folder has the logs of as many miners as the newest round began with: else sums are of a part."""
    newest = max(story.beginnings, default=None)
    seen = sum(role == "miner" for role in story.roles.values())
    return newest is not None and seen >= sum(story.beginnings[newest].replicas)


def _progress(
    story: Story, facts: Facts | None, yardstick: Yardstick, rate: float
) -> tuple[float | None, float | None]:
    """(share done, seconds left): of the target in tokens, or of the manifest's rounds at the mean length so far."""
    tally = story.tally
    if facts is None:
        return None, None
    if yardstick.target is not None:
        left = max(0, yardstick.target - tally.tokens)
        going = rate and not (left and tally.over)
        return min(1.0, tally.tokens / yardstick.target), left / rate if going else None
    count = facts.round.count
    if tally.over:
        return min(1.0, len({number for number, _ in story.merges}) / count), 0.0
    begun = sorted(number for number in story.beginnings if number <= count)
    if len(begun) < 2 or tally.last_event is None:
        return (begun[-1] / count if begun else 0.0), None
    first, last = begun[0], begun[-1]
    began = story.beginnings[last].time
    length = (began - story.beginnings[first].time) / (last - first)
    done = last + min(1.0, (tally.last_event - began) / length)
    return min(1.0, done / count), max(0.0, (count - done) * length)
