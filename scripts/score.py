"""`orion score explain`: where a miner's weight comes from, term by term, with the evidence behind each.

Read from the event logs of a run's validators. Everything printed can be recomputed: units and receipts from the tables
under the root named, the rest from the manifest and the chain.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from neurons.telemetry import AuditBroken, Checked, Convicted, Event, MinerScored, NodeStarted, WeightsSet, read_event

WIDTH = 96
TERM = 13
"""Columns of a term's name."""


class ScoreError(Exception):
    """There is nothing to explain: one line with the remedy."""


@dataclass
class RoundExplained:
    """One validator's judgement of one miner in one round."""

    scored: MinerScored
    source: str
    """Where that stands: file and line of its event."""
    checks: list[Checked] = field(default_factory=list)
    convicted: Convicted | None = None
    weights: WeightsSet | None = None
    """The weights it set after this round."""
    on_chain: str = ""
    """What to say instead, where several validators' weights were read from the chain."""
    reported: bool = False
    """Whether the checks are what tables show and validators report to have failed: then what passed is not known."""
    broken: str = ""
    """What ended the audit early, a fault of the validator's; empty if nothing did."""


@dataclass
class Explained:
    """What one validator says of one miner, by round."""

    validator: str
    """Name of the node, or its hotkey."""
    hotkey: str
    """The validator's, empty if its log does not say."""
    rounds: list[RoundExplained]


def explain_score(*, uid: int, run: Path, number: int | None) -> int:
    """Print it; 0 done, 1 refused."""
    try:
        explained = read_run(run, uid, number)
    except ScoreError as error:
        print(f"orion score explain: {error}", file=sys.stderr)
        return 1
    print("\n".join(text(uid, explained)))
    return 0


# -- from event logs --------------------------------------------------------------------------------------------------


def read_run(run: Path, uid: int, number: int | None) -> list[Explained]:
    """What every validator of a run's folder says of the miner. Raises `ScoreError`."""
    logs = sorted((run / "events").glob("*.jsonl"))
    if not logs:
        raise ScoreError(f"{run} has no events/*.jsonl: give the folder of a run")
    known: set[int] = set()
    found = []
    for log in logs:
        explained = _read_log(log, uid, known)
        explained.rounds = [entry for entry in explained.rounds if number in (None, entry.scored.round)]
        if explained.rounds:
            found.append(explained)
    if not found:
        when = "" if number is None else f" in round {number}"
        uids = ", ".join(map(str, sorted(known))) or "nobody yet: wait for the end of a round"
        raise ScoreError(f"no validator in {run} has scored uid {uid}{when}; scored: {uids}")
    return found


def _read_log(path: Path, uid: int, known: set[int]) -> Explained:
    told = Told(path.stem)
    for line_number, event in _events(path):
        told.take(event, f"events/{path.name}:{line_number}", uid, known)
    return told.explained()


def _events(path: Path) -> Iterator[tuple[int, Event]]:
    """With their lines. Raises `ScoreError`."""
    with path.open(encoding="utf-8") as lines:
        for line_number, line in enumerate(lines, start=1):
            try:
                stamped = read_event(line)
            except ValueError as error:
                raise ScoreError(f"{path}:{line_number}: {error}") from error
            if stamped is not None:
                yield line_number, stamped.event


@dataclass
class Told:
    """What one log has said so far."""

    name: str
    hotkey: str = ""
    rounds: list[RoundExplained] = field(default_factory=list)
    checks: list[Checked] = field(default_factory=list)
    convictions: list[Convicted] = field(default_factory=list)
    broken: dict[tuple[str, int], str] = field(default_factory=dict)
    weights: dict[int, WeightsSet] = field(default_factory=dict)

    def take(self, event: Event, source: str, uid: int, known: set[int]) -> None:
        """Take in the next event; uids that are scored go to `known`."""
        match event:
            case NodeStarted(hotkey=hotkey):
                self.hotkey = hotkey
            case Checked():
                self.checks.append(event)
            case Convicted():
                self.convictions.append(event)
            case AuditBroken():
                self.broken[event.hotkey, event.round] = event.reason
            case WeightsSet():
                self.weights[event.round] = event
            case MinerScored():
                known.add(event.uid)
                if event.uid == uid:
                    self.rounds.append(RoundExplained(event, source))
            case _:
                pass

    def explained(self) -> Explained:
        """The miner's rounds, with what else was said of them."""
        for entry in self.rounds:
            hotkey, number = entry.scored.hotkey, entry.scored.round
            entry.checks = [check for check in self.checks if (check.hotkey, check.round) == (hotkey, number)]
            entry.broken = self.broken.get((hotkey, number), "")
            entry.convicted = next(
                (one for one in self.convictions if one.hotkey == hotkey and one.round <= number < one.until), None
            )
            entry.weights = self.weights.get(number)
        return Explained(self.name, self.hotkey, self.rounds)


