"""What must hold in every simulation, whatever went wrong: checked on the logs of all nodes and on what they computed.

Each check gives one line for each thing that is not as it has to be, and is known by its name.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Generic, TypeVar, cast

from neurons.telemetry import (
    AuditBroken,
    Checked,
    Convicted,
    Event,
    EventsLost,
    EvidenceHeld,
    LocalStep,
    Merged,
    MicrobatchDone,
    MicrobatchStarted,
    MinerScored,
    NodeStarted,
    RoundStarted,
    Stamped,
    TrainingClosed,
    Validated,
    WeightsSet,
)
from scripts.sim.chain import EPOCH_MS
from scripts.sim.faults import DOWN, MERGE_SECONDS, PARTITIONS, Fault, Kind
from scripts.sim.world import RESTARTS, SimNode, World
from subnet.trust.finding import Check, Grade
from subnet.trust.settlement import Unpaid

SLACK = 20.0
"""Seconds by which a fault may be felt after its end."""
HARMLESS = frozenset({Kind.LEAVE, Kind.REPEAT, Kind.SKEW, Kind.SLOW})
"""Faults of a node in which everything that it is asked for can be had."""
ENOUGH = 60
"""Windows whose weights were looked at: some of any kind of check should be among them."""
ALWAYS = (Check.FORWARD, Check.BACKWARD, Check.LOSS, Check.STEP, Check.GRADIENT)
SAME_MACHINE = 1e-4
"""What a measurement of honest work may be off by where all compute alike."""


E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True)
class Entry(Generic[E]):
    """An event and whose it is. `time` is the simulation's."""

    node: str
    time: float
    event: E


@dataclass(frozen=True)
class Story:
    """All that happened, in the order of time."""

    entries: Sequence[Entry[Event]]
    faults: Sequence[Fault]
    cheats: AbstractSet[str]
    """Names of nodes whose programs are not honest."""
    names: Mapping[str, str]
    """Of nodes, by hotkey."""
    rounds: int
    round_seconds: float
    alike: bool = True
    """Whether all compute alike, to the bit or nearly."""
    simulated: World | None = None
    """Whose story it is, if it was a simulation's."""

    @classmethod
    def of(cls, world: World, events: Mapping[str, Iterable[Stamped]]) -> Story:
        return cls(
            entries=in_order(events, since=EPOCH_MS / 1000),
            faults=world.faults,
            cheats=world.cheats.keys(),
            names={node.identity.hotkey: node.name for node in world.nodes.values()},
            rounds=world.loaded.manifest.round.count,
            round_seconds=world.size.round_blocks * world.size.block_time,
            simulated=world,
        )

    @cached_property
    def whole(self) -> bool:
        """Whether every event could be written."""
        return not any(self.of_kind(EventsLost))

    @property
    def world(self) -> World:
        """Raises `ValueError` if it was none."""
        if self.simulated is None:
            raise ValueError("this story is not a simulation's: play it with `orion sim`")
        return self.simulated

    def of_kind(self, kind: type[E]) -> Iterator[Entry[E]]:
        return (cast("Entry[E]", entry) for entry in self.entries if isinstance(entry.event, kind))

    @cached_property
    def faults_end(self) -> float:
        return max((fault.ends for fault in self.faults), default=0.0)

    def ailing(self, name: str, begin: float, end: float) -> bool:
        """Whether something was wrong with a node's way to others, or with itself, between two moments."""
        return any(
            name in fault.nodes and fault.kind not in HARMLESS and fault.at - SLACK < end and begin < fault.ends + SLACK
            for fault in self.faults
        )

    def died(self, entry: Entry[MicrobatchDone]) -> bool:
        """Whether a node was killed after an event of it, and before the round was over."""
        over = self.begins.get(entry.event.round + 1, math.inf)
        return any(
            fault.kind in DOWN and entry.node in fault.nodes and entry.time <= fault.at < over for fault in self.faults
        )

    def parted(self, names: AbstractSet[str], end: float) -> bool:
        """Whether, in the round or two before `end`, some of these nodes (or any) were cut off from others."""
        begin = end - 2 * self.round_seconds
        return any(
            fault.kind in PARTITIONS and fault.at < end and begin < fault.ends and (not names or names & {*fault.nodes})
            for fault in self.faults
        )

    @cached_property
    def begins(self) -> dict[int, float]:
        """When each round began, as whoever saw it first says."""
        found: dict[int, float] = {}
        for entry in self.of_kind(RoundStarted):
            found.setdefault(entry.event.round, entry.time)
        return found


