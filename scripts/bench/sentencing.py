"""How long a cheater lasts: rounds of a 100B swarm played over the validators' own decision code.

Nothing is computed or sent. Windows and units are picked by the functions that validators pick with, a unit's replay
is drawn from measured errors (`scripts.bench.detection`), and what follows is `Rule`, `Suspicion` and the scores'
`History` as they are. Honest units pass: their failures are another benchmark's subject (`scripts.bench.convictions`).

The scale follows from what is known of the 100B run: a microbatch takes a stage 2.73 s (9,000 tokens/s over three
replicas, 8,192 tokens each), one merge an hour. How windows are picked and who reads them is either what `orion plan`
has as its defaults (`PLANNED`), or one window in each of four wide slots, read by all (`DENSE`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import median

from neurons.adopting import UNITS_OF_A_REPORT
from neurons.auditing import BATCH
from subnet.trust.audit import budget, pick_windows, reads_window, select_units, spread
from subnet.trust.decision import Rule, Suspicion, portable, tests_per_year
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.heads import WindowHead
from subnet.trust.ledger import NO_ROOT, Closing, Direction, Evidence, Leaf, UnitKey
from subnet.trust.scoring import History, Score, weights

CHEATER = "cheater"
PEERS = 47
"""Honest miners beside it: 16 stages of three replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What a round of the swarm is like."""

    round_seconds: float = 3600.0
    microbatch_seconds: float = 2.73
    accumulation: int = 64
    slots: int = 20
    windows: float = 0.25
    """Picked per slot, on average."""
    readers: float = 1.0
    """Validators that look into a picked window, on average."""
    validators: int = 4
    """Of equal stake."""
    false_convictions: float = 1e-3
    score_rounds: int = 3

    @property
    def rule(self) -> Rule:
        tests = tests_per_year(
            windows=self.slots * self.windows, round_seconds=self.round_seconds, validators=self.validators
        )
        return Rule.of(tests_per_year=tests, false_convictions=self.false_convictions, rounds=self.score_rounds)

    @property
    def steps(self) -> int:
        """Windows of one replica in a round."""
        return int(self.round_seconds / self.microbatch_seconds) // self.accumulation


PLANNED = Scale()
DENSE = Scale(slots=4, windows=1.0, readers=4.0)


@dataclass(frozen=True)
class Book:
    """A miner's ledger of one round, as far as audits are drawn from it: the same every round."""

    heads: tuple[WindowHead, ...]
    units: int
    """In the round: what the budget is a share of."""
    windows: Mapping[int, Evidence]
    """By version, each with its own units only, so that drawing from one does not read them all."""

    @classmethod
    def of(cls, scale: Scale, *, directions: Sequence[Direction] = tuple(Direction), units: int | None = None) -> Book:
        """`directions` are those an audit draws from; `units` counts the others too, where there are any."""
        heads, windows = [], {}
        for version in range(scale.steps):
            head = WindowHead(
                version=version,
                steps=version,
                slot=version * scale.slots // scale.steps,
                forward=scale.accumulation,
                backward=scale.accumulation,
                merged=0,
                weights=NO_ROOT,
                optimizer=NO_ROOT,
                units=NO_ROOT,
                next_weights=NO_ROOT,
                next_optimizer=NO_ROOT,
            )
            first = version * scale.accumulation
            leaves = tuple(
                Leaf(direction=direction, stage=1, sample=sample, version=version)
                for sample in range(first, first + scale.accumulation)
                for direction in directions
            )
            heads.append(head)
            windows[version] = Evidence(leaves, (head,), (), Closing(NO_ROOT, NO_ROOT, NO_ROOT))
        whole = len(directions) * scale.steps * scale.accumulation if units is None else units
        return cls(tuple(heads), whole, windows)


Picked = Sequence[tuple[WindowHead, bytes]]
"""Windows with their slots' seeds."""
Replay = Callable[[int, Leaf], tuple[Finding, ...]]
"""Findings on one unit of a round, the same whoever replays it."""


@dataclass
class Bench:
    """One validator, as far as it judges one miner."""

    suspicion: Suspicion
    history: History
    replayed: int = 0
    """Units, in this round."""
    shut: set[int] = field(default_factory=set)
    failed: list[Finding] = field(default_factory=list)
    left: dict[int, dict[UnitKey, Leaf]] = field(default_factory=dict)
    """Units of the picked windows that it has not replayed, as its secret ranks them."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One cheater's fate."""

    convicted: tuple[bool, ...]
    """By round: whether validators with most of the stake held it convicted at the round's end."""
    pay: tuple[float, ...]
    """By round: its weight over an honest miner's, as the median validator sets it."""
    replayed: int
    """Units replayed in all, in sum over validators."""

    @property
    def first(self) -> int | None:
        """The first round that convicts."""
        return next((number for number, done in enumerate(self.convicted) if done), None)


def play(scale: Scale, book: Book, replay: Replay, *, share: float, rounds: int, seed: int) -> Trial:
    """Rounds of one miner with a clean past before validators that replay a `share` of its units in sum: until the
    round after its conviction, `rounds` at most."""
    rule, chance = scale.rule, random.Random(seed)  # noqa: S311 - a simulation
    benches = [Bench(Suspicion(clean=rule.probation), History(scale.score_rounds)) for _ in range(scale.validators)]
    convicted, pay, count = [], [], 0
    for number in range(rounds):
        picked, secret = drawing(scale, book, chance)
        for bench in benches:
            audit(bench, scale, book, rule, replay, number, picked, secret, share)
            secret = chance.randbytes(32)
        reports = [portable(bench.failed) for bench in benches]
        for bench in benches:
            for other, claims in zip(benches, reports, strict=True):
                if other is not bench:
                    _adopt(bench, rule, replay, number, claims)
        count += sum(bench.replayed for bench in benches)
        fallen = [bench.suspicion.convicted for bench in benches]
        convicted.append(2 * sum(fallen) > len(fallen))
        pay.append(median(_close(bench, number) for bench in benches))
        if len(convicted) > 1 and convicted[-2]:
            break
    return Trial(tuple(convicted), tuple(pay), count)


