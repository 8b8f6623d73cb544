"""What a narrow boundary costs in loss at equal tokens: forms, ratios, optimizers, staleness, widths, over seeds.

    python -m scripts.bench.boundary --grid scripts/bench/learning/nano.toml --jobs 2     # goes on where it stopped
    python -m scripts.bench.boundary --row form=t ratio=16 optimizer=muon seed=3          # one row
    python -m scripts.bench.boundary --tables                                             # what is there, as markdown
    python -m scripts.bench.boundary --page docs/learning.md                              # put into a page
    python -m scripts.bench.boundary --picture docs/learning.png                          # ... as a picture
    python -m scripts.bench.boundary --model 100m --data DATA                             # another model and its grid

Every row trains one model, on a GPU where there is one, on the same samples in the same order for one seed: of the
standard library's text, or of what `orion data prepare` wrote. Results are lines of JSON, one per row, in --results; a
grid does not train again what is there. docs/boundary.md says how to add a row and what to hold it against.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from model.config import ConfigError, preset
from model.corpus import standard_library_corpus
from model.data import Corpus, DataError, ShardEntry
from scripts.bench.learning.frontier import frontier, frontier_table
from scripts.bench.learning.grid import GridError, Results, read_grid
from scripts.bench.learning.picture import draw
from scripts.bench.learning.rows import BATCH, Row
from scripts.bench.learning.tables import Scale, pages
from scripts.bench.learning.training import Curve, train
from scripts.bench.report import PageError, put
from scripts.cli import plan_options
from scripts.data.local import fitting
from scripts.localnet import cache_folder
from scripts.progress import ProgressView
from subnet.quantities import scaled

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks" / "boundary.jsonl"
GRIDS = Path(__file__).parent / "learning"


STEPS = 400
"""Of the rows that the picture shows."""
LINKS = [("20mbit", "20mbit"), ("50mbit", "50mbit"), ("100mbit", "100mbit"), ("856mbit", "1322mbit")]
"""Up and down; the last is the published run's."""


def tables(results: Mapping[Row, Curve]) -> str:
    """All that there is something for, as markdown."""
    parts = [f"### {title}\n\n" + "\n".join(lines) for title, lines in pages(results)]
    points = frontier(results, plan_options({}), LINKS, Row(form="t", ratio=16))
    if points:
        title = "seconds: tokens/s of 100b as planned, and time to equal loss over the best of the line (t, muon)"
        parts.append(f"### {title}\n\n" + "\n".join(frontier_table(points)))
    return "\n\n".join(parts)


def corpus_of(row: Row, folder: Path | None = None) -> Corpus:
    """In microbatches of this row's shape, the same for all seeds: the standard library's, or what was prepared in
    `folder`. Raises `DataError`, `GridError` if that is not the row's."""
    config = row.config()
    if folder is None:
        if row.data is not None:
            raise GridError(f"row learns from data {row.data}: say with --data where it lies")
        files = standard_library_corpus(cache_folder(), vocab=config.vocab)
        return Corpus.open(files.folder, files.entries, seed=0, batch=BATCH, tokens=config.context, vocab=config.vocab)
    found = fitting(folder, row.model)
    if fingerprint(found.entries) != row.data:
        raise GridError(f"{folder} holds data {fingerprint(found.entries)}, the row asks for {row.data}: check --data")
    return Corpus.open(
        folder,
        found.entries,
        seed=0,
        batch=BATCH,
        tokens=config.context,
        vocab=config.vocab,
        held_out=found.held_out,
    )


def fingerprint(entries: Sequence[ShardEntry]) -> str:
    """Of prepared data: 12 hex digits of what its shards hash to."""
    return hashlib.sha256("".join(entry.sha256 for entry in entries).encode()).hexdigest()[:12]


def run(row: Row, results: Results, folder: Path | None) -> None:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(1)
    curve = train(row, corpus_of(row, folder), torch.device("cuda" if gpu else "cpu"))
    results.add(row, curve)
    print(f"{row.name}: {curve.final:.4f} after {curve.seconds:.0f} s", flush=True)


def parsed(words: list[str], model: str, data: str | None) -> Row:
    """A row from `name=value` words. Raises `GridError`."""
    values: dict[str, object] = dict(word.partition("=")[::2] for word in words)
    try:
        values = {"model": model, "hidden": preset(str(values.get("model", model))).hidden, "data": data, **values}
        return TypeAdapter(Row).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise GridError(f"--row: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
    except ConfigError as error:
        raise GridError(f"--row: {error}") from error


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(prog="python -m scripts.bench.boundary", description=__doc__.splitlines()[0])
    flags.add_argument("--grid", type=Path, help="rows to train (default: those for --model that come with Orion)")
    flags.add_argument("--model", default="nano", help="preset whose shape is trained (default: nano)")
    flags.add_argument("--data", type=Path, help="folder that `orion data prepare` wrote (default: standard library)")
    flags.add_argument("--results", type=Path, default=RESULTS)
    flags.add_argument("--row", nargs="+", metavar="NAME=VALUE", help="train this row alone")
    flags.add_argument("--jobs", type=int, default=1, help="processes that train at a time, a core each (default: 1)")
    flags.add_argument("--tables", action="store_true", help="train nothing, print what is there")
    flags.add_argument("--picture", type=Path, help="train nothing, draw what is there of the model's own width")
    flags.add_argument("--page", type=Path, help="train nothing, replace the tables of a page")
    flags.add_argument("--list", action="store_true", help="train nothing, print the rows that are missing")
    options = flags.parse_args(argv)
    results = Results(options.results)
    try:
        data = None if options.data is None else fingerprint(fitting(options.data, options.model).entries)
        if options.row:
            run(parsed(options.row, options.model, data), results, options.data)
            return 0
        if options.page:
            put(options.page, "tables", tables(results.read()))
        elif options.picture:
            shape = preset(options.model)
            draw(results.read(), options.picture, scale=Scale(options.model, data or "", shape.hidden), steps=STEPS)
        elif options.tables:
            print(tables(results.read()))
        else:
            rows = read_grid(options.grid or GRIDS / f"{options.model}.toml")
            missing = [row for row in (replace(row, data=data) for row in rows) if row not in results.read()]
            if not options.list:
                return _all(missing, options)
            print("\n".join(row.name for row in missing))
    except (GridError, DataError, ConfigError, PageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _all(rows: Sequence[Row], options: argparse.Namespace) -> int:
    """A process for each row, so many at a time: two small models train faster on a core each than in turn on both."""
    common = [sys.executable, "-m", "scripts.bench.boundary", "--results", str(options.results)]
    if options.data is not None:
        common += ["--data", str(options.data)]

    def one(row: Row) -> tuple[Row, subprocess.CompletedProcess[str]]:
        command = [*common, "--model", row.model, "--row", *row.name.split()]
        return row, subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)

    total, done, status = sum(row.flops for row in rows), 0, 0
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    with ThreadPoolExecutor(options.jobs) as pool, ProgressView(console, unit=flops, every=0.0) as view:
        trained = [pool.submit(one, row) for row in rows]
        view.show(0, total, f"0 of {len(rows)} rows")
        for count, future in enumerate(as_completed(trained), 1):
            row, child = future.result()
            print(child.stdout, end="", flush=True)
            done, status = done + row.flops, max(status, child.returncode)
            view.show(done, total, f"{count} of {len(rows)} rows")
    return status


def flops(count: float) -> str:
    """For a person."""
    return scaled(count / 1e6, "MFLOP", "GFLOP", "TFLOP", "PFLOP")


if __name__ == "__main__":
    sys.exit(main())
