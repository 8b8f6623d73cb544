"""`make planted`: each bug of `bugs.py` in a copy of the checkout of its own, and whether its test sees it."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.planted.bugs import BUGS, Planted

ROOT = Path(__file__).parents[2]
SECONDS = 600.0
"""Of real time that a test may take; one that hangs has seen the bug too."""


def copied(into: Path) -> None:
    """The checkout's own files."""
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)


def plant(bug: Planted, folder: Path) -> None:
    """Raises `ValueError` where the place is not what the bug was written for."""
    path = folder / bug.file
    text = path.read_text()
    if text.count(bug.old) != bug.times:
        raise ValueError(f"{bug.file} has {bug.old!r} {text.count(bug.old)} times, not {bug.times}: {bug.name}")
    path.write_text(text.replace(bug.old, bug.new, 1))


def seen(bug: Planted) -> tuple[bool, str]:
    """Whether its test fails with the bug in place, and the line that says so."""
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        folder = Path(name)
        copied(folder)
        plant(bug, folder)
        simulated = bug.caught_by.startswith("sim ")
        program = ["scripts.cli"] if simulated else ["pytest", "-q", "-x", "-n", "0", "--no-header", "--tb=line"]
        command = [sys.executable, "-m", *program, *bug.caught_by.split()]
        try:
            done = subprocess.run(
                command,
                check=False,
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                timeout=SECONDS,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return True, f"ran for more than {SECONDS:g} s"
    lines = done.stdout.splitlines()
    told = [line.strip() for line in lines if "FAILED" in line or (simulated and line.startswith("  "))]
    return done.returncode == 1, told[0] if told else (lines or [done.stderr])[-1]


def main(argv: list[str] | None = None) -> int:
    """0 if every bug is seen."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__)
    parser.add_argument("--only", default="", help="bugs whose name has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (default: 2)")
    options = parser.parse_args(argv)
    bugs = [bug for bug in BUGS if options.only in bug.name]

    def tried(bug: Planted) -> bool:
        start = time.monotonic()
        caught, line = seen(bug)
        verdict = "seen" if caught else "MISSED"
        sys.stdout.write(f"{verdict}  {bug.name} ({time.monotonic() - start:.0f} s): {line[:150]}\n")
        sys.stdout.flush()
        return caught

    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(tried, bugs))
    sys.stdout.write(f"{sum(found)} of {len(found)} planted bugs are seen\n")
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
