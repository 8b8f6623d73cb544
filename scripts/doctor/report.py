"""What a check comes to, all of them together, and how they are printed."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

WIDTH: Final = 110
"""Columns of a line for a person, commands excepted."""
_INDENT: Final = " " * 30


class Word(StrEnum):
    OK = "ok"
    WARN = "warn"
    """It works, and something is not as it should be."""
    FAIL = "fail"
    """A node would not start, or would not be paid."""
    SKIPPED = "skipped"


MARKS: Final = {Word.OK: "+", Word.WARN: "!", Word.FAIL: "x", Word.SKIPPED: "-"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Of one check."""

    check: str
    word: Word
    found: str
    """What was found, values with their units; of a skipped check what it needs."""
    fix: str = ""
    """A command or an option. Empty where nothing is to be done."""


@dataclass(frozen=True, slots=True)
class Report:
    role: str
    where: str
    """Run and network, for a person."""
    findings: tuple[Finding, ...]

    @property
    def status(self) -> int:
        """Exit status: 1 if anything fails."""
        return int(any(finding.word is Word.FAIL for finding in self.findings))

    @property
    def counts(self) -> dict[str, int]:
        counted = Counter(finding.word for finding in self.findings)
        return {word.value: counted[word] for word in Word}

    def as_json(self) -> dict[str, object]:
        """What `--json` prints, see docs/doctor.md."""
        checks = [{"number": number} | asdict(finding) for number, finding in enumerate(self.findings, 1)]
        return {"version": 1, "role": self.role, "status": self.status, "counts": self.counts, "checks": checks}


def ok(check: str, found: str, fix: str = "") -> Finding:
    return Finding(check, Word.OK, found, fix)


def warn(check: str, found: str, fix: str) -> Finding:
    return Finding(check, Word.WARN, found, fix)


def fail(check: str, found: str, fix: str) -> Finding:
    return Finding(check, Word.FAIL, found, fix)


def skipped(check: str, needs: str, fix: str = "") -> Finding:
    return Finding(check, Word.SKIPPED, needs, fix)


def text(report: Report) -> Iterator[str]:
    """Lines for a person."""
    yield f"orion doctor: {report.role}, {report.where}"
    yield ""
    for number, finding in enumerate(report.findings, 1):
        head = f"{number:>2}  {MARKS[finding.word]} {finding.word:<8} {finding.check:<14} "
        yield from textwrap.wrap(
            finding.found,
            WIDTH,
            initial_indent=head,
            subsequent_indent=_INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        if finding.fix:  # in one line, to be copied
            yield f"{_INDENT}fix: {finding.fix}"
    yield ""
    yield verdict(report)


def verdict(report: Report) -> str:
    """The last line."""
    counted = ", ".join(f"{count} {word}" for word, count in report.counts.items() if count)
    verb = {"miner": "mine", "validator": "validate"}[report.role]
    if report.status:
        return (
            f"{counted}: this machine cannot {verb} yet. Do what the fixes of failed checks say, then run this again."
        )
    if report.counts[Word.SKIPPED]:
        return f"{counted}: nothing that was checked keeps this machine from starting to {verb}."
    return f"{counted}: this machine can {verb}."
