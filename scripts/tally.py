"""A swarm's story so far, folded from the event logs of its nodes: what the live view shows and the summary says."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from neurons.telemetry import (
    LocalStep,
    Merged,
    MicrobatchDone,
    MicrobatchStarted,
    MinerScored,
    NodeFailed,
    NodeFinished,
    NodeStarted,
    RoundStarted,
    Stamped,
    Traffic,
    TrainingClosed,
    UnitAudited,
    Validated,
    WeightsSet,
    read_events,
)

RECENT = 20


@dataclass
class MinerTally:
    """One miner as its own log tells it."""

    name: str
    hotkey: str = ""
    stage: int | None = None
    units: int = 0
    steps: int = 0
    unmerged: int = 0
    """Units in steps since its last merge."""
    state: str = "starting"
    weights: str = ""
    """Digest of the public weights after its last merge."""
    traffic: Traffic = field(default_factory=lambda: Traffic(0, 0, 0, 0))


@dataclass
class Tally:
    """Sums over all nodes."""

    tokens_per_microbatch: int
    miners: dict[str, MinerTally] = field(default_factory=dict)
    round: int = -1
    started: int = 0
    completed: int = 0
    rerouted: int = 0
    adopted: int = 0
    """Backwards that a sibling computed in place of a replica that was gone."""
    in_flight: dict[int, set[int]] = field(default_factory=dict)
    """Samples started and not back, by round."""
    closed: set[int] = field(default_factory=set)
    """Rounds that have closed at a head."""
    gradients_lost: int = 0
    """Units of dead replicas whose gradients were never merged."""
    losses: list[float] = field(default_factory=list)
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    validation: dict[int, float] = field(default_factory=dict)
    audits_passed: int = 0
    audits_failed: int = 0
    weights: dict[str, dict[int, float]] = field(default_factory=dict)
    """Last weights by validator name."""
    scores: dict[str, MinerScored] = field(default_factory=dict)
    """Last score by hotkey."""
    weights_set: int = 0
    first_step: float | None = None
    first_done: float | None = None
    last_merge: float | None = None
    merges: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    """Digests of the public weights by (round, stage): one each when replicas are bit-identical."""
    finished: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)
    """Lines for a person, oldest first; a view takes them out."""

    @property
    def lost(self) -> int:
        """Microbatches that were in flight when their round closed."""
        return sum(len(samples) for number, samples in self.in_flight.items() if number in self.closed)

    @property
    def tokens(self) -> int:
        return self.completed * self.tokens_per_microbatch

    @property
    def tokens_per_second(self) -> float:
        """From the first local step to the last merge (or the last microbatch): merges included."""
        if self.first_step is None or not self.recent:
            return 0.0
        end = max(self.last_merge or 0.0, self.recent[-1][0])
        return self.tokens / (end - self.first_step) if end > self.first_step else 0.0

    @property
    def recent_loss(self) -> float:
        return sum(loss for _, loss in self.recent) / len(self.recent) if self.recent else float("nan")

    def miner(self, name: str) -> MinerTally:
        return self.miners.setdefault(name, MinerTally(name))

    def add(self, name: str, stamped: Stamped) -> None:  # noqa: C901, PLR0912 - one case per kind of event
        """Fold in one event of the node `name`."""
        match stamped.event:
            case NodeStarted(hotkey=hotkey, role="miner"):
                miner = self.miner(name)
                miner.hotkey, miner.state = hotkey, "waiting"
            case RoundStarted() as event:
                self._round_started(name, event)
            case LocalStep(units=units):
                self.miner(name).steps += 1
                self.miner(name).units += units
                self.miner(name).unmerged += units
                self.first_step = min(self.first_step or stamped.time, stamped.time)
            case MicrobatchStarted(round=number, sample=sample):
                self.started += 1
                self.in_flight.setdefault(number, set()).add(sample)
            case MicrobatchDone(round=number, sample=sample, loss=loss):
                self.in_flight.setdefault(number, set()).discard(sample)
                self.completed += 1
                self.losses.append(loss)
                self.recent.append((stamped.time, loss))
            case TrainingClosed() as event:
                self._closed(name, event)
            case Merged() as event:
                self._merged(name, stamped.time, event)
            case Traffic() as event:
                self.miner(name).traffic = event
            case UnitAudited(passed=passed):
                self.audits_passed += passed
                self.audits_failed += not passed
            case MinerScored(hotkey=hotkey) as event:
                self.scores[hotkey] = event
            case WeightsSet(round=number, block=block, weights=weights):
                self.weights[name] = weights
                self.weights_set += 1
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
            case _:
                pass

    def _round_started(self, name: str, event: RoundStarted) -> None:
        if event.stage is not None:
            miner = self.miner(name)
            miner.stage, miner.state = event.stage, "training"
        if event.round > self.round:
            self.round = event.round
            grid = " ".join(str(replicas) for replicas in event.replicas)
            self.news.append(f"round {event.round} begins at block {event.block}: replicas per stage {grid}")

    def _closed(self, name: str, event: TrainingClosed) -> None:
        miner = self.miner(name)
        miner.state = "merging"
        self.rerouted += event.rerouted
        self.adopted += event.adopted
        if event.stage == 0:
            self.closed.add(event.round)

    def died(self, name: str) -> None:
        """A node was killed: what it computed since its last merge is lost."""
        miner = self.miner(name)
        miner.state = "dead"
        self.gradients_lost += miner.unmerged

    def _merged(self, name: str, time: float, event: Merged) -> None:
        miner = self.miner(name)
        miner.state, miner.weights, miner.unmerged = "merged", event.weights, 0
        self.last_merge = max(self.last_merge or time, time)
        self.merges.setdefault((event.round, event.stage), set()).add(event.weights)
        if event.void:
            self.news.append(f"round {event.round} is void at stage {event.stage}: contributions carry over")


class LogFollower:
    """Reads what was appended to the event logs of a folder since the last look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def read(self) -> Iterator[tuple[str, Stamped]]:
        """(node name, event) in the order of each log; a line still being written waits for the next look."""
        for path in sorted(self._folder.glob("*.jsonl")):
            with path.open("rb") as stream:
                stream.seek(self._offsets.get(path, 0))
                data = stream.read()
            end = data.rfind(b"\n") + 1
            self._offsets[path] = self._offsets.get(path, 0) + end
            for stamped in read_events(data[:end].decode().splitlines()):
                yield path.stem, stamped