def in_order(events: Mapping[str, Iterable[Stamped]], *, since: float) -> list[Entry[Event]]:
    """Events of several nodes, with times from `since` on (seconds since the epoch)."""
    entries = [Entry(name, one.time - since, one.event) for name, stamped in events.items() for one in stamped]
    return sorted(entries, key=lambda entry: entry.time)


Invariant = Callable[[Story], Iterator[str]]


def nothing_unforeseen(story: Story) -> Iterator[str]:
    """No program fails in a way that its author did not think of."""
    yield from story.world.wrong


def everybody_finishes(story: Story) -> Iterator[str]:
    """No node waits for ever: once the rounds are over, every program that runs has come to its end."""
    for node in story.world.nodes.values():
        if len(node.endings) > RESTARTS:
            yield f"{node.name} ended by itself {len(node.endings)} times, last: {node.endings[-1]}"
        elif not node.finished:
            yield f"{node.name} never came to its end{_doing(node)}"


def _doing(node: SimNode) -> str:
    return f", its last program ended with {node.endings[-1]}" if node.endings and not node.running else ""


def microbatches_are_accounted_for(story: Story) -> Iterator[str]:
    """Every microbatch that a head started is completed once, or reported lost."""
    for entry in story.of_kind(TrainingClosed):
        closed = entry.event
        if closed.started != closed.completed + closed.lost or closed.lost < 0:
            yield f"{entry.node}, round {closed.round}: {closed.started} started, {closed.completed} and {closed.lost}"
    if not story.whole:
        return
    started = {entry.event.sample for entry in story.of_kind(MicrobatchStarted)}
    for done in story.of_kind(MicrobatchDone):
        if done.event.sample not in started:
            yield f"{done.node}: sample {done.event.sample} is done and nobody started it"


def nothing_is_done_twice(story: Story) -> Iterator[str]:
    """A microbatch comes back to one head, once; unless the net was parted between them, where nobody can know, or the
    head was killed before its part of the work had entered a merge."""
    done: dict[int, list[Entry[MicrobatchDone]]] = defaultdict(list)
    for entry in story.of_kind(MicrobatchDone):
        if not story.died(entry):
            done[entry.event.sample].append(entry)
    for sample, entries in done.items():
        if len(entries) > 1 and not story.parted({entry.node for entry in entries}, entries[-1].time):
            yield f"sample {sample}: {', '.join(f'{entry.node} at {entry.time:.1f} s' for entry in entries)}"


def nothing_counts_twice(story: Story) -> Iterator[str]:
    """A unit's gradient is in one contribution that was merged, once; with the same exception."""
    merged = {(entry.node, entry.event.round): entry.time for entry in story.of_kind(Merged) if entry.event.included}
    where: dict[tuple[int, object], list[tuple[str, int]]] = defaultdict(list)
    for node in story.world.nodes.values():
        for pace in node.paces:
            for number, stage, units in pace.cuts:
                if (node.name, number) in merged:
                    for unit in units:
                        where[stage, unit].append((node.name, number))
    for (stage, unit), found in where.items():
        if len(found) > 1 and not story.parted(set(), max(merged[place] for place in found)):
            yield f"stage {stage}, sample {unit}: {', '.join(f'{name} in round {number}' for name, number in found)}"


def requests_are_taken_once(story: Story) -> Iterator[str]:
    """Of a request and its copies, whoever sends them and in whichever order, one at most is answered."""
    for request in story.world.repeater.repeated:
        if request.statuses.count(HTTPStatus.OK) > 1:
            yield f"nonce {request.nonce} was answered with {request.statuses}"


