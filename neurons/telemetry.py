"""The event log: append-only JSON lines, one file per node, the only thing views and reports read.

Every event is a frozen dataclass; its `kind` is the class name in snake case. `Telemetry.emit` writes one line with
the time since the epoch from the clock handed in. Nobody parses log text. Each line says by which version of these
classes it was written: logs are cut, searched, and gone on with by a newer Orion. docs/events.md has them all.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from neurons.logfile import Lines, LogFile

log = logging.getLogger("orion.neurons.telemetry")

SCHEMA: Final = 1
"""Of the lines: goes up with every release that adds, changes or drops a kind of event or a field of one."""


@dataclass(frozen=True, slots=True)
class NodeStarted:
    """The process runs and its axon listens."""

    hotkey: str
    role: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class RoundStarted:
    """The roster of a round is known; `stage` is this node's, None for a validator or a miner that waits."""

    round: int
    block: int
    stage: int | None
    replicas: list[int]
    roster: str


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The roster has this miner in another state: waiting, joining, active, benched, out or left."""

    round: int
    state: str
    stage: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Downloading:
    """The public state of a stage is on its way: that with `held` rounds merged into it."""

    held: int
    stage: int
    bytes: int
    """That are here, with what an earlier try left on disk."""
    total: int
    rate: float
    """Bytes per second, of late."""


@dataclass(frozen=True, slots=True)
class Downloaded:
    """The public state of a stage is here and checked: that with `held` rounds merged into it."""

    held: int
    stage: int
    bytes: int
    seconds: float
    sources: int


@dataclass(frozen=True, slots=True)
class StageFitted:
    """A stage is about to be built: where, how much of open units' graphs it holds, and the bytes that this takes of
    those that are free."""

    stage: int
    device: str
    recompute: str
    graphs: int
    needed: int
    free: int


@dataclass(frozen=True, slots=True)
class SteppedDown:
    """The device had no memory left: from now on the stage holds less of open units, and computes more again."""

    stage: int
    device: str
    recompute: str
    graphs: int
    reason: str


@dataclass(frozen=True, slots=True)
class LocalStep:
    """One optimizer step of this replica."""

    round: int
    stage: int
    version: int
    units: int
    grad_norm: float
    lr: float
    finite: bool


@dataclass(frozen=True, slots=True)
class MicrobatchStarted:
    """A head sent a microbatch on its way."""

    round: int
    sample: int


@dataclass(frozen=True, slots=True)
class MicrobatchDone:
    """A microbatch came back to its head."""

    round: int
    sample: int
    loss: float
    seconds: float
    depth: int


@dataclass(frozen=True, slots=True)
class Quarantined:
    """What a neighbour sent was unlike what it and its siblings had sent, and was not computed with: its `count`-th in
    this round. Says where to look; proves nothing."""

    round: int
    stage: int
    hotkey: str
    direction: str
    sample: int
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class TrainingClosed:
    """Training of the round ended here. Heads count microbatches; every stage counts its own units."""

    round: int
    stage: int
    started: int
    completed: int
    rerouted: int
    adopted: int
    chased: int
    lost: int
    units: int
    busy_seconds: float


@dataclass(frozen=True, slots=True)
class WindowGivenUp:
    """The ring of `ring` bytes was full: from this window on, windows of the round were let go before a seed could pick
    them. One that is picked cannot be shown."""

    round: int
    version: int
    ring: int


@dataclass(frozen=True, slots=True)
class EvidenceLost:
    """A picked window, or without a version what the cut was taken from, could not be put on disk, so it cannot be
    shown."""

    round: int
    version: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class EvidenceHeld:
    """Bytes of host memory and of disk in which a miner answers for its rounds, at the cut of this one."""

    round: int
    bytes: int
    ring: int
    bytes_on_disk: int
    disk: int


@dataclass(frozen=True, slots=True)
class RecordPublished:
    """A record of this node is on chain; with it, `epoch_used` of `epoch_limit` bytes of the epoch are used."""

    phase: str
    round: int
    block: int
    bytes: int
    epoch_used: int
    epoch_limit: int


@dataclass(frozen=True, slots=True)
class Merged:
    """The round's merge ended; `weights` is the digest of the stage's public weights."""

    round: int
    stage: int
    sources: int
    included: bool
    void: bool
    weights: str
    seconds: float
    carried: int
    """Values that keep what they were, though the round counts."""
    received: int
    """Bytes fetched for it."""


@dataclass(frozen=True, slots=True)
class MergeFault:
    """What a merge found wrong with a replica: its payload is `refused`, its bytes `forged`, its digest a `liar`'s."""

    round: int
    stage: int
    hotkey: str
    fault: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShadowChecked:
    """A joiner computed units of a sibling again before it counts; `error` is the largest relative one."""

    stage: int
    sibling: str
    units: int
    passed: bool
    error: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes this node sent since it started, by kind of message."""

    forward: int
    backward: int
    merge: int
    evidence: int


@dataclass(frozen=True, slots=True)
class Checked:
    """A validator's finding on a miner (`subnet.trust.finding`), its own or from replaying one of another's report."""

    round: int
    hotkey: str
    stage: int
    check: str
    grade: str
    passed: bool
    error: float
    """-1 where nothing could be compared."""
    tolerance: float
    version: int | None
    sample: int | None
    piece: int | None
    reason: str
    accuser: str
    """Hotkey of the validator whose failed finding was replayed; empty for an own one."""


@dataclass(frozen=True, slots=True)
class Convicted:
    """A miner counts nothing in this validator's scores up to the round before `until`."""

    round: int
    hotkey: str
    until: int
    reason: str