# -- as text ----------------------------------------------------------------------------------------------------------


def text(uid: int, explained: Iterable[Explained]) -> Iterator[str]:
    """Lines of at most `WIDTH` columns."""
    for index, validator in enumerate(explained):
        newest = validator.rounds[-1].scored
        if index == 0:
            yield f"uid {uid}, hotkey {newest.hotkey}"
            yield "score = FLOPs of paid units x correctness x timeliness x scarcity"
            yield "weight = share of all miners' mean scores over the last closed rounds x (1 - burn)"
        yield ""
        yield f"{validator.validator} {validator.hotkey}".rstrip()
        for entry in validator.rounds:
            yield f"  round {entry.scored.round}, stage {entry.scored.stage}"
            if entry.scored.hotkey != newest.hotkey:
                yield from _term("hotkey", entry.scored.hotkey)
            for name, words in _terms(entry):
                yield from _term(name, words)


def _term(name: str, words: str) -> Iterator[str]:
    yield from textwrap.wrap(
        words,
        WIDTH,
        initial_indent=f"    {name:<{TERM}}",
        subsequent_indent=" " * (4 + TERM),
        break_on_hyphens=False,
    )


def _terms(entry: RoundExplained) -> Iterator[tuple[str, str]]:
    scored = entry.scored
    yield "evidence", _evidence(scored)
    yield "paid", f"{scored.units} of {scored.claimed} units: {scored.forward} forward, {scored.backward} backward"
    if scored.unpaid:
        yield "not paid", ", ".join(f"{count} {reason}" for reason, count in scored.unpaid.items())
    yield "FLOPs", f"{scored.flops:.4g} = ({scored.forward} + 2 x {scored.backward}) x {scored.forward_flops:.4g}"
    yield "correctness", f"{scored.correctness:g}; {_audited(entry)}"
    for check in entry.checks:
        if not check.passed:
            yield "finding", _finding(check, reported=entry.reported)
    if entry.convicted is not None:
        one = entry.convicted
        yield "convicted", f"in round {one.round}, counts nothing before round {one.until}: {one.reason}"
    missed = f"; missed: {', '.join(scored.missed)}" if scored.missed else "; root, evidence and bitmap in time"
    yield "timeliness", f"{scored.timeliness:.3g}{missed}"
    yield "scarcity", f"{scored.scarcity:.4g}"
    yield "score", f"{scored.score:.4g}"
    yield "mean", f"{scored.mean:.4g} over {scored.rounds} round{'s' * (scored.rounds != 1)}"
    yield "share", f"{scored.share:.6f}"
    yield "burn", f"{scored.burn:g}"
    yield "weight", f"{scored.weight:.6f}; {entry.on_chain or _on_chain(scored.uid, entry.weights)}"
    yield "event", entry.source


def _evidence(scored: MinerScored) -> str:
    if not scored.root:
        return f"no root on chain at block {scored.cut}"
    served = "not served" if "evidence" in scored.missed else f"{scored.claimed} units"
    return f"root {scored.root[:16]} on chain at block {scored.cut}; {served}"


def _audited(entry: RoundExplained) -> str:
    """How many checks there were, and which of those that compare came nearest to its tolerance."""
    checks = entry.checks
    if entry.reported:
        failures = f"{len(checks)} failure{'s' * (len(checks) != 1)}"
        return f"{failures} reported or shown by tables" if checks else "no failure reported"
    if entry.broken:
        return f"not audited, the audit broke off: {entry.broken}"
    if not checks:
        return "not audited"
    own = sum(not check.accuser for check in checks)
    words = f"{own} checks, {sum(check.passed for check in checks if not check.accuser)} passed"
    if own < len(checks):
        words += f", {len(checks) - own} of another's report replayed"
    compared = [check for check in checks if check.tolerance > 0 and check.error >= 0]
    if compared:
        worst = max(compared, key=lambda check: check.error / check.tolerance)
        words += f"; largest error {worst.error:.3g}, tolerance {worst.tolerance:.3g} ({_where(worst)})"
    return words


def _where(check: Checked) -> str:
    places = (("sample", check.sample), ("window", check.version), ("piece", check.piece))
    return ", ".join([check.check, *(f"{name} {value}" for name, value in places if value is not None)])


def _finding(check: Checked, *, reported: bool) -> str:
    words = f"{check.grade}: {_where(check)}"
    if check.tolerance > 0 and check.error >= 0:
        words += f": error {check.error:.3g}, tolerance {check.tolerance:.3g}"
    if check.reason:
        words += f": {check.reason}"
    if not check.accuser:
        return words
    return f"{words}; {f'reported by {check.accuser}' if reported else f'adopted from {check.accuser}, reproduced'}"


def _on_chain(uid: int, weights: WeightsSet | None) -> str:
    if weights is None:
        return "not set on chain after this round"
    return f"{weights.weights.get(uid, 0.0):.6f} on chain at block {weights.block}"
