"""Simulated swarms by the hundred: plays seeds in batches, keeps what each came to, and counts what was survived.

    python -m scripts.bench.seeds --seeds 0-999 --jobs 2          # goes on where it stopped
    python -m scripts.bench.seeds --page docs/reliability.md      # plays none, puts the figures into a page

Each is 20 virtual minutes of 16 nodes, what `orion sim --seed N` plays. Results are lines of JSON, one a seed, in
--results; one that is there is not played again, whatever code it was played on: `code` says on which, a hash of all
that a simulation runs. One that failed stays there until its line is taken out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from scripts.bench.report import PageError, put
from scripts.sim.command import STOPPED, SimOptionError, fix_hashes, seeds_of
from scripts.sim.play import Outcome, many
from scripts.sim.world import Size

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / "docs" / "benchmarks" / "seeds.jsonl"
CODE: Final = ("model", "subnet", "neurons", "scripts/sim")
"""What a simulation runs."""


class ResultsError(Exception):
    """A file of results that is none: one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What one seed came to."""

    seed: int
    wrong: tuple[str, ...]
    """Promises that did not hold."""
    faults: dict[str, int]
    """How many of each kind."""
    started: int
    """Microbatches."""
    completed: int
    seconds: float
    """Virtual ones."""
    cpu: float
    trace: str
    """Its digest."""
    code: str

    @classmethod
    def of(cls, outcome: Outcome, code: str) -> Played:
        return cls(
            seed=outcome.seed,
            wrong=tuple(outcome.wrong),
            faults=dict(sorted(Counter(str(fault["kind"]) for fault in outcome.faults).items())),
            started=outcome.counts.get("microbatches", 0),
            completed=outcome.counts.get("completed", 0),
            seconds=round(outcome.virtual_seconds),
            cpu=round(outcome.cpu_seconds, 1),
            trace=outcome.digest,
            code=code,
        )


_LINE: Final = TypeAdapter(Played)


def read(path: Path) -> dict[int, Played]:
    """All that were played, by seed. Raises `ResultsError` for a line that is none."""
    found: dict[int, Played] = {}
    text = path.read_text() if path.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = _LINE.validate_json(line)
        except ValidationError as error:
            raise ResultsError(
                f"line {number} of {path} is no result ({error.errors()[0]['msg']}): remove it"
            ) from None
        found[row.seed] = row
    return found


def add(path: Path, row: Played) -> None:
    """Append one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def code_hash(root: Path = ROOT) -> str:
    """12 hex digits of all modules that a simulation runs."""
    whole = hashlib.sha256()
    for path in sorted(path for part in CODE for path in (root / part).rglob("*.py")):
        whole.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:12]


def table(rows: Iterable[Played]) -> str:
    """Faults by kind, and what became of the swarms, as markdown."""
    rows = list(rows)
    struck: Counter[str] = Counter()
    swarms: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    for row in rows:
        struck.update(row.faults)
        swarms.update(row.faults.keys())
        if not row.wrong:
            survived.update(row.faults.keys())
    held = [row for row in rows if not row.wrong]
    hours = sum(row.seconds for row in rows) / 3600
    started, completed = (sum(getattr(row, name) for row in rows) for name in ("started", "completed"))
    lines = [
        f"{len(held):,} of {len(rows):,} seeds hold: {hours:,.0f} virtual hours of {Size().nodes} nodes with",
        f"{sum(struck.values()):,} faults; {completed:,} of {started:,} microbatches came back, the others were",
        f"reported lost. Played on {len({row.code for row in rows})} states of the code.",
        "",
        "| fault | how many | in swarms | of which hold |",
        "|---|---|---|---|",
        *(f"| {kind} | {count:,} | {swarms[kind]:,} | {survived[kind]:,} |" for kind, count in struck.most_common()),
    ]
    failed = [f"* seed {row.seed}: {', '.join(row.wrong)}" for row in rows if row.wrong]
    return "\n".join([*lines, *([""] if failed else []), *failed])


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all that were played hold, 1 if not, 2 for what cannot be."""
    flags = argparse.ArgumentParser(prog="python -m scripts.bench.seeds", description=__doc__.splitlines()[0])
    flags.add_argument("--seeds", default="0-24", metavar="A-B", help="play those that are missing (default: 0-24)")
    flags.add_argument("--jobs", type=int, default=1, help="at a time (default: 1)")
    flags.add_argument("--results", type=Path, default=RESULTS)
    flags.add_argument("--page", type=Path, help="play none, replace the figures of a page")
    options = flags.parse_args(argv)
    try:
        there: Mapping[int, Played] = read(options.results)
        if options.page is not None:
            put(options.page, "seeds", table(there.values()))
            return 0
        missing = [seed for seed in seeds_of(options.seeds) if seed not in there]
    except (ResultsError, PageError, SimOptionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    fix_hashes("scripts.bench.seeds")
    code, holds = code_hash(), True
    played = many(missing, Size(), jobs=options.jobs)
    try:
        for count, outcome in enumerate(played, 1):
            row = Played.of(outcome, code)
            add(options.results, row)
            holds = holds and not row.wrong
            verdict = "holds" if not row.wrong else f"FAILS: {', '.join(row.wrong)}"
            print(f"{count} of {len(missing)}: seed {row.seed} {verdict}", flush=True)
    except KeyboardInterrupt:
        played.close()
        print("stopped; the next call goes on from here", file=sys.stderr)
        return STOPPED
    print(table(read(options.results).values()))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
