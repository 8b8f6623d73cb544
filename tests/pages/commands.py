"""`make pages`: every command that README and docs show, run in a fresh clone as they have it.

What trains is made small by options that are added; what goes on until it is stopped is interrupted once it has said
what it should. Some commands run elsewhere in CI, and some cannot run there: they want the public network, root or a
container engine. Each of those is named below; a command that is new on a page and nobody has thought of is run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.model.corpora.making import tokenizer_json
from tests.pages.newcomer import Newcomer, NewcomerError, install, step

ROOT = Path(__file__).parents[2]
PAGES = [
    page.relative_to(ROOT)
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
]
PROGRAMS = "orion|make|python|pip|btcli|docker|sudo|cd"
KEPT = "-e /corpus -e /tokenizer.json -e /manifest.toml -e /runs -e /.venv"
SMALL = "--model pico --validators 1 --rounds 3 --round-seconds 15 --out runs/{}"


@dataclass(frozen=True, slots=True)
class Shown:
    """A command as a page has it."""

    page: Path
    line: str
    block: str = ""
    """What stands behind ``` where its block opens."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a command is run here."""

    add: str = ""
    """Options that make it small."""
    change: tuple[tuple[str, str], ...] = ()
    """Words of it, and what stands there instead."""
    sees: str = ""
    """What its output has, a regular expression."""
    stays: bool = False
    """It goes on until Ctrl-C."""


ELSEWHERE: tuple[tuple[str, str], ...] = (
    (r"make (install|test|lint|wheel|localnet|newcomer|pages|sim)\b", ".ci/run itself, make newcomer"),
    (r"orion sim --seeds", "make sim"),
    (r"make planted", "by hand: a small test run for each bug"),
    (r"make fuzz", ".ci/run, by hand for longer"),
    (r"cd orion && make install", "make newcomer"),
    (r"btcli .*-n \$NET|btcli wallet ", "make newcomer and tests/subnet/localchain/test_btcli.py"),
    (r"orion chain --port", "tests/subnet/localchain/test_btcli.py"),
    (r"orion localnet .*--chaos", "tests/scripts/test_chaos.py"),
    (r"orion localnet --resume", "tests/scripts/test_massacre.py"),
    (r"python -m scripts\.bench\.boundary --page", "tests/scripts/learning: the page is what the results say"),
    (r"python -m scripts\.bench\.seeds --page", "tests/scripts/test_bench_seeds.py: the page is what the results say"),
)
"""A command, and what runs it."""
NOT_HERE: tuple[tuple[str, str], ...] = (
    (r"\bfinney\b|YOUR\.PUBLIC\.IP|203\.0\.113\.|192\.0\.2\.", "public network"),
    (r"--config orion\.toml|orion doctor( --role validator …)?$|orion miner …", "public network"),
    (r"python -m scripts\.bench\.(cheats|adversaries)", "hours"),
    (r"^sudo |^docker ", "root or a container engine"),
    (r"^pip install 'orion-subnet", "public network"),
)
"""A command, and what it wants. `tests/scripts/test_docs.py` holds its options to the program's."""
BLOCKS = {"run", "doctor", "miner", "score"}
"""Blocks of docs/miner.md that `make newcomer` runs."""
WAYS: tuple[tuple[str, Way], ...] = (
    (r"orion sim --seed ", Way("--minutes 8 --stages 2 --replicas 2", sees="1 of 1 hold")),
    (r"orion localnet --dashboard", Way(SMALL.format("seen") + " --stages 2", sees=r"http://127\.0\.0\.1:\d+")),
    (r"orion localnet --data", Way("--stages 2 --validators 1 --rounds 1 --round-seconds 20 --out runs/own")),
    (r"orion localnet", Way(SMALL, sees="tokens/s")),
    (r"orion data prepare", Way("--held-out 0.2")),
    (r"orion data section", Way(change=(("--sequence 4096", "--sequence 512"),))),
    (r"orion dashboard", Way("--port 0", sees="http://", stays=True)),
    (r"orion calibrate", Way("--model pico --stages 2 --microbatches 24 --out runs/calibration.toml")),
    (r"orion chain", Way("--port 0", sees="ws://", stays=True)),
    (r"python -m scripts\.bench\.boundary --grid", Way("--list", sees="form=t")),
    (r"python -m scripts\.bench\.seeds --seeds", Way(change=(("0-999", "0-0"),), sees="seeds hold")),
    (r"python -m scripts\.bench\.boundary --row", Way(change=(("form=NAME", "form=t"), ("seed=0", "seed=0 steps=40")))),
)
"""First that fits; what fits none is run as it is."""


def shown(root: Path) -> Iterator[Shown]:
    """All commands of all pages in their order, each in one line and without what a `#` says of it."""
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8").replace("\\\n", " ")
        block: str | None = None
        for row in text.splitlines():
            if row.lstrip().startswith("```"):
                block = row.strip().removeprefix("```") if block is None else None
            elif (block is not None or row.startswith("    ")) and re.match(rf"\s*(\w+=\S+ )*({PROGRAMS})\s", row):
                line = re.sub(r"\s+", " ", re.split(r"\s+#", row)[0]).strip()
                yield Shown(page, line, (block or "").removeprefix("sh").strip())


