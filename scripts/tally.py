"""A swarm's story so far, folded from the event logs of its nodes: what the live view shows and the summary says.

The fold takes events in the order of their times, but holds with any order between nodes. A microbatch is one sample
of one round, however often it was started or came back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import merge
from pathlib import Path

from neurons.telemetry import (
    AuditCost,
    Checked,
    Convicted,
    Downloaded,
    Downloading,
    Intervention,
    LocalStep,
    Merged,
    MergeFault,
    MicrobatchDone,
    MicrobatchStarted,
    MinerScored,
    NodeFailed,
    NodeFinished,
    NodeStarted,
    RecordPublished,
    RoundStarted,
    Stamped,
    StateChanged,
    Traffic,
    TrainingClosed,
    Validated,
    WeightsSet,
    read_event,
)
from scripts.recovery import Recovery
from subnet.trust.finding import UNIT_CHECKS

RECENT = 20
NO_TRAFFIC = Traffic(0, 0, 0, 0)
NO_RECORD = RecordPublished(phase="", round=0, block=0, bytes=0, epoch_used=0, epoch_limit=0)
GONE = frozenset({"dead", "left"})
"""States of a miner that does nothing any more."""
AT_WORK = frozenset({"training", "merging", "merged"})
Sample = tuple[int, int]
"""Round and sample id: one microbatch."""


@dataclass(frozen=True, slots=True)
class Span:
    """When something of a round went on, in seconds since the epoch."""

    round: int
    begin: float
    end: float


@dataclass
class MinerTally:
    """One miner as its own log tells it."""

    name: str
    hotkey: str = ""
    stage: int | None = None
    units: int = 0
    steps: int = 0
    unmerged: dict[int, int] = field(default_factory=dict)
    """Units in steps whose gradients no merge has taken yet, by round."""
    state: str = "starting"
    weights: str = ""
    """Digest of the public weights after its last merge."""
    starts: int = 0
    traffic_before: Traffic = NO_TRAFFIC
    """Of the processes before the one that runs now."""
    traffic_now: Traffic = NO_TRAFFIC
    training: list[Span] = field(default_factory=list)
    merging: list[Span] = field(default_factory=list)
    merge_bytes: int = 0
    """Fetched for its merges."""
    carried: int = 0
    """Values that kept what they were in merges of rounds that counted."""
    began: dict[int, float] = field(default_factory=dict)
    """When its training of a round that has not closed began."""
    downloads: list[Downloaded] = field(default_factory=list)
    fetching: Downloading | None = None
    """How far the state is that it fetches now."""
    joining: bool = False
    """Whether it has to become active yet."""
    was_active: bool = False
    active_round: int | None = None
    """The first round it counted in as one that joined; None for those of the first roster."""
    endpoint: str = ""

    @property
    def traffic(self) -> Traffic:
        """Bytes sent by all its processes."""
        return _sum(self.traffic_before, self.traffic_now)


def _sum(a: Traffic, b: Traffic) -> Traffic:
    return Traffic(a.forward + b.forward, a.backward + b.backward, a.merge + b.merge, a.evidence + b.evidence)


@dataclass
class RoundTally:
    """The microbatches of one round."""

    started: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    loss: float = 0.0
    """Sum over `done`, nats per token."""
    closed: bool = False
    """Whether it has closed at a head."""

    @property
    def in_flight(self) -> set[int]:
        return self.started - self.done


@dataclass(frozen=True, slots=True)
class Conviction:
    """One validator counts nothing for a miner from `round` up to the round before `until`."""

    validator: str
    """Name of its node."""
    round: int
    hotkey: str
    until: int
    reason: str


@dataclass
class Churn:
    """How often the swarm changed."""

    killed: int = 0
    frozen: int = 0
    joined: int = 0
    left: int = 0
    benched: int = 0
    restarted: int = 0
    resumed: int = 0


@dataclass
class Tally:
    """Sums over all nodes."""

    tokens_per_microbatch: int
    miners: dict[str, MinerTally] = field(default_factory=dict)
    round: int = -1
    rounds: dict[int, RoundTally] = field(default_factory=dict)
    started: int = 0
    completed: int = 0
    rerouted: int = 0
    adopted: int = 0
    """Backwards that a sibling computed in place of a replica that was gone."""
    gradients_lost: int = 0
    """Units of processes that ended whose gradients were never merged."""
    churn: Churn = field(default_factory=Churn)
    recoveries: list[Recovery] = field(default_factory=list)
    returning: set[str] = field(default_factory=set)
    """Nodes killed by an option that also starts them again, and not started yet."""
    struck: dict[str, int] = field(default_factory=dict)
    """Fault options handed out, with how often."""
    losses: list[float] = field(default_factory=list)
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    validation: dict[int, float] = field(default_factory=dict)
    audits_passed: int = 0
    audits_failed: int = 0
    audit_costs: dict[tuple[int, str], AuditCost] = field(default_factory=dict)
    """By round and validator."""
    convictions: list[Conviction] = field(default_factory=list)
    weights: dict[str, dict[int, float]] = field(default_factory=dict)
    """Last weights by validator name."""
    scores: dict[str, MinerScored] = field(default_factory=dict)
    """Last score by hotkey."""
    weights_set: int = 0
    weights_history: list[tuple[int, str, dict[int, float]]] = field(default_factory=list)
    """Round, validator's name and weights by uid, as they came onto the chain."""
    hotkeys: dict[str, str] = field(default_factory=dict)
    """By node name."""
    adversaries: dict[str, str] = field(default_factory=dict)
    """Kind by node name, of those that were started to cheat and do."""
    first_step: float | None = None
    last_merge: float | None = None
    last_event: float | None = None
    still: float = 0.0
    """Seconds after the first step in which the run was dead, from its last event until it was resumed."""
    pause: float = 0.0
    """The same, after which nothing has been done yet."""
    merges: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    """Digests of the public weights by (round, stage): one each when replicas are bit-identical."""
    merge_faults: list[MergeFault] = field(default_factory=list)
    records: int = 0
    record_space: RecordPublished = NO_RECORD
    """The record after which most of an epoch's space was used."""
    """What merges found wrong with a replica, once each, whoever found it."""
    finished: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)
    """Lines for a person, oldest first; a view takes them out."""

    @property
    def lost(self) -> int:
        """Microbatches that were in flight when their round closed."""
        return sum(len(number.in_flight) for number in self.rounds.values() if number.closed)

    @property
    def tokens(self) -> int:
        return self.completed * self.tokens_per_microbatch

    @property
    def tokens_per_second(self) -> float:
        """From the first local step to the last merge (or the last microbatch): merges included, standstill not."""
        if self.first_step is None or not self.recent:
            return 0.0
        end = max(self.last_merge or 0.0, self.recent[-1][0])
        seconds = end - self.first_step - self.still
        return self.tokens / seconds if seconds > 0 else 0.0

    @property
    def audit_flops_share(self) -> float | None:
        """FLOPs of all validators' replays, as a share of those of the miners' units in the same rounds."""
        swarm: dict[int, float] = {}
        for (number, _), cost in self.audit_costs.items():
            swarm[number] = max(swarm.get(number, 0.0), cost.swarm_flops)
        whole = sum(swarm.values())
        return sum(cost.flops for cost in self.audit_costs.values()) / whole if whole > 0 else None

    @property
    def audit_bytes_share(self) -> float | None:
        """Bytes that all validators fetched for audits, as a share of what miners moved to train and to merge."""
        moved = sum(
            miner.traffic.forward + miner.traffic.backward + miner.traffic.merge for miner in self.miners.values()
        )
        return sum(cost.bytes for cost in self.audit_costs.values()) / moved if moved > 0 else None

    @property
    def over(self) -> bool:
        """Whether every node that ever began is done, failed, or gone."""
        gone = {miner.name for miner in self.miners.values() if miner.state in {"dead", "left"}}
        return bool(self.finished) and set(self.hotkeys) <= self.finished | set(self.failures) | gone

    @property
    def recent_loss(self) -> float:
        return sum(loss for _, loss in self.recent) / len(self.recent) if self.recent else float("nan")

    def miner(self, name: str) -> MinerTally:
        return self.miners.setdefault(name, MinerTally(name))

    def add(self, name: str, stamped: Stamped) -> None:  # noqa: C901, PLR0912, PLR0915 - one case per kind of event
        """Fold in one event of the node `name`."""
        match stamped.event:
            case NodeStarted() as event:
                self._node_started(name, event)
            case RoundStarted() as event:
                self._round_started(name, stamped.time, event)
            case StateChanged() as event:
                self._state_changed(name, event)
            case Downloading() as event:
                self.miner(name).fetching = event
            case Downloaded() as event:
                self.miner(name).downloads.append(event)
                self.miner(name).fetching = None
                self.news.append(
                    f"{name} has stage {event.stage} with {event.held} rounds in it: {event.bytes / 1e6:,.1f} MB "
                    f"from {event.sources} source(s) in {event.seconds:.1f} s"
                )
            case LocalStep() as event:
                self._stepped(name, stamped.time, event)
            case MicrobatchStarted(round=number, sample=sample):
                self._start((number, sample))
            case MicrobatchDone() as event:
                self._done(stamped.time, event)
            case TrainingClosed() as event:
                self._closed(name, stamped.time, event)
            case Merged() as event:
                self._merged(name, stamped.time, event)
            case MergeFault() as event:
                self._merge_fault(event)
            case RecordPublished() as event:
                self._record(event)
            case Traffic() as event:
                self.miner(name).traffic_now = event
            case Checked(check=check, passed=passed, accuser="") if check in UNIT_CHECKS:
                self.audits_passed += passed
                self.audits_failed += not passed
            case AuditCost(round=number) as event:
                self.audit_costs[number, name] = event
            case Convicted() as event:
                self.convictions.append(Conviction(name, event.round, event.hotkey, event.until, event.reason))
                self.news.append(f"{name} convicts {event.hotkey} in round {event.round}: {event.reason}")
            case MinerScored(hotkey=hotkey) as event:
                self.scores[hotkey] = event
            case WeightsSet(round=number, block=block, weights=weights):
                self.weights[name] = weights
                self.weights_set += 1
                self.weights_history.append((number, name, weights))
                self.news.append(f"{name} set weights for round {number} at block {block}: {len(weights)} miners")
            case Validated(round=number, loss=loss):
                if number not in self.validation:
                    self.news.append(f"validation loss {loss:.3f} at the start of round {number}")
                self.validation[number] = loss
            case NodeFinished():
                self.finished.add(name)
            case NodeFailed(message=message):
                self.failures[name] = message
                self.news.append(f"{name} failed: {message}")
            case Intervention(action="cheat") as event:
                self.adversaries[event.node] = event.fault.removeprefix("--adversary ")
                self.news.append(f"{event.node} cheats from round {event.round} on, as asked: {event.fault}")
            case Intervention() as event:
                self._intervened(stamped.time, event)
            case _:
                pass
        self.last_event = max(self.last_event or stamped.time, stamped.time)

    # -- nodes ----------------------------------------------------------------------------------------------------

    def _node_started(self, name: str, event: NodeStarted) -> None:
        self.hotkeys[name] = event.hotkey
        self.failures.pop(name, None)
        self.finished.discard(name)
        self.returning.discard(name)
        if event.role != "miner":
            return
        miner = self.miner(name)
        self._drop_unmerged(miner)
        miner.traffic_before, miner.traffic_now = miner.traffic, NO_TRAFFIC
        miner.began.clear()
        miner.joining, miner.fetching = False, None
        self.churn.restarted += miner.starts > 0
        miner.starts += 1
        miner.hotkey, miner.endpoint, miner.state = event.hotkey, event.endpoint, "waiting"

    def _state_changed(self, name: str, event: StateChanged) -> None:
        miner = self.miner(name)
        if event.stage is not None:
            miner.stage = event.stage
        if event.state == "active":
            if miner.joining and not miner.was_active:
                miner.active_round = event.round
                self.churn.joined += 1
            if miner.joining:
                self.news.append(f"{name} counts at stage {miner.stage} from round {event.round}: {event.reason}")
            miner.was_active, miner.joining = True, False
        elif event.state != miner.state:
            self.news.append(f"{name} is {event.state} from round {event.round}: {event.reason}")
        miner.joining = miner.joining or event.state == "joining"
        self.churn.left += event.state == "left" and miner.state != "left"
        self.churn.benched += event.state == "benched" and miner.state != "benched"
        if event.state != "active" or miner.state not in AT_WORK:
            miner.state = event.state

    def _intervened(self, time: float, event: Intervention) -> None:
        if event.fault:
            self.struck[event.fault] = self.struck.get(event.fault, 0) + 1
        if event.action == "resume":
            self.churn.resumed += 1
            if self.first_step is not None and self.last_event is not None:
                self.pause += max(0.0, time - self.last_event)
            self.recoveries = [replace(recovery, waiting=set()) for recovery in self.recoveries]
            return
        if event.action in {"kill", "steal", "freeze"}:
            flying = {(number, sample) for number, tally in self.rounds.items() for sample in tally.in_flight}
            closed = {number for number, tally in self.rounds.items() if tally.closed}
            flying = {key for key in flying if key[0] not in closed}
            self.recoveries.append(Recovery(event.node, event.round, time, len(flying), flying))
        if event.action == "freeze":
            self.churn.frozen += 1
            self.miner(event.node).state = "frozen"
        if event.action == "thaw":
            self.miner(event.node).state = "training"
        if event.action in {"join", "restart"}:
            self.miner(event.node).state = "starting"
            self.returning.discard(event.node)
        if event.action in {"kill", "steal"}:
            self.churn.killed += 1
            if event.fault.startswith(("--restart", "--steal")):
                self.returning.add(event.node)
            miner = self.miner(event.node)
            miner.state, miner.fetching = "dead", None
            self._drop_unmerged(miner)

    def _drop_unmerged(self, miner: MinerTally) -> None:
        """A process has ended: what it computed since its last merge is lost."""
        self.gradients_lost += sum(miner.unmerged.values())
        miner.unmerged.clear()

    # -- rounds ---------------------------------------------------------------------------------------------------

    def _record(self, event: RecordPublished) -> None:
        self.records += 1
        if event.epoch_used >= self.record_space.epoch_used:
            self.record_space = event

    def _round_started(self, name: str, time: float, event: RoundStarted) -> None:
        if event.stage is not None:
            miner = self.miner(name)
            miner.was_active = miner.was_active or miner.state != "joining"
            miner.stage, miner.state = event.stage, "training"
            miner.began[event.round] = time
        if event.round > self.round:
            self.round = event.round
            grid = " ".join(str(replicas) for replicas in event.replicas)
            self.news.append(f"round {event.round} begins at block {event.block}: replicas per stage {grid}")

    def _stepped(self, name: str, time: float, event: LocalStep) -> None:
        miner = self.miner(name)
        miner.steps += 1
        miner.units += event.units
        miner.unmerged[event.round] = miner.unmerged.get(event.round, 0) + event.units
        self.first_step = min(self.first_step or time, time)

    def _start(self, key: Sample) -> None:
        number = self.rounds.setdefault(key[0], RoundTally())
        self.started += key[1] not in number.started
        number.started.add(key[1])

    def _done(self, time: float, event: MicrobatchDone) -> None:
        key = (event.round, event.sample)
        self._start(key)
        number = self.rounds[event.round]
        for recovery in self.recoveries:
            recovery.done(key, time)
        if event.sample in number.done:
            return
        number.done.add(event.sample)
        self._go_on()
        number.loss += event.loss
        self.completed += 1
        self.losses.append(event.loss)
        self.recent.append((time, event.loss))

    def _go_on(self) -> None:
        """Something was done: a pause before it lies inside the time that rates are taken over."""
        self.still += self.pause
        self.pause = 0.0

    def _closed(self, name: str, time: float, event: TrainingClosed) -> None:
        miner = self.miner(name)
        miner.state = "merging"
        begin = miner.began.pop(event.round, None)
        if begin is not None:
            miner.training.append(Span(event.round, begin, time))
        self.rerouted += event.rerouted
        self.adopted += event.adopted
        if event.stage == 0:
            self.rounds.setdefault(event.round, RoundTally()).closed = True

    def _merged(self, name: str, time: float, event: Merged) -> None:
        miner = self.miner(name)
        miner.weights, miner.fetching = event.weights, None
        if miner.state == "merging":
            miner.state = "merged"
        if event.included and not event.void:  # else its contribution carries over
            miner.unmerged = {number: units for number, units in miner.unmerged.items() if number > event.round}
        miner.merge_bytes += event.received
        miner.carried += event.carried
        miner.merging.append(Span(event.round, time - event.seconds, time))
        self._go_on()
        self.last_merge = max(self.last_merge or time, time)
        self.merges.setdefault((event.round, event.stage), set()).add(event.weights)
        if event.void:
            self.news.append(f"round {event.round} is void at stage {event.stage}: contributions carry over")

    def _merge_fault(self, event: MergeFault) -> None:
        key = (event.round, event.hotkey, event.fault)
        if all((fault.round, fault.hotkey, fault.fault) != key for fault in self.merge_faults):
            self.merge_faults.append(event)
            self.news.append(f"{event.hotkey} is {event.fault} in the merge of round {event.round}: {event.reason}")


