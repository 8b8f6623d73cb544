"""`orion sim`: plays seeds, prints what they came to, and cuts the schedule of one that fails down to what it takes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from scripts.sim.faults import Fault
from scripts.sim.play import Outcome, in_child, many
from scripts.sim.world import Size
from subnet.commandline import UsageError, status_of

HASHES: Final = "PYTHONHASHSEED"
STOPPED: Final = 130
"""Exit status of what Ctrl-C has ended."""
SHOWN: Final = 3
"""Lines of each check that did not hold."""


class SimError(Exception):
    """What cannot be played: one line."""


class SimOptionError(SimError, UsageError):
    """What the command line alone makes impossible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimOptions:
    """What `orion sim` may be told, as its flags have it."""

    seed: int | None
    seeds: str | None
    jobs: int
    minutes: float
    stages: int
    replicas: int
    joiners: int
    validators: int
    calm: bool
    faults: Path | None
    trace: Path | None
    log: Path | None
    shrink: Path | None

    def size(self) -> Size:
        return Size(
            stages=self.stages,
            replicas=self.replicas,
            joiners=self.joiners,
            validators=self.validators,
            minutes=self.minutes,
        )

    def range(self) -> range:
        """The seeds to play. Raises `SimOptionError`."""
        if self.seeds is None:
            return range(self.seed or 0, (self.seed or 0) + 1)
        return seeds_of(self.seeds)


def seeds_of(text: str) -> range:
    """What `--seeds` means. Raises `SimOptionError`."""
    first, dash, last = text.partition("-")
    if not (first.isdigit() and (last.isdigit() or not dash)) or int(last or first) < int(first):
        raise SimOptionError(f"--seeds {text!r} is no range of seeds: give it as 0-24")
    return range(int(first), int(last or first) + 1)


def fix_hashes(module: str) -> None:
    """Start this program again, as `module`, unless sets of texts have the same order in each of its processes."""
    if os.environ.get(HASHES) == "0":
        return
    settings = os.environ | {HASHES: "0", "OMP_NUM_THREADS": "1"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], settings)  # noqa: S606 - itself


def simulate_faults(options: SimOptions, *, as_json: bool) -> int:
    """0 if everything held in every seed, 1 if not, 2 for options that cannot be."""
    fix_hashes("scripts.cli")
    try:
        seeds = options.range()
        alone = (options.trace, options.log, options.shrink, options.faults)
        if len(seeds) > 1 and any(alone):
            raise SimOptionError("--trace, --log, --faults and --shrink are for one seed: give --seed")
        given = _schedule(options)
    except SimError as error:
        print(f"orion sim: {error}", file=sys.stderr)
        return status_of(error)
    began = time.monotonic()
    played = many(seeds, options.size(), jobs=options.jobs, faults=given, trace=options.trace, log=options.log)
    outcomes = []
    try:
        for outcome in played:
            outcomes.append(outcome)
            if not as_json:
                print(_line(outcome), flush=True)
    except KeyboardInterrupt:
        played.close()
        print(f"orion sim: stopped after {len(outcomes)} of {len(seeds)} seeds", file=sys.stderr)
        return STOPPED
    if as_json:
        print(json.dumps([asdict(outcome) for outcome in outcomes]))
    else:
        print(_sum(outcomes, time.monotonic() - began))
    if options.shrink is not None and not outcomes[0].holds:
        _shrink(outcomes[0], options.size(), options.shrink)
    return 0 if all(outcome.holds for outcome in outcomes) else 1


def _schedule(options: SimOptions) -> list[Fault] | None:
    if options.calm:
        return []
    if options.faults is None:
        return None
    try:
        rows = json.loads(options.faults.read_text())
        if not isinstance(rows, list):
            raise TypeError(f"it holds a {type(rows).__name__}, not a list")
        return [Fault.of(row) for row in rows]
    except OSError as error:
        raise SimError(f"--faults {options.faults} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SimError(f"--faults {options.faults} is no schedule ({error}): give one that --shrink wrote") from error


def _line(outcome: Outcome) -> str:
    counts = outcome.counts
    verdict = "holds" if outcome.holds else "FAILS"
    line = f"seed {outcome.seed:<6} {verdict}  {len(outcome.faults):>3} faults, {outcome.virtual_seconds:,.0f} s in "
    line += f"{outcome.cpu_seconds:.1f} s of CPU, {counts.get('completed', 0)} of {counts.get('microbatches', 0)} "
    line += f"microbatches, trace {outcome.digest}"
    for name, lines in outcome.wrong.items():
        line += f"\n  {name}:"
        line += "".join(f"\n    {text}" for text in lines[:SHOWN])
        if len(lines) > SHOWN:
            line += f"\n    and {len(lines) - SHOWN} more"
    return line


def _sum(outcomes: Sequence[Outcome], seconds: float) -> str:
    kinds = Counter(str(fault["kind"]) for outcome in outcomes for fault in outcome.faults)
    injected = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    hours = sum(outcome.virtual_seconds for outcome in outcomes) / 3600
    held = sum(outcome.holds for outcome in outcomes)
    return (
        f"{held} of {len(outcomes)} hold; faults: {injected or 'none'}\n"
        f"{hours:.1f} hours in {seconds:.0f} s: {hours / max(seconds, 1e-9):.3f} hours per second"
    )


def least(faults: Sequence[Fault], fails: Callable[[Sequence[Fault]], bool]) -> list[Fault]:
    """Those of the faults without any of which it would not fail: leaves out halves, then quarters, then single ones
    (Zeller and Hildebrandt, Simplifying and isolating failure-inducing input, 2002)."""
    kept, part = list(faults), max(1, len(faults) // 2)
    while kept:
        start = 0
        while start < len(kept):
            fewer = kept[:start] + kept[start + part :]
            if fails(fewer):
                kept = fewer
            else:
                start += part
        if part == 1:
            break
        part //= 2
    return kept


def _shrink(failed: Outcome, size: Size, path: Path) -> None:
    names = set(failed.wrong)

    def fails(kept: Sequence[Fault]) -> bool:
        still = bool(names & set(in_child(failed.seed, size, faults=kept).outcome().wrong))
        print(f"{len(kept)} faults: {'still fails' if still else 'holds'}", flush=True)
        return still

    faults = least([Fault.of(row) for row in failed.faults], fails)
    path.write_text(json.dumps([fault.row() for fault in faults], indent=1) + "\n")
    print(f"{len(faults)} faults are enough ({path}):")
    print("".join(f"  {fault}\n" for fault in faults), end="")
