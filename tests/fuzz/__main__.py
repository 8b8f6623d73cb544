"""`make fuzz`: every target under a fuzzer that looks which code each input reaches (atheris, libFuzzer).

    python -m tests.fuzz                       # a minute, over all targets
    python -m tests.fuzz --seconds 3600        # an hour
    python -m tests.fuzz evidence rpc          # two of them

Inputs that reach something new are kept in `tests/fuzz/corpus` if --keep is given; an input that breaks its target is
written to `crash-TARGET-*` here, and belongs into the corpus once it is mended: `pytest tests/fuzz` feeds that.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
LONGEST = 4096
"""Bytes of an input."""


def main(argv: list[str] | None = None) -> int:
    """0 if nothing broke, 1 if something did, 2 where atheris is missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", help="which (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="over all targets (default: 60)")
    parser.add_argument("--keep", action="store_true", help="keep inputs that reach something new")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        return _fuzz(options.one, options.targets)
    try:
        import atheris  # noqa: F401 - to say so before twelve processes do
    except ImportError:
        sys.stderr.write("fuzz: atheris is missing: pip install 'orion-subnet[fuzz]' (Linux)\n")
        return 2
    from tests.fuzz.targets import TARGETS

    names = options.targets or list(TARGETS)
    unknown = set(names) - TARGETS.keys()
    if unknown:
        sys.stderr.write(f"fuzz: {min(unknown)} is no target: take from {', '.join(TARGETS)}\n")
        return 2
    broken = [name for name in names if not _run(name, max(1, options.seconds // len(names)), keep=options.keep)]
    if broken:
        sys.stdout.write(f"broken: {', '.join(broken)}\n")
    return 1 if broken else 0


def _run(name: str, seconds: int, *, keep: bool) -> bool:
    """One target in a process of its own; whether nothing broke."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as found:
        kept = CORPUS / name
        if keep:
            kept.mkdir(parents=True, exist_ok=True)
        folders = [str(kept) if keep else found, *([str(kept)] if kept.is_dir() and not keep else [])]
        flags = [f"-max_total_time={seconds}", f"-artifact_prefix=crash-{name}-", f"-max_len={LONGEST}", "-timeout=10"]
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz", "--one", name, "--", *folders, *flags],
            check=False,
            capture_output=True,
            text=True,
        )
    counts = re.findall(r"#(\d+)\s+(?:DONE|pulse|REDUCE|NEW).*?cov: (\d+)", done.stderr)
    tried, covered = counts[-1] if counts else ("0", "0")
    sys.stdout.write(f"{name:<12} {int(tried):>9,} inputs, {covered} places reached\n")
    if done.returncode:
        sys.stdout.write(done.stderr[-3000:])
    sys.stdout.flush()
    return done.returncode == 0


def _fuzz(name: str, rest: list[str]) -> int:
    """Hand this process to libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=["subnet", "model"]):
        from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    folder = Path(next(word for word in rest if not word.startswith("-")))
    for number, seed in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *rest], target.feed)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
