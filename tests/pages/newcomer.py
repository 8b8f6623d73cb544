"""`make newcomer`: what a newcomer does on the first evening, every command as README and docs have it.

From a fresh clone and an empty home to the explained score of a miner that joined a running localnet. Each step prints
what it does, what came of it and its seconds; the first that does not come out as the pages say ends it with status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench.browser import CHROMIUM, chromium
from scripts.tally import LogFollower, Tally

HERE = Path(__file__).parents[2]
LOOK = 0.2
PATIENCE = 600.0
"""Seconds for one step on a slow machine."""
LARGER = {"hidden = 64": "hidden = 16384", "heads = 2\n": "heads = 128\n", "ffn = 192": "ffn = 65536"}
"""What makes of pico a model that no machine at hand holds."""
SIZES = frozenset({"disk", "gpu"})
"""Checks that it may fail besides."""


class NewcomerError(Exception):
    """A step that did not come out as the pages say: what was expected, what was seen."""


@dataclass
class Terminal:
    """A program that runs, and the event logs that it writes."""

    process: subprocess.Popen[bytes]
    log: Path
    follower: LogFollower
    tally: Tally = field(default_factory=lambda: Tally(1))

    def look(self) -> Tally:
        """The run so far."""
        for name, stamped in self.follower.read():
            self.tally.add(name, stamped)
        return self.tally

    def until(self, what: str, look: Callable[[Tally], str | None]) -> str:
        """Look again and again. Raises `NewcomerError` if it does not come, or the program ends."""
        deadline = time.monotonic() + PATIENCE
        while (found := look(self.look())) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise NewcomerError(f"{what} did not come; the last of {self.log.name}:\n{self.last()}")
            time.sleep(LOOK)
        return found

    def last(self) -> str:
        return self.log.read_text()[-2000:]

    def stop(self) -> int:
        """Ctrl-C, as a terminal sends it to everything in it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


