"""TAB in real shells, on a real terminal: `orion` is a function there that says what it was called with."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from neurons.config import NeuronConfig
from neurons.settings import flag_of, settings_of
from scripts.cli import main
from scripts.completion import _subcommands, whole

READY = "ready> "
SHELLS = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}
SETUP = {
    "bash": "source ./_orion",
    "zsh": "fpath=($PWD $fpath); autoload -Uz compinit; compinit -u -D",
}


class Terminal:
    def __init__(self, shell: str, folder: Path) -> None:
        ours, theirs = pty.openpty()
        self._file, self.seen = ours, ""
        self._process = subprocess.Popen(
            [shutil.which(shell) or shell, *SHELLS[shell]],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env={"PS1": READY, "TERM": "dumb", "PATH": os.environ["PATH"], "HOME": str(folder)},
            start_new_session=True,
        )
        os.close(theirs)
        self.until(re.escape(READY))
        self.type(SETUP[shell] + "; orion() { printf 'called <%s>\\n' \"$*\"; }\n")
        self.until(re.escape(READY))

    def type(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def until(self, pattern: str) -> str:
        """What the terminal shows up to this, and no more of it is left then."""
        while not (found := re.search(pattern, self.seen)):
            self.seen += os.read(self._file, 4096).decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found[1] if found.re.groups else found[0]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._file)


@pytest.fixture(scope="module", params=SHELLS)
def terminal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param} here")
    folder = tmp_path_factory.mktemp("here")
    (folder / "shards-of-mine").mkdir()
    with (folder / "_orion").open("w") as script, contextlib.redirect_stdout(script):
        assert main(["completion", request.param]) == 0
    it = Terminal(request.param, folder)
    yield it
    it.close()


@pytest.mark.parametrize(
    ("keys", "called"),
    [
        ("loc\t", "localnet"),
        ("localnet --replic\t5", "localnet --replicas 5"),
        ("localnet --codec top\t", "localnet --codec topk2bit"),
        ("data prep\t--form\tparq\t", "data prepare --format parquet"),
        ("miner --manif\tm.toml", "miner --manifest m.toml"),
        ("validator --evidence-d\t1", "validator --evidence-disk 1"),
        ("doctor --ro\tval\t", "doctor --role validator"),
        ("config sh\t--js\t", "config show --json"),
        ("chain --allow-r\t", "chain --allow-remote"),
        ("export --run shards-\t", "export --run shards-of-mine"),
        ("miner --data shards-\t", "miner --data shards-of-mine"),
    ],
)
def test_tab(terminal: Terminal, keys: str, called: str) -> None:
    terminal.type(f"orion {keys}\n")
    assert terminal.until(r"called <(.*?)>").rstrip("/ ") == called  # zsh drops a folder's slash again
    terminal.until(re.escape(READY))


def test_commands_that_read_their_own_options_have_them_here() -> None:
    (commands,) = _subcommands(whole())
    for name in ("miner", "validator", "doctor"):
        flags = {flag for action in commands.choices[name]._actions for flag in action.option_strings}
        assert flags >= {flag_of(setting) for setting in settings_of(NeuronConfig)}, name
