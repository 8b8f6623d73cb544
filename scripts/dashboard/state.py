"""What the page shows at one moment, as typed values: the JSON that the server sends has exactly these fields.

Times are seconds since the epoch, losses nats per token, sizes bytes. Every section is sent when it has changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter

from neurons.telemetry import Downloading
from scripts.dashboard.notes import Note

Status = Literal["waiting", "running", "finished"]
Role = Literal["head", "body", "tail", "whole"]


@dataclass(frozen=True, slots=True)
class Run:
    """Which run this is and where it stands."""

    name: str
    """Of the manifest; that of the folder while there is none."""
    folder: str
    """Last part of the folder's path."""
    status: Status
    round: int
    """The newest that has begun; -1 before the first."""
    rounds: int | None
    """As many as the manifest has; None without one."""
    begin: float | None
    """First event."""
    at: float | None
    """What is shown is what was known then: the last event, or the moment of a replay."""
    end: float | None
    """Last event of the whole run, also while a replay shows an earlier moment."""
    torn: int
    """Lines of logs that a killed process left unfinished, left out."""
    problem: str
    """Why logs cannot be followed any more; empty while they can."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The whole run's figures (`scripts.tally`)."""

    loss: float | None
    """Mean of the latest microbatches."""
    validation: float | None
    validation_round: int | None
    tokens: int | None
    """None where the run's folder has no manifest, which says how large a microbatch is."""
    tokens_per_second: float | None
    """From the first local step to the last merge or microbatch."""
    microbatches: int
    """That came back to their head."""
    in_flight: int
    lost: int
    rerouted: int
    adopted: int
    gradients_lost: int
    forward_bytes: int
    backward_bytes: int
    merge_bytes: int
    audits_passed: int
    audits_failed: int
    audit_flops_share: float | None
    audit_bytes_share: float | None
    convicted: int
    """Miners that some validator counts nothing for in the round that goes on."""
    weights_set: int
    flops_per_second: float | None
    """Useful ones of the whole swarm, by the formula below; None where the manifest names no model."""
    mfu: float | None
    """0 to 1 of `miners` cards; None where no card is named."""
    formula: str
    """Of both."""
    card: str
    """Empty where none is named."""
    miners: float | None
    """That ran while the run trained, on average; None where the folder has not all their logs."""
    miner_hours: float | None
    dollars: float | None
    """For these hours; None where no price is named."""
    dollars_per_million: float | None
    """Tokens."""
    target: int | None
    """Tokens; None where rounds are counted."""
    progress: float | None
    """0 to 1: of the target, or of the manifest's rounds."""
    seconds_left: float | None
    """At the rate so far."""
    killed: int
    frozen: int
    joined: int
    left: int
    benched: int
    restarted: int
    resumed: int


@dataclass(frozen=True, slots=True)
class LastMerge:
    """How the latest merge that a miner reported went for it."""

    round: int
    included: bool
    """Whether what it had learned is in it."""
    void: bool


@dataclass(frozen=True, slots=True)
class Sentence:
    """A miner counts nothing in some validators' scores."""

    validators: list[str]
    until: int
    """The first round that counts again, of the validator that convicted it for longest."""
    in_force: bool
    """Whether that round has still to come."""
    reason: str
    """Of the latest verdict."""


@dataclass(frozen=True, slots=True)
class Miner:
    """One cell of the grid."""

    name: str
    hotkey: str
    uid: int | None
    """None until a validator has scored it."""
    stage: int | None
    state: str
    """starting, waiting, joining, active, training, merging, merged, benched, out, left, frozen, dead; unseen where its
    log is not in the folder."""
    steps: int
    units: int
    fetching: Downloading | None
    """How far the state is that it fetches, if it does."""
    merge: LastMerge | None
    sentence: Sentence | None
    starts: int
    failure: str
    """The line it gave up with; empty if it did not."""
    plays: str
    """The kind of cheat it was started as; empty for an honest one."""
    passed: int
    """Of its units that validators replayed."""
    failed: int
    other_failed: int
    """Failed checks of other kinds."""
    weight: float | None
    """Mean of what validators' last weights give it; None before there are any."""
    score: float | None
    """What its latest scored round came to (`subnet.trust.scoring`), mean over validators."""


@dataclass(frozen=True, slots=True)
class Stage:
    index: int
    role: Role
    miners: list[Miner]


@dataclass(frozen=True, slots=True)
class Validator:
    name: str
    state: Literal["working", "done", "failed"]
    failure: str
    units: int
    """That it replayed, in all rounds whose audit it has closed."""
    flops: float
    bytes: int
    """That it fetched for that."""
    convictions: int


@dataclass(frozen=True, slots=True)
class Grid:
    stages: list[Stage]
    away: list[Miner]
    """Miners that hold no stage."""
    validators: list[Validator]