def replicas_agree(story: Story) -> Iterator[str]:
    """After a merge all replicas of a stage hold the same bits."""
    digests: dict[tuple[int, int], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for entry in story.of_kind(Merged):
        merged = entry.event
        digests[merged.round, merged.stage][merged.weights].add(entry.node)
    for (number, stage), found in digests.items():
        if len(found) > 1:
            held = "; ".join(f"{digest[:8]} {', '.join(sorted(names))}" for digest, names in found.items())
            yield f"round {number}, stage {stage}: {held}"


def validators_agree(story: Story) -> Iterator[str]:
    """All validators measure the same validation loss of the same round."""
    losses: dict[int, dict[float, list[str]]] = defaultdict(lambda: defaultdict(list))
    for entry in story.of_kind(Validated):
        losses[entry.event.round][entry.event.loss].append(entry.node)
    for number, found in losses.items():
        if len(found) > 1:
            yield f"round {number}: {dict(found)}"


def nothing_goes_back(story: Story) -> Iterator[str]:
    """Within one life weight versions, merges and rounds only go forward."""
    last: dict[tuple[str, str], int] = {}
    for entry in story.entries:
        event = entry.event
        if isinstance(event, NodeStarted):
            last = {key: value for key, value in last.items() if key[0] != entry.node}
        elif isinstance(event, LocalStep | Merged | RoundStarted):
            value = event.version if isinstance(event, LocalStep) else event.round
            key = entry.node, f"{type(event).__name__} {getattr(event, 'stage', '')}"
            if value <= last.get(key, -1):
                yield f"{entry.node} at {entry.time:.1f} s: {key[1]} {value} after {last[key]}"
            last[key] = value


def honest_stay_unconvicted(story: Story) -> Iterator[str]:
    """No check of honest work fails and nobody honest is convicted, but by silence who could not be reached.

    Who shows nothing of a picked window cannot be told from who has something to hide; but the fault must be its own.
    """
    for broken in story.of_kind(AuditBroken):
        since = story.begins.get(broken.event.round, 0.0)
        if not story.ailing(broken.node, since, broken.time):
            yield f"{broken.node}: {broken.event}"
    for entry in story.of_kind(Convicted):
        convicted = entry.event
        name = story.names[convicted.hotkey]
        if name in story.cheats:
            continue
        since = story.begins.get(convicted.round, 0.0)
        silent = convicted.reason.startswith("withheld") and story.ailing(name, since, entry.time)
        if not silent:
            yield f"{entry.node} at {entry.time:.1f} s convicts {name} for round {convicted.round}: {convicted.reason}"
    for looked in story.of_kind(Checked):
        checked = looked.event
        if story.names[checked.hotkey] in story.cheats:
            continue
        if not checked.passed and checked.grade != Grade.WITHHELD:
            yield f"{looked.node}: {checked}"
        elif story.alike and checked.passed and checked.grade == Grade.MEASUREMENT and checked.error > SAME_MACHINE:
            yield f"{looked.node}: error {checked.error:g} of {checked.hotkey[:8]} in {checked.check}"


def every_check_is_made(story: Story) -> Iterator[str]:
    """Of all that audits can look at something is looked at, where there are windows enough."""
    made = Counter(entry.event.check for entry in story.of_kind(Checked))
    if made[Check.WEIGHTS] >= ENOUGH:
        yield from (f"none of {made.total()} checks is of kind {kind}" for kind in ALWAYS if not made[kind])


def pay_is_for_work(story: Story) -> Iterator[str]:
    """No validator pays for more units of a stage than microbatches were started, and none that was not claimed."""
    started = Counter(entry.event.round for entry in story.of_kind(MicrobatchStarted)) if story.whole else None
    paid: dict[tuple[str, int, int], list[int]] = defaultdict(lambda: [0, 0])
    for entry in story.of_kind(MinerScored):
        scored = entry.event
        if scored.units + sum(scored.unpaid.values()) > scored.claimed:
            yield f"{entry.node}, round {scored.round}: {scored.hotkey[:8]} claimed {scored.claimed}, {scored}"
        sums = paid[entry.node, scored.round, scored.stage]
        sums[0] += scored.forward
        sums[1] += scored.backward
    for (node, number, stage), sums in paid.items():
        if started is not None and max(sums) > started[number]:
            yield f"{node}, round {number}, stage {stage}: {sums} units paid of {started[number]} started"


def work_is_paid(story: Story) -> Iterator[str]:
    """Where nothing went wrong, every unit that a miner claims pays, but for what a full replica sent elsewhere."""
    for entry in story.of_kind(MinerScored):
        scored = entry.event
        cheats = story.names[scored.hotkey] in story.cheats
        if cheats or story.begins.get(scored.round, 0.0) < story.faults_end + MERGE_SECONDS:
            continue
        if scored.units + scored.unpaid.get(Unpaid.OFF_PLAN.value, 0) != scored.claimed:
            yield f"{entry.node}, round {scored.round}: {story.names[scored.hotkey]} claimed {scored.claimed}: {scored}"


def validators_pay_alike(story: Story) -> Iterator[str]:
    """What counts of a miner's work is the same for all validators that saw its evidence."""
    units: dict[tuple[int, str], dict[tuple[int, int], list[str]]] = defaultdict(lambda: defaultdict(list))
    for entry in story.of_kind(MinerScored):
        scored = entry.event
        if "evidence" not in scored.missed:
            units[scored.round, scored.hotkey][scored.forward, scored.backward].append(entry.node)
    for (number, hotkey), found in units.items():
        if len(found) > 1 and story.begins.get(number, 0.0) > story.faults_end:
            yield f"round {number}, {hotkey[:8]}: {dict(found)}"


def memory_is_bounded(story: Story) -> Iterator[str]:
    """What a miner keeps to answer for its work stays within what it was given."""
    for entry in story.of_kind(EvidenceHeld):
        held = entry.event
        if held.bytes > held.ring or held.bytes_on_disk > held.disk:
            yield f"{entry.node}: {held}"


def work_goes_on(story: Story) -> Iterator[str]:
    """In every round that begins some minutes after the last fault microbatches come back, and none is lost."""
    done: Counter[int] = Counter(entry.event.round for entry in story.of_kind(MicrobatchDone))
    lost: Counter[int] = Counter()
    for entry in story.of_kind(TrainingClosed):
        lost[entry.event.round] += entry.event.lost
    for number, began in story.begins.items():
        if began < story.faults_end + MERGE_SECONDS or number >= story.rounds:
            continue
        if not done[number]:
            yield f"round {number}, {began - story.faults_end:.0f} s after the last fault: nothing came back"
        elif lost[number]:
            yield f"round {number}, {began - story.faults_end:.0f} s after the last fault: {lost[number]} lost"


def weights_are_on_chain(story: Story) -> Iterator[str]:
    """What each validator set last is what the chain holds."""
    last = {}
    for entry in story.of_kind(WeightsSet):
        last[entry.node] = entry.event
    rows = story.world.blocks.weights_at(story.world.blocks.finalized)
    for node in story.world.nodes.values():
        if node.role != "validator":
            continue
        uid = story.world.uid(node)
        event = last.get(node.name)
        if event is None:
            yield f"{node.name} has set no weights"
            continue
        total, row = sum(event.weights.values()), rows.get(uid, {})
        wanted = {uid: weight / total for uid, weight in event.weights.items() if weight > 0}
        if any(abs(row.get(uid, 0.0) - wanted.get(uid, 0.0)) > 0.001 for uid in row.keys() | wanted.keys()):
            yield f"{node.name}: {wanted} was set, the chain holds {row}"


def secrets_stay_secret(story: Story) -> Iterator[str]:
    """Nothing that a node drew for itself is in an event or a log."""
    said = "\n".join(story.world.said)
    yield from (f"{secret[:8]}… was told" for secret in story.world.secrets if secret in said)


CHECKS: tuple[Invariant, ...] = (
    microbatches_are_accounted_for,
    nothing_is_done_twice,
    replicas_agree,
    validators_agree,
    nothing_goes_back,
    honest_stay_unconvicted,
    pay_is_for_work,
    validators_pay_alike,
    memory_is_bounded,
)
"""On event logs alone."""
SIMULATED: tuple[Invariant, ...] = (
    nothing_unforeseen,
    everybody_finishes,
    nothing_counts_twice,
    requests_are_taken_once,
    every_check_is_made,
    work_is_paid,
    work_goes_on,
    weights_are_on_chain,
    secrets_stay_secret,
)
"""On what a simulation knows besides, and where rounds and faults have its lengths."""


def violations(story: Story, checks: Iterable[Invariant] = (*SIMULATED, *CHECKS)) -> dict[str, list[str]]:
    """What does not hold, by the name of the check."""
    found = {name_of(check): list(check(story)) for check in checks}
    return {name: lines for name, lines in found.items() if lines}


def name_of(check: Invariant) -> str:
    return check.__name__.replace("_", " ")
