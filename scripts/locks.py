"""Who is alive in a local run: every process holds a lock of its own under `locks/` and writes its number into it.

The kernel lets go of a lock when its process ends, however it ends. So a run is not started a second time while one
of its processes lives, and no two processes write one event log.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

COMMAND = "localnet"
ORPHANS_PATIENCE = 10.0
"""Seconds that nodes whose command has died get to notice it and end."""
LOOK = 0.05


class StillRunning(Exception):  # noqa: N818 - it says what is the matter
    """A process of the run lives: one line with its number."""


class Lock:
    """The right to be the one process of that name in a run. Held until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path) -> Lock:
        """Raises `StillRunning` naming the process that holds it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise StillRunning(
                f"{path.parent.parent} is in use: its {path.name} is process {holder or '(starting)'}; stop that first"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return cls(descriptor)

    def release(self) -> None:
        os.close(self._descriptor)


def lock_path(folder: Path, name: str) -> Path:
    return folder / "locks" / name


def claim_run(folder: Path, *, patience: float = ORPHANS_PATIENCE) -> Lock:
    """Hold the run in `folder` as its command; waits for nodes whose command has died. Raises `StillRunning`."""
    lock = Lock.take(lock_path(folder, COMMAND))
    try:
        deadline = time.monotonic() + patience
        for path in sorted((folder / "locks").iterdir()):
            if path.name != COMMAND:
                _wait_for_end(path, deadline)
    except BaseException:
        lock.release()
        raise
    return lock


def _wait_for_end(path: Path, deadline: float) -> None:
    while True:
        try:
            Lock.take(path).release()
        except StillRunning:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK)
        else:
            return
