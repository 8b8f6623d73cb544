"""One simulation from its seed to its outcome, and many in processes of their own."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import logging
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, TextIO

import bittensor_core
import numpy as np
import torch

from neurons.telemetry import Convicted, Event, MicrobatchDone, MicrobatchStarted, Stamped, read_log
from scripts.sim.clock import LIFE, SimLoop
from scripts.sim.faults import Fault
from scripts.sim.invariants import Entry, Story, violations
from scripts.sim.world import NO_CHEATS, Program, Size, World, logs
from subnet.identity import SCHEME

WALL_SECONDS = 600
"""Of real time, after which a simulation is taken to hang, and killed."""
MEMORY_FOLDER: Final = Path("/dev/shm")  # noqa: S108 - a file system in memory, where there is one


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run came to."""

    seed: int
    faults: list[dict[str, object]]
    wrong: dict[str, list[str]]
    """What did not hold, by check."""
    virtual_seconds: float
    cpu_seconds: float
    digest: str
    """Of the trace: equal for equal runs."""
    counts: dict[str, int] = field(default_factory=dict)
    convicted: dict[str, str] = field(default_factory=dict)
    """Cheats, and what each was first convicted of."""

    @property
    def holds(self) -> bool:
        return not self.wrong


class _Watch(logging.Handler):
    """Writes what nodes log, with the simulation's time, and notes what nobody foresaw."""

    def __init__(self, loop: SimLoop, world: World, stream: TextIO | None) -> None:
        super().__init__()
        self._loop, self._world, self._stream = loop, world, stream

    def emit(self, record: logging.LogRecord) -> None:
        life = LIFE.get()
        who = "-" if life is None else life.name
        line = f"{self._loop.time():9.3f} {who:<14} {record.levelname:<7} {record.name} {record.getMessage()}"
        if record.exc_info is not None and record.exc_info[0] is not None and record.levelno >= logging.ERROR:
            last = "".join(traceback.format_exception(*record.exc_info)).strip()
            line += "\n" + last
            self._world.wrong.append(
                f"{who} at {self._loop.time():.1f} s: {record.getMessage()}: {last.splitlines()[-1]}"
            )
        self._world.said.append(line)
        if self._stream is not None:
            self._stream.write(line + "\n")


def play(
    seed: int,
    size: Size,
    folder: Path,
    *,
    faults: Sequence[Fault] | None = None,
    cheats: Mapping[str, Program] = NO_CHEATS,
    trace: Path | None = None,
    log: Path | None = None,
) -> Outcome:
    """Run one swarm, with its disks in `folder`, from its first process to its last. Ends this process's usefulness for
    others: what killed lives leave behind stays until it ends."""
    SCHEME.set(bittensor_core.CRYPTO_ED25519)
    torch.set_num_threads(1)
    began = time.process_time()
    stream = None if log is None else log.open("w", encoding="utf-8", buffering=1)
    loop = SimLoop(np.random.default_rng((seed, 1)))
    asyncio.set_event_loop(loop)
    gc.disable()  # killed coroutines must not run their last lines
    world = World(loop, seed, size, folder, cheats)
    watch = _Watch(loop, world, stream)
    root = logging.getLogger()
    root.handlers = [watch]
    root.setLevel(logging.INFO)  # as nodes have it
    loop.set_exception_handler(lambda _loop, context: _unheard(watch, context))
    loop.run_until_complete(world.run(faults))
    story = Story.of(world, _events(folder))
    lines = list(_trace(story))
    world.said += lines
    if trace is not None:
        trace.write_text("".join(line + "\n" for line in lines))
    return Outcome(
        seed=seed,
        faults=[fault.row() for fault in world.faults],
        wrong=violations(story),
        virtual_seconds=loop.time(),
        cpu_seconds=time.process_time() - began,
        digest=hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
        counts=_counts(story),
        convicted=_convicted(story),
    )


def _unheard(watch: _Watch, context: dict[str, object]) -> None:
    error = context.get("exception")
    exc_info = (type(error), error, error.__traceback__) if isinstance(error, BaseException) else None
    message = str(context.get("message"))
    watch.emit(logging.LogRecord("asyncio", logging.ERROR, "", 0, message, None, exc_info))


