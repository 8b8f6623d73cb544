"""A small run as its event logs would have it: two stages of two replicas, a cheater, a kill, one validator."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from neurons.telemetry import (
    AuditCost,
    Checked,
    Convicted,
    Event,
    Intervention,
    LocalStep,
    Merged,
    MicrobatchDone,
    MicrobatchStarted,
    MinerScored,
    NodeFinished,
    NodeStarted,
    RoundStarted,
    StateChanged,
    Telemetry,
    Traffic,
    TrainingClosed,
    Validated,
    WeightsSet,
)

BEGIN = 1_000_000.0
TOKENS = 8 * 128
MANIFEST = """
[run]
name = "small"
[data]
batch = 8
sequence = 128
[round]
count = 1
"""
MARKUP = '<img src=x onerror="document.title=1"> & </td>'
"""A reason that is no text any more if it is put into the page as markup."""
STAGES = {"miner-0": 0, "miner-1": 0, "miner-2": 1, "miner-3": 1}


def write(run: Path, events: Iterable[tuple[float, str, Event]], *, manifest: bool = True) -> None:
    """Append events, (seconds after `BEGIN`, node, event), to a run's logs."""
    if manifest:
        run.mkdir(parents=True, exist_ok=True)
        (run / "manifest.toml").write_text(MANIFEST)
    for seconds, node, event in events:
        log = Telemetry.open(run / "events" / f"{node}.jsonl", now=lambda seconds=seconds: BEGIN + seconds)
        log.emit(event)
        log.close()


def hotkey(node: str) -> str:
    return f"5{node}"


def small() -> list[tuple[float, str, Event]]:
    """The whole run, in the order of its times."""
    events: list[tuple[float, str, Event]] = []
    for node, stage in STAGES.items():
        events += [
            (0.0, node, NodeStarted(hotkey(node), "miner", "http://127.0.0.1:1")),
            (1.0, node, StateChanged(0, "active", stage, "first roster")),
            (2.0, node, RoundStarted(0, 10, stage, [2, 2], "aa")),
        ]
    events += [
        (0.0, "validator-0", NodeStarted(hotkey("validator-0"), "validator", "http://127.0.0.1:2")),
        (2.0, "localnet", Intervention("cheat", "miner-3", 0, "--adversary sign-flip")),
        (2.0, "validator-0", RoundStarted(0, 10, None, [2, 2], "aa")),
        (2.5, "validator-0", Validated(0, 7.0, 8192)),
    ]
    for sample in range(20):
        head = f"miner-{sample % 2}"
        events += [
            (3.0 + sample, head, MicrobatchStarted(0, sample)),
            (3.5 + sample, head, LocalStep(0, 0, sample, 1, 0.5, 1e-3, finite=True)),
            (4.0 + sample, head, MicrobatchDone(0, sample, 7.0 - sample / 10, 1.0, 4)),
        ]
    events += [
        (15.2, "miner-2", LocalStep(0, 1, 1, 9, 0.5, 1e-3, finite=True)),
        (15.5, "localnet", Intervention("kill", "miner-2", 0, "--kill miner:2@round0")),
        (24.0, "miner-0", MicrobatchStarted(0, 99)),
    ]
    for node in ("miner-0", "miner-1", "miner-3"):
        stage = STAGES[node]
        events += [
            (25.0, node, TrainingClosed(0, stage, 10, 10, 0, 0, 0, 0, 10, 8.0)),
            (30.0, node, Merged(0, stage, 2, included=True, void=False, weights=f"w{stage}", seconds=4.5, carried=0,
                                received=1500)),
            (30.1, node, Traffic(1000, 0, 1500, 0)),
        ]  # fmt: skip
    for node, passed in (("miner-0", True), ("miner-0", True), ("miner-3", False)):
        events.append((31.0, "validator-0", checked(node, passed=passed)))
    events += [
        (32.0, "validator-0", Convicted(0, hotkey("miner-3"), 3, MARKUP)),
        (33.0, "validator-0", AuditCost(0, 3, 5e9, 1e10, 4000)),
        (34.0, "validator-0", scored("miner-0", 1, correctness=1.0, weight=1.0)),
        (34.0, "validator-0", scored("miner-3", 4, correctness=0.0, weight=0.0)),
        (35.0, "validator-0", WeightsSet(0, 50, {1: 1.0})),
        (36.0, "validator-0", Validated(1, 5.25, 8192)),
        *((37.0, node, NodeFinished(1)) for node in ("miner-0", "miner-1", "miner-3", "validator-0")),
    ]
    return sorted(events, key=lambda event: event[0])


def checked(node: str, *, passed: bool) -> Checked:
    return Checked(
        round=0,
        hotkey=hotkey(node),
        stage=STAGES[node],
        check="backward",
        grade="measurement",
        passed=passed,
        error=0.001 if passed else 2.0,
        tolerance=0.02,
        version=1,
        sample=5,
        piece=None,
        reason="" if passed else "backward increment is off",
        accuser="",
    )


def scored(node: str, uid: int, *, correctness: float, weight: float) -> MinerScored:
    return MinerScored(
        round=0,
        uid=uid,
        hotkey=hotkey(node),
        stage=STAGES[node],
        root="ab",
        cut=30,
        claimed=22,
        units=20,
        forward=10,
        backward=10,
        unpaid={"no receipt": 2},
        forward_flops=1e9,
        flops=3e10,
        correctness=correctness,
        timeliness=1.0,
        missed=[],
        scarcity=1.0,
        score=3e10 * correctness,
        mean=3e10 * correctness,
        rounds=1,
        share=weight,
        burn=0.0,
        weight=weight,
    )