@dataclass
class Newcomer:
    """An empty home with a clone in it, and the processes that run there."""

    home: Path
    reuse: Path | None
    """A virtual environment to borrow; None installs one as README says."""
    running: ExitStack = field(default_factory=ExitStack)

    @property
    def clone(self) -> Path:
        return self.home / "orion"

    @property
    def run(self) -> Path:
        return self.clone / "runs" / "home"

    @property
    def own(self) -> Path:
        """The directory that the miner joins from."""
        return self.home / "mining"

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of whoever runs this, except where programs are."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM", "TMPDIR") if name in os.environ}
        if self.reuse is not None:  # a borrowed environment has another checkout installed
            kept["PYTHONPATH"] = str(self.clone)
        return kept | {"HOME": str(self.home)}

    def page(self, name: str) -> str:
        return (self.clone / name).read_text(encoding="utf-8")

    def fenced(self, name: str, kind: str) -> str:
        """The one block of a page that opens with ```kind. Raises `NewcomerError`."""
        found = re.findall(rf"^```{re.escape(kind)}\n(.*?)^```$", self.page(name), flags=re.MULTILINE | re.DOTALL)
        if len(found) != 1:
            raise NewcomerError(f"{name} has {len(found)} blocks ```{kind}, expected one")
        return str(found[0])

    def section(self, name: str, number: int) -> str:
        """All shell commands under a page's heading `## number.`"""
        text = re.split(r"^## ", self.page(name), flags=re.MULTILINE)
        (own,) = (part for part in text if part.startswith(f"{number}. "))
        return "".join(re.findall(r"^```sh\n(.*?)^```$", own, flags=re.MULTILINE | re.DOTALL))

    # -- shells -------------------------------------------------------------------------------------------------------

    def shell(self, commands: str, *, cwd: Path, status: int | None = 0) -> str:
        """What the commands print. Raises `NewcomerError` for another status than this."""
        try:
            done = subprocess.run(
                ["/bin/bash", "-euc", self._activated(commands)],
                cwd=cwd,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise NewcomerError(f"`{commands.strip()}` took more than {PATIENCE:g} s") from error
        if status is not None and done.returncode != status:
            raise NewcomerError(
                f"`{commands.strip()}` ended with {done.returncode}, expected {status}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def start(self, commands: str, *, cwd: Path, name: str, run: Path) -> Terminal:
        """A terminal of its own, in which the last command runs until it is interrupted. `run` has its logs."""
        log = self.home / f"{name}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["/bin/bash", "-euc", self._activated(commands)],
                cwd=cwd,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        terminal = Terminal(process, log, LogFollower(run / "events"))
        self.running.callback(terminal.stop)
        return terminal

    def _activated(self, commands: str) -> str:
        ready = self.clone / ".venv" / "bin" / "activate"
        there = f"RUN={self.run}\nNET=$(cat $RUN/chain.url)\n" if (self.run / "chain.url").exists() else ""
        return (f". {ready}\n" if ready.exists() else "") + there + commands


@contextmanager
def step(title: str) -> Iterator[Callable[[str], None]]:
    """Prints the title, what is said within, and the seconds."""
    print(f"\n== {title}", flush=True)
    began = time.monotonic()
    yield lambda line: print(f"   {line}", flush=True)
    print(f"   {time.monotonic() - began:.1f} s", flush=True)


# -- the path ---------------------------------------------------------------------------------------------------------


def walk(newcomer: Newcomer, *, whole: bool, picture: Path) -> None:
    """Raises `NewcomerError` at the first step that does not come out."""
    home = arrive(newcomer, whole=whole)
    with step("README: orion dashboard, looked at") as say:
        show(newcomer, picture, say)
    uid = register(newcomer, home)
    ask(newcomer)
    mine(newcomer, home, uid)


def arrive(newcomer: Newcomer, *, whole: bool) -> Terminal:
    """A clone, what it needs, and a run in it."""
    with step("clone") as say:
        newcomer.shell(f"git clone --quiet {shlex.quote(str(HERE))} {newcomer.clone}", cwd=newcomer.home)
        say(newcomer.shell("git log -1 --format='%h %s'", cwd=newcomer.clone).strip())
    with step("make install" if newcomer.reuse is None else f"borrow {newcomer.reuse}") as say:
        install(newcomer)
        say(newcomer.shell("orion --help", cwd=newcomer.clone).splitlines()[0])
    if whole:
        with step("README: make localnet, to its end") as say:
            said(newcomer, "README.md", "make localnet ")
            for line in newcomer.shell("make localnet", cwd=newcomer.clone).splitlines()[-7:]:
                say(line)
    command = newcomer.fenced("docs/miner.md", "sh run")
    with step(f"docs/miner.md: {command.strip()}") as say:
        home = newcomer.start(f"exec {command}", cwd=newcomer.clone, name="localnet", run=newcomer.run)
        say(home.until("a microbatch", lambda tally: f"{tally.completed} back" if tally.completed else None))
    return home


def register(newcomer: Newcomer, home: Terminal) -> int:
    """From no wallet to a uid that peers know."""
    newcomer.own.mkdir()
    with step("docs/register.md, step 2: a wallet") as say:
        newcomer.shell(newcomer.section("docs/register.md", 2), cwd=newcomer.own)
        say("wallet miner is made")
    with step("orion doctor with a hotkey that is not registered") as say:
        diagnosed(newcomer, "", {"registration": "btcli subnets register"}, say)
    with step("docs/register.md, steps 3 and 5: TAO, registration") as say:
        newcomer.shell(newcomer.section("docs/register.md", 3), cwd=newcomer.own)
        newcomer.shell(newcomer.section("docs/register.md", 5), cwd=newcomer.own)
        uid = own_uid(newcomer)
        say(f"uid {uid}")
    with step("the next round, in which peers read the chain") as say:
        number = home.look().round
        say(home.until("it", lambda tally: f"round {tally.round}" if tally.round > number else None))
    return uid


def ask(newcomer: Newcomer) -> None:
    """What the doctor says of a fault, and of none."""
    with step("orion doctor with a port that peers cannot reach") as say:
        flags = "--host 127.0.0.2 --announce 127.0.0.1"
        diagnosed(newcomer, flags, {"reachable": "publish the port"}, say)
    with step("orion doctor with a model that is too large for this machine") as say:
        larger = newcomer.own / "larger.toml"
        text = (newcomer.run / "manifest.toml").read_text()
        for old, new in LARGER.items():
            text = text.replace(old, new)
        larger.write_text(text)
        diagnosed(
            newcomer, f"--manifest {larger}", {"memory": "a machine with", "manifest": "sha256sum"}, say, also=SIZES
        )
    with step("orion doctor as docs/miner.md has it") as say:
        diagnosed(newcomer, "", {}, say)


def mine(newcomer: Newcomer, home: Terminal, uid: int) -> None:
    """From a second directory into the run, until a score can be explained."""
    with step("orion miner as docs/miner.md has it, until it counts") as say:
        command = newcomer.fenced("docs/miner.md", "sh miner")
        own = newcomer.start(f"exec {command}", cwd=newcomer.own, name="miner", run=newcomer.own / "mine")
        say(own.until("a local step of its own", _at_work))
    with step("docs/miner.md: orion score explain") as say:
        command = newcomer.fenced("docs/miner.md", "sh score")
        if f"--uid {uid}\n" not in command:
            raise NewcomerError(f"docs/miner.md explains another uid than {uid}: {command}")
        hotkey = own.tally.hotkeys["default"]

        def scored(tally: Tally) -> str | None:
            score = tally.scores.get(hotkey)
            return None if score is None or score.score == 0 else f"{score.score:.3g} in round {score.round}"

        say(home.until("a score above 0", scored))
        explained = newcomer.shell(command, cwd=newcomer.own)
        for word in ("correctness", "timeliness", "scarcity", "weight"):
            if word not in explained:
                raise NewcomerError(f"no {word} in what explains the score:\n{explained}")
        for line in explained.splitlines()[-16:]:
            say(line)
    with step("Ctrl-C in both terminals") as say:
        say(f"the miner ended with {own.stop()}")
        if (status := home.stop()) != 130 or not (newcomer.run / "summary.json").exists():
            raise NewcomerError(f"localnet ended with {status}, expected 130 and a summary:\n{home.last()}")
        summary = json.loads((newcomer.run / "summary.json").read_text())
        say(f"summary.json: {summary['tokens']} tokens, {summary['microbatches']['lost']} microbatches lost")


def _at_work(tally: Tally) -> str | None:
    one = tally.miners.get("default")
    return None if one is None or one.steps == 0 else f"stage {one.stage}, {one.steps} local steps"


def install(newcomer: Newcomer) -> None:
    """As README says; or a virtual environment made of another's parts, which `make` takes for ready."""
    if newcomer.reuse is None:
        said(newcomer, "docs/miner.md", "make install && . .venv/bin/activate")
        newcomer.shell("make install", cwd=newcomer.clone)
        return
    venv = newcomer.clone / ".venv"
    venv.mkdir()
    for part in newcomer.reuse.iterdir():
        if part.name != ".ready":
            (venv / part.name).symlink_to(part.resolve())
    (venv / ".ready").touch()


def said(newcomer: Newcomer, page: str, words: str) -> None:
    """Raises `NewcomerError` if the page does not say it any more."""
    if words not in newcomer.page(page):
        raise NewcomerError(f"{page} does not say `{words.strip()}`")


def show(newcomer: Newcomer, picture: Path, say: Callable[[str], None]) -> None:
    """The page of the run, in a browser if there is one."""
    said(newcomer, "README.md", "orion dashboard --run runs/DIR")
    command = "exec orion dashboard --run runs/home --port 0"
    served = newcomer.start(command, cwd=newcomer.clone, name="dashboard", run=newcomer.run)

    def address(_tally: Tally) -> str | None:
        found = re.match(r"(http://\S+) shows", served.log.read_text())
        return None if found is None else found[1]

    where = served.until("the page's address", address)
    if CHROMIUM is None:
        say(f"{where} is served; no picture: no chromium on PATH")
    else:
        picture.write_bytes(asyncio.run(look_at(where, newcomer.home / "profile")))
        say(f"{where} is served; {picture} shows it")
    if (status := served.stop()) != 130:
        raise NewcomerError(f"orion dashboard ended with {status} after Ctrl-C, docs/dashboard.md says 130")


async def look_at(address: str, profile: Path) -> bytes:
    """A picture of the page. Raises `NewcomerError` for a page in trouble."""
    async with chromium(profile) as page:
        await page.open(f"{address}/", width=1280)
        if page.trouble:
            raise NewcomerError(f"the page is in trouble: {page.trouble}")
        return await page.screenshot()


def diagnosed(
    newcomer: Newcomer,
    flags: str,
    wanted: dict[str, str],
    say: Callable[[str], None],
    *,
    also: frozenset[str] = frozenset(),
) -> None:
    """These checks fail, each with a fix that says so, and no other but perhaps `also`. Raises `NewcomerError`."""
    command = newcomer.fenced("docs/miner.md", "sh doctor").rstrip("\n")
    told = newcomer.shell(f"{command} {flags} --json", cwd=newcomer.own, status=1 if wanted else 0)
    checks = {check["check"]: check for check in json.loads(told)["checks"]}
    failed = {name for name, check in checks.items() if check["word"] == "fail"}
    for name in sorted(failed):
        say(f"{name}: {checks[name]['found']}")
        say(f"   fix: {checks[name]['fix']}")
    if failed - also != set(wanted):
        raise NewcomerError(f"doctor finds {sorted(failed)} wrong, expected {sorted(wanted)}:\n{told}")
    for name, words in wanted.items():
        if words not in checks[name]["fix"]:
            raise NewcomerError(f"the fix of {name} does not say `{words}`: {checks[name]['fix']}")
    if not wanted:
        say(", ".join(f"{check['word']} {name}" for name, check in checks.items() if check["word"] != "ok"))


def own_uid(newcomer: Newcomer) -> int:
    """Of the wallet `miner`. Raises `NewcomerError`."""
    command = "btcli wallet registrations -w miner -n $NET"
    said(newcomer, "docs/miner.md", command)
    for wallet in json.loads(newcomer.shell(f"{command} --json", cwd=newcomer.own)):
        if wallet["wallet"] == "miner":
            return int(wallet["hotkeys"][0]["registrations"][0]["uid"])
    raise NewcomerError("the wallet miner is registered nowhere")


def main() -> int:
    """0 done, 1 stumbled."""
    parser = argparse.ArgumentParser(prog="python -m tests.pages.newcomer", description=__doc__)
    parser.add_argument("--venv", type=Path, default=None, help="borrow this environment (default: make install)")
    parser.add_argument("--whole", action="store_true", help="also `make localnet` to its end")
    parser.add_argument("--picture", type=Path, default=Path("runs/newcomer.png"), help="of the dashboard")
    flags = parser.parse_args()
    flags.picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder, ExitStack() as running:
        newcomer = Newcomer(Path(folder), None if flags.venv is None else flags.venv.resolve(), running)
        try:
            walk(newcomer, whole=flags.whole, picture=flags.picture.resolve())
        except NewcomerError as error:
            print(f"\nstumbled: {error}", file=sys.stderr)
            return 1
    print("\na newcomer gets there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
