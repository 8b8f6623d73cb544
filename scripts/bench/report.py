"""What every benchmark says about itself: its name, its command, the machine; as JSON, shown and kept. And its tables,
in pages."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path


def report(name: str, out: Path, figures: Mapping[str, object]) -> None:
    """Print the result and write it to OUT/NAME.json."""
    result = {
        "benchmark": name,
        "command": f"python -m scripts.bench.{name}",
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        **figures,
    }
    text = json.dumps(result, indent=2)
    (out / f"{name}.json").write_text(text + "\n")
    print(text)


class PageError(Exception):
    """A page that a table cannot be put into: one line."""


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks called `name` of a page. Raises `PageError` if it has none."""
    begin, end = marks(name)
    try:
        old = page.read_text()
    except OSError as error:
        raise PageError(f"page {page} cannot be read ({error.strerror}): check --page") from error
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise PageError(f"page {page} has no lines {begin!r} and {end!r}: add them where tables belong")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def marks(name: str) -> tuple[str, str]:
    """The lines of a page between which `name` is put."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
