"""Event logs on a disk that fills up: work goes on, lines stay whole, and what is missing is said."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from neurons.logfile import LogFile
from neurons.telemetry import EventsLost, NodeFinished, Telemetry, read_events


class Full:
    """Takes `room` lines, then none until there is room again."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.lines: list[str] = []

    def write(self, text: str, /) -> None:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        self.lines.append(text)

    def close(self) -> None: ...


def test_events_that_do_not_fit_are_counted_and_cost_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    disk = Full(room=2)
    telemetry = Telemetry(disk, now=lambda: 1.0)
    for number in range(5):
        telemetry.emit(NodeFinished(rounds=number))
    disk.room = 9
    telemetry.emit(NodeFinished(rounds=5))
    telemetry.emit(NodeFinished(rounds=6))
    events = [stamped.event for stamped in read_events(disk.lines)]
    assert events == [NodeFinished(0), NodeFinished(1), EventsLost(count=3), NodeFinished(5), NodeFinished(6)]
    assert [record.getMessage() for record in caplog.records] == [
        "events cannot be written (No space left on device): make room under --out"
    ]


FILLED = """
import resource, sys
from pathlib import Path
from neurons.logfile import LogFile
path = Path(sys.argv[1])
log = LogFile(path)
log.write("a" * 59 + "\\n")
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
for _ in range(2):
    try:
        log.write("b" * 79 + "\\n")
        raise SystemExit("it was written")
    except OSError:
        pass
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
log.write("c" * 9 + "\\n")
log.close()
"""


def test_a_line_that_was_cut_off_ends_before_the_next(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    path = tmp_path / "log"
    subprocess.run([sys.executable, "-c", FILLED, str(path)], check=True)
    assert path.read_text().splitlines() == ["a" * 59, "b" * 40, "c" * 9]


def test_what_a_killed_process_left_unfinished_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "log"
    LogFile(path).write("whole\n")
    with path.open("a") as stream:
        stream.write("cut o")
    log = LogFile(path)
    log.write("next\n")
    log.write("last\n")
    log.close()
    assert path.read_text() == "whole\ncut o\nnext\nlast\n"
