"""The processes of a local swarm, and what is done to them on demand.

Every intervention is an event in the run's log `localnet.jsonl`, written before it is done: a view, a summary and a
resumed run learn of it there and nowhere else.
"""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from neurons.telemetry import Intervention, Telemetry
from scripts.adversaries import Casting
from scripts.faults import FaultPlan, Strike
from scripts.locks import COMMAND, lock_path
from scripts.nodes import NodeProcess, start_node
from scripts.tally import GONE, Tally
from scripts.thief import Thief

SIGNALS = {
    "kill": signal.SIGKILL,
    "steal": signal.SIGKILL,
    "leave": signal.SIGUSR1,
    "freeze": signal.SIGSTOP,
    "thaw": signal.SIGCONT,
}
DONE = {
    "kill": "killed",
    "steal": "killed, and took the port of,",
    "fill": "filled the disk of",
    "drain": "made room on the disk of",
    "leave": "asked to leave:",
    "freeze": "froze",
    "thaw": "woke",
    "join": "started",
    "restart": "started again:",
}
Named = tuple[str, str]
"""A node's name and role."""


class Churn:
    """Starts nodes, and does to them what a plan says."""

    def __init__(
        self,
        out: Path,
        plan: FaultPlan,
        *,
        flags: Callable[[str], list[str]],
        now: Callable[[], float],
        casting: Casting | None = None,
    ) -> None:
        """`flags` gives the flags of a node by its name, `now` seconds since the epoch, `casting` who cheats."""
        self._out = out
        self._plan = plan
        self._flags = flags
        self._casting = casting or Casting({})
        self._telemetry = Telemetry.open(out / "events" / f"{COMMAND}.jsonl", now=now)
        self._nodes: dict[str, NodeProcess] = {}
        self._thieves: dict[str, Thief] = {}
        self._killed: set[str] = set()
        """Nodes that were told to end a moment ago: their processes may be there still."""

    @property
    def nodes(self) -> list[NodeProcess]:
        """The last process of every node that was started."""
        return list(self._nodes.values())

    @property
    def returning(self) -> bool:
        """Whether a node that has ended is still to be started again."""
        return self._plan.returning

    @property
    def left(self) -> list[str]:
        """Options whose moment has not come."""
        return self._plan.left

    def start(self, name: str, role: str) -> None:
        log = self._out / "logs" / f"{name}.log"
        cheat = self._casting.arguments.get(name, [])
        flags = [*cheat, *self._flags(name)]
        self._killed.discard(name)
        self._nodes[name] = start_node(
            name, "adversary" if cheat else role, flags, log=log, lock=lock_path(self._out, name)
        )

    def resumed(self, number: int) -> None:
        """Note that the run goes on after everything had died, in round `number`."""
        self._telemetry.emit(Intervention("resume", "", number, ""))

    def strike(self, tally: Tally, *, now: float) -> list[str]:
        """Do what is due at `now`; lines for a person."""
        return [self._do(strike, tally) for strike in self._plan.due(tally, now=now)]

    def _do(self, strike: Strike, tally: Tally) -> str:
        name, action = strike.node, strike.action
        node = self._nodes.get(name) if name is not None else None
        if name is None or not self._fits(action, node):
            return f"{strike.fault or f'{action} {name}'}: there is no such node in round {tally.round}"
        self._telemetry.emit(Intervention(action, name, tally.round, strike.fault))
        if node is None or action == "restart":
            if node is not None:
                node.process.join()  # killed, and perhaps not gone yet: its successor takes over its lock
            self._give_back(name)
            self.start(name, "miner")
        elif action in {"fill", "drain"}:
            _let_write(node, action == "drain")
        else:
            node.signal(SIGNALS[action])
            self._killed |= {name} if action in {"kill", "steal"} else set()
        if action == "steal" and node is not None:
            self._steal(node, tally)
        return f"{DONE[action]} {name} in round {tally.round}, as asked"

    def _steal(self, node: NodeProcess, tally: Tally) -> None:
        node.process.join()
        host, _, port = tally.miner(node.name).endpoint.removeprefix("http://").rpartition(":")
        with contextlib.suppress(OSError):  # somebody else was quicker: stolen it is in any case
            self._thieves[node.name] = Thief(host, int(port))

    def _give_back(self, name: str) -> None:
        thief = self._thieves.pop(name, None)
        if thief is not None:
            thief.close()

    def _fits(self, action: str, node: NodeProcess | None) -> bool:
        if action == "join":
            return node is None
        if action == "restart":
            return node is not None
        return node is not None and not node.finished and node.name not in self._killed

    def close(self) -> None:
        for name in list(self._thieves):
            self._give_back(name)
        self._telemetry.close()


def _let_write(node: NodeProcess, may: bool) -> None:
    """Let a process write to files again, or no more: to it that is a full disk."""
    if node.process.pid is not None and not node.finished:
        with contextlib.suppress(ProcessLookupError):
            _, most = resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (most if may else 0, most))


def to_start(first: Sequence[Named], joiners: Sequence[Named], tally: Tally) -> list[Named]:
    """Which nodes of a run have to run after everything died.

    Those of the `first` roster, and of the `joiners` those that had joined; but none that was done, had left, or was
    killed for good.
    """
    over = {name for name, miner in tally.miners.items() if miner.state in GONE and name not in tally.returning}
    present = [*first, *(joiner for joiner in joiners if joiner[0] in tally.miners)]
    return [(name, role) for name, role in present if name not in over | tally.finished]