def _events(folder: Path) -> dict[str, list[Stamped]]:
    return {name: read_log(path) for name, path in logs(folder).items()}


def _trace(story: Story) -> Iterator[str]:
    """Faults and events in order, JSON lines."""
    rows = [(fault.at, {"node": "", "event": "Fault", **fault.row()}) for fault in story.world.faults]
    rows += [(entry.time, _row(entry)) for entry in story.entries]
    for moment, row in sorted(rows, key=lambda entry: entry[0]):
        line = json.dumps({"t": round(moment, 4)} | row, separators=(",", ":"), default=str)
        yield line.replace(str(story.world.folder), "")


def _row(entry: Entry[Event]) -> dict[str, object]:
    return {"node": entry.node, "event": type(entry.event).__name__} | asdict(entry.event)


def _counts(story: Story) -> dict[str, int]:
    network = story.world.network.counts
    lives = sum(len(node.lives) for node in story.world.nodes.values())
    kinds = Counter(type(entry.event) for entry in story.entries)
    return {
        "microbatches": kinds[MicrobatchStarted],
        "completed": kinds[MicrobatchDone],
        "lives": lives,
        "events": len(story.entries),
        "blocks": story.world.blocks.finalized,
        "calls": story.world.loop.calls,
        "repeated": story.world.repeater.copies,
        **asdict(network),
    }


def _convicted(story: Story) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in story.of_kind(Convicted):
        name = story.names[entry.event.hotkey]
        if name in story.world.cheats:
            found.setdefault(name, entry.event.reason)
    return found


# -- many -------------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Import what torch imports on first use, once for all children."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])


def in_child(
    seed: int,
    size: Size,
    *,
    faults: Sequence[Fault] | None = None,
    cheats: Mapping[str, Program] = NO_CHEATS,
    trace: Path | None = None,
    log: Path | None = None,
) -> Running:
    """Begin a simulation in a process of its own, which has all modules already."""
    prepare()
    folder = Path(tempfile.mkdtemp(prefix="orion-sim-", dir=MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None))
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(writer)
        return Running(seed, child, reader, folder)
    os.close(reader)
    signal.alarm(WALL_SECONDS)
    try:
        outcome = play(seed, size, folder, faults=faults, cheats=cheats, trace=trace, log=log)
    except BaseException:  # noqa: BLE001 - the process ends here, and its parent says so
        outcome = _broken(seed, traceback.format_exc())
    with os.fdopen(writer, "w") as stream:
        json.dump(asdict(outcome), stream)
    os._exit(0)


def _broken(seed: int, why: str) -> Outcome:
    return Outcome(seed, [], {"simulation": [why]}, 0.0, 0.0, "")


@dataclass(frozen=True, slots=True)
class Running:
    """A simulation under way in another process."""

    seed: int
    child: int
    reader: int
    folder: Path

    def stop(self) -> None:
        """End it, whatever it has come to."""
        os.kill(self.child, signal.SIGKILL)
        self.outcome()

    def outcome(self) -> Outcome:
        """Wait for it."""
        with os.fdopen(self.reader) as stream:
            text = stream.read()
        os.waitpid(self.child, 0)
        shutil.rmtree(self.folder, ignore_errors=True)
        return (
            Outcome(**json.loads(text))
            if text
            else _broken(self.seed, f"its process was killed, or took longer than {WALL_SECONDS} s")
        )


def many(
    seeds: Sequence[int],
    size: Size,
    *,
    jobs: int,
    faults: Sequence[Fault] | None = None,
    trace: Path | None = None,
    log: Path | None = None,
) -> Generator[Outcome, None, None]:
    """Outcomes as they come, `jobs` at a time."""
    waiting, running = list(seeds), dict[int, Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                begun = in_child(waiting.pop(0), size, faults=faults, trace=trace, log=log)
                running[begun.reader] = begun
            ready, _, _ = select.select(list(running), [], [])
            for reader in ready:
                yield running.pop(reader).outcome()
    finally:
        for begun in running.values():
            begun.stop()