@dataclass(frozen=True, slots=True)
class Curves:
    """Columns of equal length per curve, by time."""

    loss_time: list[float]
    loss_done: list[int]
    """Microbatches of the run that were back by then."""
    loss: list[float]
    loss_width: int
    """Each point is the mean of so many microbatches."""
    validation_round: list[int]
    validation_time: list[float]
    """At which the weights became what was validated: the start of the round."""
    validation_done: list[int]
    validation: list[float]
    rate_time: list[float]
    """Ends of stretches of `rate_seconds`."""
    rate: list[float]
    """Tokens per second; microbatches without a manifest."""
    rate_seconds: float
    tokens_per_microbatch: int | None


@dataclass(frozen=True, slots=True)
class Merge:
    """One stage's merge of one round, over the replicas that have reported it."""

    stage: int
    reported: int
    included: int
    sources: int
    """Contributions in it."""
    void: bool
    identical: bool
    """Whether all that reported hold the same weights."""
    bytes: int
    """Fetched, all replicas together."""
    seconds: float
    """Of the slowest."""
    carried: int


@dataclass(frozen=True, slots=True)
class Round:
    number: int
    time: float | None
    block: int | None
    done: int
    in_flight: int
    """Microbatches that are on their way, or were when the round closed: those are lost."""
    closed: bool
    loss: float | None
    """Mean over its microbatches."""
    validation: float | None
    """At its start."""
    merges: list[Merge]


@dataclass(frozen=True, slots=True)
class Rounds:
    rounds: list[Round]
    """The latest, newest first."""
    left_out: int
    """Earlier ones."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What validators found of one miner in one round."""

    round: int
    miner: str
    stage: int | None
    validators: list[str]
    until: int
    in_force: bool
    reasons: list[str]
    """Each once."""


@dataclass(frozen=True, slots=True)
class FailedCheck:
    round: int
    validator: str
    miner: str
    stage: int
    check: str
    grade: str
    error: float | None
    """Relative; None where nothing could be compared."""
    tolerance: float
    sample: int | None
    reason: str
    reported: bool
    """Whether another validator's report had it first."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What merges found wrong with a replica."""

    round: int
    stage: int
    miner: str
    fault: str
    reason: str


@dataclass(frozen=True, slots=True)
class Audits:
    verdicts: list[Verdict]
    """Newest first."""
    failed: list[FailedCheck]
    """The latest, newest first."""
    faults: list[Fault]


@dataclass(frozen=True, slots=True)
class Score:
    """One validator's score of one miner for one round (`neurons.telemetry.MinerScored`)."""

    validator: str
    miner: str
    uid: int
    round: int
    stage: int
    claimed: int
    forward: int
    backward: int
    unpaid: dict[str, int]
    forward_flops: float
    flops: float
    correctness: float
    timeliness: float
    missed: list[str]
    scarcity: float
    score: float
    mean: float
    rounds: int
    share: float
    burn: float
    weight: float


@dataclass(frozen=True, slots=True)
class Scores:
    rounds: list[int]
    """That there are scores of, newest first; older ones are left out."""
    scores: list[Score]


@dataclass(frozen=True, slots=True)
class WeightRow:
    uid: int
    miner: str
    stage: int | None
    weights: list[float]
    """By validator, in the order of `Weights.validators`."""
    mean: float
    convicted: bool


@dataclass(frozen=True, slots=True)
class Weights:
    """The last weights that validators put on chain."""

    validators: list[str]
    rounds: list[int]
    """For which each set them."""
    rows: list[WeightRow]


@dataclass(frozen=True, slots=True)
class Log:
    notes: list[Note]
    """Oldest first; only the latest few hundred."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A node elsewhere, as far as it tells a stranger."""

    address: str
    """IP and port of its axon."""
    answers: bool = False
    """Whether it did when it was asked last."""
    hotkey: str = ""
    """That it says it serves; empty until it has answered once."""
    routes: int = 0
    seconds: float | None = None
    """From the connection to the end of its latest answer."""
    asked: int = 0
    answered: int = 0
    seen: float | None = None
    """When it answered last."""
    why: str = ""
    """It did not answer."""


@dataclass(frozen=True, slots=True)
class Peers:
    """In place of all sections but `run` where nodes elsewhere are looked at."""

    peers: list[Peer]


@dataclass(frozen=True, slots=True)
class State:
    """Everything on the page."""

    run: Run
    totals: Totals
    grid: Grid
    curves: Curves
    rounds: Rounds
    audits: Audits
    scores: Scores
    weights: Weights
    log: Log = field(default_factory=lambda: Log([]))


_SECTIONS: dict[str, TypeAdapter[object]] = {
    name: TypeAdapter(kind)
    for name, kind in (
        ("run", Run),
        ("totals", Totals),
        ("grid", Grid),
        ("curves", Curves),
        ("rounds", Rounds),
        ("audits", Audits),
        ("scores", Scores),
        ("weights", Weights),
        ("log", Log),
    )
}


def sections(state: State) -> dict[str, bytes]:
    """JSON of each section, by its name. What is no finite number becomes null."""
    return {name: adapter.dump_json(getattr(state, name)) for name, adapter in _SECTIONS.items()}


def joined(parts: dict[str, bytes]) -> bytes:
    """One JSON object of sections."""
    return b"{" + b",".join(b'"%s":%s' % (name.encode(), text) for name, text in parts.items()) + b"}"
