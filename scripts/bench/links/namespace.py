"""A network namespace that is there as long as somebody is in it or holds it open, and leaves nothing behind.

A namespace belongs to a thread, not to a process: work that is to be done inside one runs on a thread of its own, and
the sockets and processes it makes stay inside. A command is run inside by

    python -m scripts.bench.links.namespace FILE COMMAND ...

where FILE is the namespace's, as `Namespace.enter` says it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_OWN: Final = Path("/proc/thread-self/ns/net")


class LinksError(Exception):
    """Links cannot be emulated here; the message says what is missing."""


class Namespace:
    """A new network namespace."""

    def __init__(self) -> None:
        """Raises `LinksError` without the right to make one."""
        self._fd = _on_thread(_unshare)

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, or raises, inside. Sockets and processes that it makes are of this namespace."""

        def inside() -> T:
            _set(self._fd)
            return function()

        return _on_thread(inside)

    def enter(self) -> list[str]:
        """Words to put before a command that is to run inside. They hold while this process lives and holds it open."""
        return [sys.executable, "-m", __name__, f"/proc/{os.getpid()}/fd/{self._fd}"]

    def close(self) -> None:
        """Hold it open no longer."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _unshare() -> int:
    _check(_libc().unshare(_CLONE_NEWNET), "make a network namespace")
    return os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)


def _set(fd: int) -> None:
    _check(_libc().setns(fd, _CLONE_NEWNET), "enter a network namespace")


def _libc() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(None, use_errno=True)
    except OSError as error:
        raise LinksError(f"network namespaces need Linux: {error}") from error


def _check(result: int, what: str) -> None:
    if result:
        raise LinksError(f"cannot {what} ({os.strerror(ctypes.get_errno())}): this needs Linux and root")


def _on_thread(function: Callable[[], T]) -> T:
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    return outcome.result()


def main() -> None:
    """Become a command inside."""
    file, *command = sys.argv[1:]
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    _set(fd)
    os.execvp(command[0], command)  # noqa: S606 - without a shell is what is meant


if __name__ == "__main__":
    main()
