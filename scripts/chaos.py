"""`orion localnet --chaos SEED`: faults that a seed draws, for real processes, and whether every promise held.

The promises are those of `orion sim` (docs/reliability.md), as far as event logs tell: a real swarm has no clock that
jumps and no gradients that are exact, but it has a kernel, files and ports.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from neurons.telemetry import Intervention, NodeStarted, Stamped, read_log
from scripts.faults import LASTING, Fault
from scripts.locks import COMMAND
from scripts.sim.faults import Fault as Struck
from scripts.sim.faults import Kind
from scripts.sim.invariants import CHECKS, Story, in_order, name_of, violations

EARLIEST, LATEST = 0.1, 0.7
"""Of a round."""
LEAST_SECONDS = 2.0
KINDS = {"kill": Kind.KILL, "steal": Kind.KILL, "freeze": Kind.PAUSE, "fill": Kind.FULL}
"""What a simulation calls what was done."""
SHOWN = 5
"""Lines of each promise that is broken."""
ENDS = ("thaw", "drain", "restart")


def draw(seed: int, *, stages: int, replicas: int, rounds: int, round_seconds: float) -> tuple[Fault, ...]:
    """In every round but the last a fault for some stages, each of which keeps a replica to which nothing happens."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    faults = []
    for number in range(rounds - 1):
        for stage in sorted(chance.sample(range(stages), chance.randint(1, max(1, stages // 2)))):
            action = chance.choice(LASTING)
            fraction = round(chance.uniform(EARLIEST, LATEST), 3)
            seconds = round(chance.uniform(LEAST_SECONDS, max(LEAST_SECONDS, 0.4 * round_seconds)), 1)
            if replicas > 1:
                faults.append(Fault(action, "stage", stage, number, fraction, seconds))
    return tuple(faults)


def promises(folder: Path, *, cheats: Sequence[str], rounds: int, round_seconds: float) -> dict[str, list[str]]:
    """Every promise by name, with what broke it."""
    story = told(folder, cheats=cheats, rounds=rounds, round_seconds=round_seconds)
    return {name_of(check): [] for check in CHECKS} | violations(story, CHECKS)


def told(folder: Path, *, cheats: Sequence[str], rounds: int, round_seconds: float) -> Story:
    """The story that the event logs of a run tell. Raises `OSError`."""
    logs = {path.stem: read_log(path) for path in sorted(folder.glob("*.jsonl"))}
    done = logs.pop(COMMAND, [])
    moments = [stamped.time for stampeds in (done, *logs.values()) for stamped in stampeds]
    since, end = min(moments, default=0.0), max(moments, default=0.0)
    events = [(name, stamped.event) for name, log in logs.items() for stamped in log]
    return Story(
        entries=in_order(logs, since=since),
        faults=[*_struck(done, since=since, end=end)],
        cheats=frozenset(cheats),
        names={event.hotkey: name for name, event in events if isinstance(event, NodeStarted)},
        rounds=rounds,
        round_seconds=round_seconds,
        alike=False,
    )


def _struck(done: Sequence[Stamped], *, since: float, end: float) -> Iterator[Struck]:
    """What was done to nodes, and until when."""
    under_way: dict[str, tuple[Kind, float]] = {}
    for stamped in done:
        event = stamped.event
        if not isinstance(event, Intervention):
            continue
        if event.action in KINDS:
            under_way[event.node] = KINDS[event.action], stamped.time
        elif event.action in ENDS and event.node in under_way:
            kind, at = under_way.pop(event.node)
            yield Struck(kind, at - since, stamped.time - at, (event.node,))
    yield from (Struck(kind, at - since, end - at, (node,)) for node, (kind, at) in under_way.items())


def lines(found: Mapping[str, Sequence[str]]) -> list[str]:
    """For a person."""
    broken = {name: why for name, why in found.items() if why}
    told = [f"promises: {len(found) - len(broken)} of {len(found)} hold"]
    return told + [f"  {name}: {line}" for name, why in broken.items() for line in why[:SHOWN]]