@dataclass(frozen=True, slots=True)
class AuditBroken:
    """A fault of the validator's code, or of its line, ended its audit of one miner, which counts as not audited in the
    round."""

    round: int
    hotkey: str
    reason: str


@dataclass(frozen=True, slots=True)
class AuditCost:
    """What a validator's audit of one round took; `swarm_flops` is what the miners' units of the round have."""

    round: int
    units: int
    flops: float
    swarm_flops: float
    bytes: int


@dataclass(frozen=True, slots=True)
class ReportPublished:
    """A validator serves its report of a round, with so many failed findings in so many bytes."""

    round: int
    findings: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ReportRead:
    """A validator asked another for its report of a round."""

    round: int
    validator: str
    findings: int
    """Failed ones in it."""
    replayed: int
    """Units replayed because of it."""
    reproduced: int
    """Failures of these."""
    strays: int
    """Findings on units that the secret it revealed does not pick."""
    refused: str
    """Why it was not read; empty if it was."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A validator settled a round: complete pathways found, and miners whose evidence was served and sound."""

    round: int
    microbatches: int
    miners: int


@dataclass(frozen=True, slots=True)
class MinerScored:
    """A validator's score of one miner for one round, term by term (`subnet.trust.scoring`)."""

    round: int
    uid: int
    hotkey: str
    stage: int
    root: str
    """What its record fixed at block `cut`, hex; empty if nothing."""
    cut: int
    claimed: int
    """Units in its evidence."""
    units: int
    """Units that pay: `forward` and `backward`."""
    forward: int
    backward: int
    unpaid: dict[str, int]
    """The others by reason (`subnet.trust.settlement.Unpaid`)."""
    forward_flops: float
    """Of one microbatch at its stage."""
    flops: float
    correctness: float
    timeliness: float
    missed: list[str]
    """Marks it did not keep: root, evidence, bitmap."""
    scarcity: float
    score: float
    mean: float
    rounds: int
    """Over how many closed rounds the mean is."""
    share: float
    """Of all means."""
    burn: float
    """Share of the weight that nobody earns."""
    weight: float


@dataclass(frozen=True, slots=True)
class WeightsSet:
    """A validator's weights are on chain."""

    round: int
    block: int
    weights: dict[int, float]


@dataclass(frozen=True, slots=True)
class Validated:
    """Validation loss of the public weights at the start of a round, over the whole pipeline."""

    round: int
    loss: float
    tokens: int


@dataclass(frozen=True, slots=True)
class CheckpointWritten:
    """A stage's state after so many rounds lies in the store."""

    round: int
    stage: int
    path: str


@dataclass(frozen=True, slots=True)
class NodeFinished:
    """The node did all it had to do; nothing of it is left to wait for."""

    rounds: int


@dataclass(frozen=True, slots=True)
class ProcessHeld:
    """What the process holds as a round begins: bytes of resident memory, open descriptors, tasks of its event loop."""

    round: int
    bytes: int
    files: int
    tasks: int


