"""What happened, one line each, for a person who reads the log of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from neurons.telemetry import (
    AuditBroken,
    Checked,
    Convicted,
    Downloaded,
    Event,
    EvidenceLost,
    Intervention,
    LocalStep,
    Merged,
    MergeFault,
    MicrobatchDone,
    MicrobatchStarted,
    NodeFailed,
    NodeFinished,
    NodeStarted,
    Quarantined,
    ReportRead,
    RoundStarted,
    ShadowChecked,
    Stamped,
    StateChanged,
    Validated,
    WeightsSet,
    WindowGivenUp,
)

Topic = Literal["churn", "trust", "training", "chain"]
Weight = Literal["info", "warning", "alarm"]
Called = Callable[[str], str]
"""The node name of a hotkey."""

_STRUCK: dict[str, tuple[Weight, str]] = {
    "kill": ("warning", "was killed"),
    "leave": ("info", "was asked to leave"),
    "freeze": ("warning", "was frozen"),
    "thaw": ("info", "goes on after a freeze"),
    "join": ("info", "is started to join"),
    "restart": ("info", "is started again"),
}
"""What an intervention does to a node."""
_MARKED: dict[str, Weight] = {"benched": "warning", "out": "warning"}
"""States that somebody should look at."""


_COMMON = frozenset({LocalStep, MicrobatchStarted, MicrobatchDone, Checked})
"""Nine of ten events, and none that is said."""


@dataclass(frozen=True, slots=True)
class Note:
    """One line of the log."""

    time: float
    """Seconds since the epoch."""
    topic: Topic
    weight: Weight
    node: str
    """Whose event log says so; empty for the whole run."""
    text: str


def note(name: str, stamped: Stamped, called: Called) -> Note | None:
    """What the log says of an event of the node `name`; None for one that is too common to be said."""
    event = stamped.event
    if type(event) in _COMMON:
        return None
    topic: Topic
    for topic, said in (
        ("churn", _churn(event, called)),
        ("training", _training(event)),
        ("trust", _trust(event, called)),
        ("chain", _chain(event)),
    ):
        if said is not None:
            weight, text = said
            return Note(stamped.time, topic, weight, event.node if isinstance(event, Intervention) else name, text)
    return None


def _churn(event: Event, called: Called) -> tuple[Weight, str] | None:  # noqa: PLR0911 - one case per kind of event
    match event:
        case NodeStarted(role=role):
            return "info", f"{role} is up"
        case StateChanged() as change:
            where = "" if change.stage is None else f" at stage {change.stage}"
            reason = f": {change.reason}" if change.reason else ""
            return _MARKED.get(change.state, "info"), f"{change.state}{where} from round {change.round}{reason}"
        case Downloaded() as load:
            size = f"{load.bytes / 1e6:,.1f} MB from {load.sources} source(s) in {load.seconds:.1f} s"
            return "info", f"has stage {load.stage} with {load.held} rounds in it: {size}"
        case ShadowChecked() as shadow:
            again = f"computed {shadow.units} units of {called(shadow.sibling)} again"
            if shadow.passed:
                return "info", f"{again}: they agree"
            return "alarm", f"{again}: they differ by {shadow.error:g}"
        case NodeFinished(rounds=rounds):
            return "info", f"is done after {rounds} rounds"
        case NodeFailed(message=message):
            return "alarm", f"gave up: {message}"
        case Intervention(action="resume", round=number):
            return "info", f"the run goes on in round {number}"
        case Intervention() as struck if struck.action in _STRUCK:
            weight, verb = _STRUCK[struck.action]
            return weight, f"{verb} in round {struck.round}{f' ({struck.fault})' if struck.fault else ''}"
        case _:
            return None


def _training(event: Event) -> tuple[Weight, str] | None:
    match event:
        case RoundStarted(stage=None) as start:
            replicas = " ".join(map(str, start.replicas))
            return "info", f"round {start.round} begins at block {start.block}: replicas per stage {replicas}"
        case Validated(round=number, loss=loss):
            return "info", f"validation loss {loss:.4f} at the start of round {number}"
        case Merged(void=True) as void:
            return "warning", f"round {void.round} is void at stage {void.stage}: contributions carry over"
        case Merged(included=False) as merge:
            return "warning", f"is not in the merge of round {merge.round}: its contribution carries over"
        case _:
            return None


def _trust(event: Event, called: Called) -> tuple[Weight, str] | None:  # noqa: PLR0911 - one case per kind of event
    match event:
        case MergeFault() as fault:
            return "alarm", f"finds {called(fault.hotkey)} {fault.fault} in merge {fault.round}: {fault.reason}"
        case Quarantined() as held:
            return "warning", f"sets aside sample {held.sample} from {called(held.hotkey)}: {held.reason}"
        case Convicted() as verdict:
            span = f"in round {verdict.round} until round {verdict.until}"
            return "alarm", f"convicts {called(verdict.hotkey)} {span}: {verdict.reason}"
        case AuditBroken() as broken:
            return "alarm", f"audit of {called(broken.hotkey)} in round {broken.round} broke off: {broken.reason}"
        case ReportRead(refused=refused) as read if refused:
            return "warning", f"report of {called(read.validator)} for round {read.round} not read: {refused}"
        case EvidenceLost() as lost:
            return "warning", f"cannot show evidence of round {lost.round}: {lost.reason}"
        case WindowGivenUp() as window:
            span = f"windows of round {window.round} from {window.version} on"
            return "warning", f"let go of {span}: its ring of {window.ring:,} bytes is full"
        case Intervention(action="cheat") as cheat:
            return "warning", f"cheats from round {cheat.round} on, as asked ({cheat.fault})"
        case _:
            return None


def _chain(event: Event) -> tuple[Weight, str] | None:
    match event:
        case WeightsSet(round=number, block=block, weights=weights):
            return "info", f"set weights for round {number} at block {block}: {len(weights)} miners"
        case _:
            return None
