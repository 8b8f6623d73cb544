"""`orion completion`: what makes a shell complete commands, options, choices and files.

`shtab` writes a script from the parsers once. With `argcomplete` every TAB would start Python and import what the
parsers need, a second each time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import shtab

from neurons import config
from scripts import settings
from scripts.doctor import options as doctor
from scripts.flags import parser
from subnet.localchain import __main__ as chain


def completion(shell: str) -> int:
    """Print it."""
    print(shtab.complete(whole(), shell))
    return 0


def whole() -> argparse.ArgumentParser:
    """`orion` with all options of all commands."""
    root = parser()
    (commands,) = _subcommands(root)
    commands.choices |= {
        "miner": config.flags("orion miner", ""),
        "validator": config.flags("orion validator", ""),
        "doctor": doctor.command(),
        "config": settings.command(),
        "chain": chain.command("orion chain"),
    }
    for action in _actions(root):
        if action.type is Path or action.dest in _paths():
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
    return root


def _paths() -> set[str]:
    """Settings that are files or folders: their flags are read as text."""
    fields = config.NeuronConfig.model_fields.items()
    return {name for name, field in fields if field.annotation is Path or Path in get_args(field.annotation)}


def _actions(command: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of a command and all below it."""
    yield from command._actions
    for below in _subcommands(command):
        for one in below.choices.values():
            yield from _actions(one)


def _subcommands(command: argparse.ArgumentParser) -> list[argparse._SubParsersAction[argparse.ArgumentParser]]:
    return [action for action in command._actions if isinstance(action, argparse._SubParsersAction)]