def place(command: Shown) -> str | None:
    """Where else it runs or why it does not; None if it is run here."""
    if command.page.name == "miner.md" and command.block in BLOCKS:
        return "make newcomer"
    return next((why for form, why in (*ELSEWHERE, *NOT_HERE) if re.search(form, command.line)), None)


def way(command: Shown) -> Way:
    return next((way for form, way in WAYS if re.match(form, command.line)), Way())


def prepare(reader: Newcomer) -> None:
    """The files that pages speak of, under the names that they give them."""
    corpus = reader.clone / "corpus"
    corpus.mkdir()
    for source in sorted((reader.clone / "tests").rglob("test_*.py")):
        (corpus / f"{'-'.join(source.relative_to(reader.clone).parts)}.txt").write_text(source.read_text())
    (reader.clone / "tokenizer.json").write_bytes(tokenizer_json(vocab=600))
    trained = "--stages 2 --validators 1 --rounds 4 --round-seconds 20 --out runs/DIR"
    reader.shell(f"orion localnet {trained}", cwd=reader.clone)
    (reader.clone / "runs" / "20260101-120000").symlink_to("DIR")
    revive = (
        "exec orion chain --state runs/DIR/chain --ready-file runs/DIR/chain.url --port 0 --netuid 9 --block-time 0.1"
    )
    chain = reader.start(revive, cwd=reader.clone, name="chain", run=reader.run)
    chain.until("the run's chain", lambda _tally: chain.last() if "ws://" in chain.last() else None)
    (reader.clone / "manifest.toml").write_bytes((reader.clone / "runs" / "DIR" / "manifest.toml").read_bytes())


def run(reader: Newcomer, command: Shown, number: int) -> str:
    """The last line of what it printed. Raises `NewcomerError` if it is not what it should be."""
    chosen = way(command)
    line = command.line
    for old, new in chosen.change:
        line = line.replace(old, new)
    before, pipe, after = line.partition(" | ") if " | " in line else line.partition(" > ")
    if pipe == " | " and shutil.which(after.split()[0]) is None:
        pipe = after = ""
    line = f"{before} {chosen.add.format(number)}{pipe}{after}"
    if chosen.stays:
        terminal = reader.start(f"exec {line}", cwd=reader.clone, name=f"command-{number}", run=reader.run)

        def told(_tally: object) -> str | None:
            return terminal.last() if re.search(chosen.sees, terminal.last()) else None

        output = terminal.until(chosen.sees, told)
        if (status := terminal.stop()) not in (0, 130):
            raise NewcomerError(f"`{line}` ended with {status} after Ctrl-C, expected 0 or 130:\n{terminal.last()}")
    else:
        output = reader.shell(line, cwd=reader.clone)
        if not re.search(chosen.sees, output):
            raise NewcomerError(f"`{line}` does not say {chosen.sees}:\n{output}")
    return (output.strip().splitlines() or ["(nothing to say)"])[-1]


def walk(reader: Newcomer, pages: Collection[str]) -> int:
    """How many commands were run, of these pages or of all. Raises `NewcomerError` at the first that does not do what
    its page says."""
    with step("a clone") as say:
        reader.shell(f"git clone --quiet {ROOT} {reader.clone}", cwd=reader.home)
        install(reader)
    with step("a run, a corpus, a tokenizer for pages to speak of") as say:
        prepare(reader)
    done, page = 0, Path()
    for command in shown(reader.clone):
        if place(command) is None and (not pages or command.page.name in pages):
            done += 1
            if command.page != page:  # each begins with what was prepared
                page = command.page
                reader.shell(f"git clean -fdxq {KEPT}", cwd=reader.clone)
            with step(f"{page}: {command.line}") as say:
                say(run(reader, command, done))
    return done


def overview(root: Path, tell: Callable[[str], None]) -> None:
    """Every command and where it runs."""
    for command in shown(root):
        tell(f"{command.page}: {command.line}\n    {place(command) or 'here'}")


def main() -> int:
    """0 all did what pages say, 1 one did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.pages.commands", description=__doc__)
    parser.add_argument("--venv", type=Path, default=None, help="borrow this environment (default: make install)")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="only of this page, such as data.md (default: all)")
    parser.add_argument("--list", action="store_true", help="run nothing, say where each command runs")
    flags = parser.parse_args()
    if flags.list:
        overview(ROOT, print)
        return 0
    with tempfile.TemporaryDirectory(prefix="pages-") as folder, ExitStack() as running:
        reader = Newcomer(Path(folder), None if flags.venv is None else flags.venv.resolve(), running)
        try:
            count = walk(reader, flags.pages)
        except NewcomerError as error:
            print(f"\nstumbled: {error}", file=sys.stderr)
            return 1
    print(f"\n{count} commands do what their pages say")
    return 0


if __name__ == "__main__":
    sys.exit(main())
