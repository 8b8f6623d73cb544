"""Command lines: what is wrong with one is said in one line, with what was probably meant, and ends with status 2."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Final, NoReturn

from model.nearest import nearest

USAGE: Final = 2
"""Exit status where the command line itself is wrong."""
FAILURE: Final = 1
"""Exit status where what it asks for did not come about."""


class UsageError(Exception):
    """A command line that can never do: an option's unknown or impossible value, or options that exclude each other.
    One line with the value and the remedy."""


def status_of(error: Exception) -> int:
    """Which of both an error that ends a command is."""
    return USAGE if isinstance(error, UsageError) else FAILURE


_CHOICE: Final = re.compile(r"invalid choice: '(?P<word>.*)' \(choose from (?P<known>.*)\)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """argparse's, but for what it says of a mistake: no page of usage, and the nearest name that there is."""

    def parse_known_args(  # type: ignore[override]  # argparse declares four ways to call it, and calls it in this one
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but that nothing is left over: a sub-command knows best what it does not know."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            word = rest[0].partition("=")[0]
            if word.startswith("-") and options:
                self.error(f"{word} is no option: did you mean {nearest(word, options)}? {self.prog} --help has all")
            self.error(f"'{rest[0]}' is one word too many: leave it out, or see {self.prog} --help")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Say it and end with status 2."""
        choice = _CHOICE.search(message)
        if choice is not None:
            known = [name.strip("' ") for name in choice["known"].split(",")]
            message = message.replace(
                choice[0],
                f"'{choice['word']}' is unknown: did you mean '{nearest(choice['word'], known)}'? "
                f"There are {', '.join(known)}",
            )
        self.exit(USAGE, f"{self.prog}: {message}\n")


def within(least: int, most: int | None = None) -> Callable[[str], int]:
    """For `type=`: a whole number in these limits."""

    def read(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}: raise it")
        if most is not None and number > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most}: lower it")
        return number

    read.__name__ = "whole number"  # argparse says: invalid whole number value
    return read


port = within(0, 65_535)
"""For `type=`."""