def drawing(scale: Scale, book: Book, chance: random.Random) -> tuple[Picked, bytes]:
    """A round's public picks, and one validator's secret."""
    seeds = [chance.randbytes(32) for _ in range(scale.slots)]
    return pick_windows(book.heads, seeds=seeds, hotkey=CHEATER, count=scale.windows), chance.randbytes(32)


def audit(
    bench: Bench,
    scale: Scale,
    book: Book,
    rule: Rule,
    replay: Replay,
    number: int,
    picked: Picked,
    secret: bytes,
    share: float,
) -> None:
    """Its part of the budget, and more while the test asks for it (`neurons.auditing`)."""
    bench.suspicion = bench.suspicion.at(number, rule)
    bench.replayed, bench.shut, bench.failed = 0, set(), []
    bench.left = {
        head.version: {
            leaf.key: leaf
            for leaf in select_units(
                book.windows[head.version],
                head,
                secret=secret,
                seed=seed,
                hotkey=CHEATER,
                count=len(book.windows[head.version].leaves),
            )
        }
        for head, seed in picked
    }
    units = budget(book.units, share=share, stake_share=1 / scale.validators, risk=bench.suspicion.risk(rule))
    part = scale.readers / scale.validators
    read = [
        head.version
        for head, seed in picked
        if head.version == 0 or reads_window(head, secret=secret, seed=seed, hotkey=CHEATER, share=part)
    ]
    for version, many in zip(read, spread(units, [len(bench.left[version]) for version in read]), strict=True):
        _replay(bench, rule, replay, number, version, many)
    _go_on(bench, rule, replay, number)


def _replay(bench: Bench, rule: Rule, replay: Replay, number: int, version: int, count: int) -> None:
    for leaf in list(islice(bench.left[version].values(), count)):
        if version not in bench.shut:
            _look(bench, rule, replay(number, leaf), version, leaf)


def _look(bench: Bench, rule: Rule, found: Iterable[Finding], version: int, leaf: Leaf) -> None:
    del bench.left[version][leaf.key]
    bench.replayed += 1
    for finding in found:
        bench.suspicion = bench.suspicion.after(finding, rule)
        if not finding.passed:
            bench.failed.append(finding)
        if finding.grade is Grade.WITHHELD:
            bench.shut.add(version)


def _go_on(bench: Bench, rule: Rule, replay: Replay, number: int) -> None:
    while bench.suspicion.goes_on(rule):
        left = [version for version, units in bench.left.items() if units and version not in bench.shut]
        if not left:
            return
        _replay(bench, rule, replay, number, bench.suspicion.next_window(left), BATCH)


def _adopt(bench: Bench, rule: Rule, replay: Replay, number: int, claims: Iterable[Finding]) -> None:
    """Replay what another validator's report says failed (`neurons.adopting`)."""
    for claim in list(claims)[:UNITS_OF_A_REPORT]:
        assert claim.version is not None and claim.sample is not None  # noqa: S101, PT018 - see `finding`
        leaf = bench.left[claim.version].get(UnitKey(claim.sample, direction_of(claim.check)))
        if leaf is not None:
            _look(bench, rule, replay(number, leaf), claim.version, leaf)
    _go_on(bench, rule, replay, number)


def direction_of(check: Check) -> Direction:
    return Direction.FORWARD if check is Check.FORWARD else Direction.BACKWARD


def _close(bench: Bench, number: int) -> float:
    """The round's score enters the mean; the cheater's weight over an honest miner's. It claims what they claim."""
    held = bench.suspicion
    names = [CHEATER, *(f"honest-{index}" for index in range(PEERS))]
    entries = {name: Score(name, 1.0, 1.0, 1.0, 1.0) for name in names}
    if held.convicted:
        entries[CHEATER] = replace(entries[CHEATER], correctness=0.0)
    fell = number in (held.convicted_round, held.withheld_round)
    bench.history.close(entries, [CHEATER] if fell else [])
    uids = {name: uid for uid, name in enumerate(names)}
    by_uid = weights(bench.history.shares(), uids=uids, burn=0.0, owner="")
    return by_uid.get(0, 0.0) / by_uid[1]


def drawn(seed: int, number: int, leaf: Leaf, total: int) -> int:
    """Which of `total` measured errors a unit shows: the same for whoever replays it."""
    key = f"{seed}/{number}/{leaf.version}/{leaf.sample}/{leaf.direction.value}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") % total


def finding(
    leaf: Leaf, number: int, check: Check, *, error: float, tolerance: float, grade: Grade = Grade.MEASUREMENT
) -> Finding:
    """As an audit would write it."""
    return Finding(
        hotkey=CHEATER,
        round=number,
        stage=leaf.stage,
        check=check,
        grade=grade,
        passed=error <= tolerance,
        error=error,
        tolerance=tolerance,
        version=leaf.version,
        sample=leaf.sample,
    )