@dataclass(frozen=True, slots=True)
class EventsLost:
    """So many events before this one could not be written."""

    count: int


@dataclass(frozen=True, slots=True)
class NodeFailed:
    """The node gave up; `message` is the one line a person reads."""

    message: str


@dataclass(frozen=True, slots=True)
class Intervention:
    """What `orion localnet` did to a node: kill, leave, freeze, thaw, fill and drain (its disk), steal (a kill, and
    somebody else has its port), join (first start), restart (start after a kill).

    Or to the whole run: resume, with no node. `fault` is the option that asked for it, empty for what follows from it.
    A node that was started to cheat says so itself: cheat, once it knows its place.
    """

    action: str
    node: str
    round: int
    fault: str


Event = (
    NodeStarted
    | RoundStarted
    | StateChanged
    | Downloading
    | Downloaded
    | StageFitted
    | SteppedDown
    | LocalStep
    | MicrobatchStarted
    | MicrobatchDone
    | Quarantined
    | TrainingClosed
    | WindowGivenUp
    | EvidenceLost
    | EvidenceHeld
    | RecordPublished
    | Merged
    | MergeFault
    | ShadowChecked
    | Traffic
    | Checked
    | Convicted
    | AuditBroken
    | AuditCost
    | ReportPublished
    | ReportRead
    | Settled
    | MinerScored
    | WeightsSet
    | Validated
    | CheckpointWritten
    | NodeFinished
    | ProcessHeld
    | EventsLost
    | NodeFailed
    | Intervention
)

EVENTS: dict[str, type[Event]] = {
    re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower(): kind for kind in Event.__args__
}
_KINDS = {kind: name for name, kind in EVENTS.items()}


class Telemetry:
    """Writes events of one node. `now` gives seconds since the epoch.

    A disk that is full costs events and nothing else: work goes on, and the first line that can be written again says
    how many are missing.
    """

    def __init__(self, stream: Lines, *, now: Callable[[], float]) -> None:
        self._stream = stream
        self._now = now
        self._lost = 0

    @classmethod
    def open(cls, path: Path, *, now: Callable[[], float]) -> Telemetry:
        """Go on at the end of `path`. A line that a killed process left unfinished is ended: readers skip it."""
        return cls(LogFile(path), now=now)

    def emit(self, event: Event) -> None:
        try:
            if self._lost:
                self._write(EventsLost(count=self._lost))
                self._lost = 0
            self._write(event)
        except OSError as error:
            if not self._lost:
                log.warning("events cannot be written (%s): make room under --out", error.strerror)
            self._lost += 1

    def _write(self, event: Event) -> None:
        line = {"t": round(self._now(), 4), "v": SCHEMA, "kind": _KINDS[type(event)], **asdict(event)}
        self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")

    def close(self) -> None:
        self._stream.close()


@dataclass(frozen=True, slots=True)
class Stamped:
    """An event as read back: when, and what."""

    time: float
    event: Event


def read_events(lines: Iterable[str]) -> Iterator[Stamped]:
    """Events from lines of a log, torn ones left out. Raises `ValueError` for a line of another version."""
    return (stamped for line in lines if (stamped := read_event(line)) is not None)


def read_log(path: Path) -> list[Stamped]:
    """All events in a file. Raises `OSError`, and `ValueError` as `read_events`."""
    return list(read_events(path.read_text().splitlines()))


def read_event(line: str) -> Stamped | None:
    """The event in one line; None for a torn one, of which a killed process wrote only a part.

    Raises `ValueError` for a whole line that is no event of this version.
    """
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    if not isinstance(fields, dict) or not {"t", "kind"} <= fields.keys():
        return None
    moment, schema, kind = fields.pop("t"), fields.pop("v", None), fields.pop("kind")
    if schema != SCHEMA:
        raise ValueError(
            f"the log has schema {schema!r}, this Orion reads {SCHEMA}: it was written by another version of Orion"
        )
    if kind not in EVENTS:
        raise ValueError(f"event kind {kind!r} is unknown: the log was written by another version of Orion")
    if kind == "weights_set":
        fields["weights"] = {int(uid): weight for uid, weight in fields["weights"].items()}
    try:
        return Stamped(moment, EVENTS[kind](**fields))
    except TypeError as error:
        raise ValueError(f"event {kind} has other fields: the log was written by another version of Orion") from error
