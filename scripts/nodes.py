"""Many nodes on one machine: forked from one server that has imported everything once.

Spawning eleven interpreters that each import torch takes longer than the training they do. Here a fork server imports
the neurons once, including what a first training step imports lazily, and every node is a fork of it that runs
`python -m neurons.<role>`'s own main with the same flags. A node whose parent disappears stops by itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, parent_process
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess, SpawnProcess
from pathlib import Path

from neurons.settings import settings_in
from scripts.adversaries import program
from scripts.locks import Lock

_CONTEXT = multiprocessing.get_context("forkserver")
_SPAWN = multiprocessing.get_context("spawn")


def start_server() -> None:
    """Begin importing in the background; returns at once.

    The server is started deaf to SIGINT: Ctrl-C reaches the whole process group, and it is the command's to act on.
    """
    _CONTEXT.set_forkserver_preload(["scripts.preload"])
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, previous)


def wait_for_server() -> None:
    """Until the fork server has imported everything: a node then starts at once."""
    process = _CONTEXT.Process(target=_nothing)
    process.start()
    process.join()


def _nothing() -> None:
    """What a process does that is only waited for."""


def stop_server() -> None:
    """End the fork server, also in the middle of its imports, so that nothing outlives the command."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start_chain(flags: Sequence[str], *, log: Path, lock: Path) -> NodeProcess:
    """Start the development chain; it needs no torch and does not wait for the fork server."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _SPAWN.Process(target=_run, args=("chain", list(flags), str(log), str(lock)), name="chain")
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, previous)
    return NodeProcess("chain", "chain", process, log)


LAST_BYTES = 16 * 1024
"""Of a log, in which a node's last error is looked for."""


@dataclass(frozen=True, slots=True)
class NodeProcess:
    name: str
    role: str
    process: ForkServerProcess | SpawnProcess
    log: Path

    @property
    def finished(self) -> bool:
        return self.process.exitcode is not None

    @property
    def complaint(self) -> str:
        """Why it ended: the last error in its log, or where that is."""
        with self.log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - LAST_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
        errors = [line.partition(" ERROR ")[2] for line in lines if " ERROR " in line]
        return errors[-1].partition(" ")[2] if errors else f"see {self.log}"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.process.pid is not None and not self.finished:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


def start_node(name: str, role: str, flags: Sequence[str], *, log: Path, lock: Path) -> NodeProcess:
    """Fork a node. Its standard output and error go to `log`; it holds `lock` for as long as it lives."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _CONTEXT.Process(target=_run, args=(role, list(flags), str(log), str(lock)), name=name)
    process.start()
    return NodeProcess(name, role, process, log)


def stop_nodes(nodes: Sequence[NodeProcess], *, patience: float) -> None:
    """Ask every node to stop, wait `patience` seconds in all, then kill what is left."""
    for node in nodes:
        if node.process.is_alive():
            node.process.terminate()
            node.signal(signal.SIGCONT)  # a frozen one hears nothing else
    deadline = threading.Event()
    timer = threading.Timer(patience, deadline.set)
    timer.start()
    while not deadline.is_set() and any(node.process.is_alive() for node in nodes):
        wait([node.process.sentinel for node in nodes if node.process.is_alive()], timeout=0.1)
    timer.cancel()
    for node in nodes:
        if node.process.is_alive():
            node.process.kill()
            node.process.join()


def _run(role: str, flags: list[str], log: str, lock: str) -> None:
    """In the forked child: become the node."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    held = Lock.take(Path(lock))
    for name in settings_in(os.environ):
        del os.environ[name]  # of a neuron that its user may run elsewhere; the flags say what this one is
    threading.Thread(target=_follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if role == "chain":
        os.setsid()  # it listens to SIGINT; Ctrl-C must not end it before its nodes
    try:
        status = _entry(role)(flags)
    finally:
        held.release()
    sys.exit(status)


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _entry(role: str) -> Callable[[list[str]], int]:
    if role == "chain":
        from subnet.localchain.__main__ import main as chain  # noqa: PLC0415 - only the chain needs it

        return chain
    if role == "miner":
        from neurons.miner import run as miner  # noqa: PLC0415 - imported by the fork server already

        return miner
    if role == "adversary":
        return program().run
    from neurons.validator import run as validator  # noqa: PLC0415 - imported by the fork server already

    return validator