@dataclass(frozen=True, slots=True)
class _Line:
    """One whole line of a log."""

    time: float
    """Of its event; for a torn one, of the event before."""
    path: Path
    end: int
    """Where the next line begins, in bytes."""
    stamped: Stamped | None


class LogFollower:
    """Reads what was appended to the event logs of a folder since the last look, however much that is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}
        self.torn = 0
        """Lines left out because a killed process wrote only a part of them."""

    def read(self) -> Iterator[tuple[str, Stamped]]:
        """(node name, event), oldest first; a line still being written waits for the next look.

        A log is taken to be in the order of its times. What is not taken from the iterator comes at the next look.
        """
        logs = [self._lines(path) for path in sorted(self._folder.glob("*.jsonl"))]
        for line in merge(*logs, key=lambda line: line.time):
            self._offsets[line.path] = line.end
            if line.stamped is None:
                self.torn += 1
            else:
                yield line.path.stem, line.stamped

    def _lines(self, path: Path) -> Iterator[_Line]:
        end, time = self._offsets.get(path, 0), 0.0
        with path.open("rb") as stream:
            stream.seek(end)
            for data in stream:
                if not data.endswith(b"\n"):
                    return
                end += len(data)
                stamped = read_event(data.decode(errors="replace"))
                time = time if stamped is None else stamped.time
                yield _Line(time, path, end, stamped)
