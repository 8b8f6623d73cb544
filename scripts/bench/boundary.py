"""What a narrow boundary costs in loss at equal tokens: forms, ratios, optimizers, staleness, widths, over seeds.

    python -m scripts.bench.boundary --grid scripts/bench/learning/nano.toml --jobs 2     # goes on where it stopped
    python -m scripts.bench.boundary --row form=t ratio=16 optimizer=muon seed=3          # one row
    python -m scripts.bench.boundary --tables                                             # what is there, as markdown
    python -m scripts.bench.boundary --page docs/learning.md                              # put into a page
    python -m scripts.bench.boundary --picture docs/learning.png                          # ... as a picture

Every row trains one model on the standard library's text, on the same samples in the same order for one seed. Results
are lines of JSON, one per row, in --results; a grid does not train again what is there. docs/boundary.md says how to
add a row and what to hold it against.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from model.config import ConfigError, preset
from model.corpus import standard_library_corpus
from model.data import Corpus
from scripts.bench.learning.frontier import frontier, frontier_table
from scripts.bench.learning.grid import GridError, Results, read_grid
from scripts.bench.learning.picture import draw
from scripts.bench.learning.rows import BATCH, Row
from scripts.bench.learning.tables import pages
from scripts.bench.learning.training import Curve, train
from scripts.cli import plan_options
from scripts.localnet import cache_folder

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks" / "boundary.jsonl"
GRID = Path(__file__).parent / "learning" / "nano.toml"


LINKS = [("20mbit", "20mbit"), ("50mbit", "50mbit"), ("100mbit", "100mbit"), ("856mbit", "1322mbit")]
"""Up and down; the last is the published run's."""


BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def tables(results: Mapping[Row, Curve]) -> str:
    """All that there is something for, as markdown."""
    parts = [f"### {title}\n\n" + "\n".join(lines) for title, lines in pages(results)]
    points = frontier(results, plan_options({}), LINKS, Row(form="t", ratio=16))
    if points:
        title = "seconds: tokens/s of 100b as planned, and time to equal loss over the best of the line (t, muon)"
        parts.append(f"### {title}\n\n" + "\n".join(frontier_table(points)))
    return "\n\n".join(parts)


def put(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page. Raises `GridError` if it has none."""
    try:
        old = page.read_text()
    except OSError as error:
        raise GridError(f"page {page} cannot be read ({error.strerror}): check --page") from error
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise GridError(f"page {page} has no lines {BEGIN!r} and {END!r}: add them where tables belong")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def corpus_of(row: Row) -> Corpus:
    """The standard library's, in microbatches of this row's shape; the same for all seeds."""
    config = row.model()
    files = standard_library_corpus(cache_folder(), vocab=config.vocab)
    return Corpus.open(files.folder, files.entries, seed=0, batch=BATCH, tokens=config.context, vocab=config.vocab)


def run(row: Row, results: Results) -> None:
    curve = train(row, corpus_of(row))
    results.add(row, curve)
    print(f"{row.name}: {curve.final:.4f} after {curve.seconds:.0f} s", flush=True)


def parsed(words: list[str]) -> Row:
    """A row from `name=value` words. Raises `GridError`."""
    values = dict(word.partition("=")[::2] for word in words)
    try:
        return TypeAdapter(Row).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise GridError(f"--row: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
    except ConfigError as error:
        raise GridError(f"--row: {error}") from error


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(prog="python -m scripts.bench.boundary", description=__doc__.splitlines()[0])
    flags.add_argument("--grid", type=Path, default=GRID)
    flags.add_argument("--results", type=Path, default=RESULTS)
    flags.add_argument("--row", nargs="+", metavar="NAME=VALUE", help="train this row alone")
    flags.add_argument("--jobs", type=int, default=1, help="processes that train at a time, a core each (default: 1)")
    flags.add_argument("--tables", action="store_true", help="train nothing, print what is there")
    flags.add_argument("--picture", type=Path, help="train nothing, draw what is there of nano's width and length")
    flags.add_argument("--page", type=Path, help="train nothing, replace the tables of a page")
    flags.add_argument("--list", action="store_true", help="train nothing, print the rows that are missing")
    options = flags.parse_args(argv)
    results = Results(options.results)
    try:
        if options.row:
            torch.set_num_threads(1)
            run(parsed(options.row), results)
            return 0
        rows = read_grid(options.grid)
        missing = [row for row in rows if row not in results.read()]
        if options.list:
            print("\n".join(row.name for row in missing))
        elif options.page:
            put(options.page, tables(results.read()))
        elif options.picture:
            draw(results.read(), options.picture, hidden=preset("nano").hidden, steps=Row(form="none").steps)
        elif options.tables:
            print(tables(results.read()))
        else:
            return _all(missing, options.results, jobs=options.jobs)
    except GridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _all(rows: Sequence[Row], results: Path, *, jobs: int) -> int:
    """A process for each row, so many at a time: two small models train faster on a core each than in turn on both."""

    def one(row: Row) -> int:
        words = [sys.executable, "-m", "scripts.bench.boundary", "--results", str(results), "--row", *row.name.split()]
        return subprocess.run(words, check=False).returncode

    with ThreadPoolExecutor(jobs) as pool:
        return max(pool.map(one, rows), default=0)


if __name__ == "__main__":
    sys.exit(main())