def summary(
    tally: Tally,
    *,
    model: str,
    parameters: int,
    stages: int,
    replicas: int,
    rounds: int,
    started_at: float,
    wall_seconds: float,
    chain: dict[str, object],
) -> dict[str, object]:
    """The content of `summary.json`: documented in docs/summary.md, stable, later versions only add fields."""
    first = tally.losses[: max(1, min(8, len(tally.losses)))]
    last = tally.losses[-max(1, min(8, len(tally.losses))) :]
    rounds_validated = sorted(tally.validation)
    return {
        "model": model,
        "parameters": parameters,
        "stages": stages,
        "replicas": replicas,
        "rounds": rounds,
        "tokens": tally.tokens,
        "tokens_per_second": round(tally.tokens_per_second, 1),
        "seconds_to_first_step": None if tally.first_step is None else round(tally.first_step - started_at, 2),
        "wall_seconds": round(wall_seconds, 2),
        "loss": {
            "first": _mean(first),
            "last": _mean(last),
            "validation_first": tally.validation[rounds_validated[0]] if rounds_validated else None,
            "validation_last": tally.validation[rounds_validated[-1]] if rounds_validated else None,
        },
        "microbatches": {
            "started": tally.started,
            "completed": tally.completed,
            "rerouted": tally.rerouted,
            "adopted": tally.adopted,
            "lost": tally.lost,
            "gradients_lost": tally.gradients_lost,
        },
        "bytes": {
            "forward": sum(miner.traffic.forward for miner in tally.miners.values()),
            "backward": sum(miner.traffic.backward for miner in tally.miners.values()),
            "merge": sum(miner.traffic.merge for miner in tally.miners.values()),
        },
        "chain": {**chain, "weights_set": tally.weights_set},
        "audits": {
            "units": tally.audits_passed + tally.audits_failed,
            "passed": tally.audits_passed,
            "failed": tally.audits_failed,
        },
        "replicas_identical": all(len(digests) == 1 for digests in tally.merges.values()) if tally.merges else None,
        "miners": [
            {
                "uid": scored.uid if (scored := tally.scores.get(miner.hotkey)) else None,
                "hotkey": miner.hotkey,
                "stage": miner.stage,
                "units": miner.units,
                "score": scored.score if scored else 0.0,
                "weight": scored.weight if scored else 0.0,
            }
            for miner in sorted(tally.miners.values(), key=lambda miner: (miner.stage or 0, miner.hotkey))
        ],
        "failures": tally.failures,
    }


def write_summary(path: Path, content: dict[str, object]) -> None:
    """Write `summary.json` whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
