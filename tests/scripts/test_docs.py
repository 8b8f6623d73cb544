"""Every `orion` command that a page shows is one that the program takes."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from neurons.config import NeuronConfig
from neurons.settings import add_flags
from scripts.doctor.options import parse as doctor_options
from scripts.flags import parser
from tests.pages.commands import ELSEWHERE, NOT_HERE, place, shown
from tests.pages.commands import PAGES as NAMES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / page for page in NAMES]
SETTLED = ("chain", "config")
"""Commands whose pages have tests of their own (`test_btcli`, `test_settings`)."""


def commands(page: Path) -> list[str]:
    """Commands of a page that begin with `orion`, without settings before and pipes after."""
    lines = (command.line for command in shown(ROOT) if ROOT / command.page == page)
    found = (re.split(r"[|&>]", re.sub(r"^(ORION_\w+=\S+ )*", "", line))[0].strip() for line in lines)
    return [line for line in found if line.startswith("orion ") and "…" not in line]


def test_pages_show_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 40
    assert commands(ROOT / "docs" / "miner.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "orion.toml").touch()
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        _, command, *words = shlex.split(line)
        try:
            if command in ("miner", "validator"):
                flags = argparse.ArgumentParser(prog=line, allow_abbrev=False)
                add_flags(flags, NeuronConfig)
                flags.parse_args([word.replace("$", "") for word in words])
            elif command == "doctor":
                doctor_options(words, {})
            elif command not in SETTLED:
                parser().parse_args([command, *(word if word != "BLOCK" else "9" for word in words)])
        except SystemExit as stopped:
            if stopped.code != 0:
                pytest.fail(f"{page.name}: {line}: {capsys.readouterr().err}")


def test_every_reason_not_to_run_a_command_is_one_of_a_page() -> None:
    lines = [command.line for command in shown(ROOT)]
    for form, _ in (*ELSEWHERE, *NOT_HERE):
        assert any(re.search(form, line) for line in lines), form
    assert sum(place(command) is None for command in shown(ROOT)) > 40
