"""Churn on demand: what happens to which node of a local swarm, and when. One grammar for all of it.

--kill     miner:3@round1            kill -9 of miner-3 in the middle of round 1
--kill     stage:2@round1+0.95       the same for one replica of stage 2, whoever holds it, 95 % into the round
--restart  miner:3@round1:5          kill -9, started again after 5 seconds
--freeze   miner:3@round1:5          stopped dead for 5 seconds (SIGSTOP, SIGCONT)
--fill     miner:3@round1:5          writes nothing more for 5 seconds, as on a full disk (RLIMIT_FSIZE)
--steal    miner:3@round1:5          kill -9, and somebody else answers on its port; started again after 5 seconds
--leave    miner:3@round1            leaves cleanly at the end of its round (SIGUSR1)
--join     1@round2                  one miner more

Seconds are half a round by default. The place in the round is the middle by default.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from scripts.tally import GONE, Tally
from subnet.commandline import UsageError

ACTIONS = ("kill", "leave", "freeze", "join", "restart", "fill", "steal")
LASTING = ("freeze", "restart", "fill", "steal")
UNDONE = {"freeze": "thaw", "restart": "restart", "fill": "drain", "steal": "restart"}
"""What ends one that lasts."""
MIDDLE = 0.4
"""Fraction of a round; training, without overlap, ends well before the round does."""
_WHEN = r"@round(\d{1,9})(?:\+(0(?:\.\d{1,6})?|0?\.\d{1,6}|1(?:\.0)?))?"
_NODE = re.compile(r"(miner|stage):(\d{1,9})" + _WHEN + r"(?::(\d{1,6}(?:\.\d{1,3})?))?")
_JOIN = re.compile(r"(\d{1,9})" + _WHEN)


class FaultError(UsageError):
    """A fault that cannot be read or cannot come: one line with the value and the form it must have."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One option: what to do, to a miner by its number or to one replica of a stage, when.

    For `join`, `kind` is "count" and `number` how many miners; `FaultPlan` makes each of them one of kind "miner".
    """

    action: str
    kind: str
    number: int
    round: int
    fraction: float = MIDDLE
    seconds: float | None = None
    """How long it lasts; None is half a round."""

    @classmethod
    def parse(cls, action: str, text: str) -> Fault:
        """`text` as given to `--action`. Raises `FaultError` naming the form."""
        if action == "join":
            found = _JOIN.fullmatch(text)
            if found is None or int(found[1]) < 1:
                raise FaultError(f"--join {text!r} is not of the form 1@round2 or 1@round2+0.9")
            return cls(action, "count", int(found[1]), int(found[2]), _fraction(found[3]))
        found = _NODE.fullmatch(text)
        if found is None:
            form = "miner:3@round1, stage:2@round1 or miner:3@round1+0.9"
            more = " with :SECONDS at the end if wanted" if action in LASTING else ""
            raise FaultError(f"--{action} {text!r} is not of the form {form}{more}")
        if found[5] is not None and action not in LASTING:
            raise FaultError(
                f"--{action} {text!r} names seconds, which only --{', --'.join(LASTING)} take: leave them out"
            )
        seconds = None if found[5] is None else float(found[5])
        return cls(action, found[1], int(found[2]), int(found[3]), _fraction(found[4]), seconds)

    @property
    def text(self) -> str:
        """What `parse` reads."""
        who = str(self.number) if self.kind == "count" else f"{self.kind}:{self.number}"
        place = "" if self.fraction == MIDDLE else f"+{self.fraction:g}"
        lasting = "" if self.seconds is None else f":{self.seconds:g}"
        return f"{who}@round{self.round}{place}{lasting}"

    @property
    def option(self) -> str:
        return f"--{self.action} {self.text}"


def _fraction(text: str | None) -> float:
    return MIDDLE if text is None else float(text)


def parse_faults(given: Mapping[str, Iterable[str]]) -> tuple[Fault, ...]:
    """The faults in `given`: texts by action."""
    return tuple(Fault.parse(action, text) for action in ACTIONS for text in given.get(action, ()))


def joiners(faults: Iterable[Fault]) -> int:
    """Miners that come later."""
    return sum(fault.number for fault in faults if fault.action == "join")


def check_faults(faults: Iterable[Fault], *, stages: int, miners: int, rounds: int) -> None:
    """Raises `FaultError` for a fault that can never come. `miners` counts those that join."""
    for fault in faults:
        if fault.round >= rounds:
            raise FaultError(f"{fault.option} is after the last round, {rounds - 1}: name an earlier one")
        if fault.kind == "miner" and fault.number >= miners:
            raise FaultError(f"{fault.option}: the last miner is {miners - 1}, those that join counted")
        if fault.kind == "stage" and fault.number >= stages:
            raise FaultError(f"{fault.option}: the last stage is {stages - 1}")


@dataclass(frozen=True, slots=True)
class Strike:
    """One thing to do now.

    action: kill, leave, freeze, thaw, fill, drain, steal, join or restart. node: None when nobody fits the fault any
    more. fault: the option, "" for what follows from it later.
    """

    action: str
    node: str | None
    fault: str


@dataclass(frozen=True, slots=True)
class _Later:
    at: float
    action: str
    node: str


class FaultPlan:
    """Faults that are still to come. `due` hands each out once, at its place in its round.

    first_joiner: number of the first miner that joins later. done: options that an earlier life of the run has
    handed out already, with how often (a join once for each of its miners).
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        *,
        round_seconds: float,
        first_joiner: int = 0,
        done: Mapping[str, int] | None = None,
    ) -> None:
        self._round_seconds = round_seconds
        self._left: list[tuple[Fault, str]] = []
        self._later: list[_Later] = []
        self._began: dict[int, float] = {}
        self._taken: set[str] = set()
        past = Counter(done or {})
        number = first_joiner
        for fault in faults:
            singles = [fault]
            if fault.action == "join":
                singles = [replace(fault, kind="miner", number=number + index) for index in range(fault.number)]
                number += fault.number
            for single in singles:
                if past[fault.option]:
                    past[fault.option] -= 1
                else:
                    self._left.append((single, fault.option))

    @property
    def left(self) -> list[str]:
        """Options whose moment has not come."""
        return [option for _, option in self._left]

    @property
    def returning(self) -> bool:
        """Whether a killed miner is still to be started again."""
        return any(later.action == "restart" for later in self._later)

    def due(self, tally: Tally, *, now: float) -> list[Strike]:
        """What to do at time `now` (seconds, any clock that goes forward)."""
        self._began.setdefault(tally.round, now)
        strikes = [Strike(later.action, later.node, "") for later in self._later if now >= later.at]
        self._later = [later for later in self._later if now < later.at]
        for strike in strikes:
            if strike.action == "restart" and strike.node is not None:
                self._taken.discard(strike.node)
        ripe = [entry for entry in self._left if self._is_ripe(entry[0], now)]
        self._left = [entry for entry in self._left if entry not in ripe]
        return strikes + [self._strike(fault, option, tally, now) for fault, option in ripe]

    def _is_ripe(self, fault: Fault, now: float) -> bool:
        began = self._began.get(fault.round)
        return began is not None and now - began > fault.fraction * self._round_seconds

    def _strike(self, fault: Fault, option: str, tally: Tally, now: float) -> Strike:
        node = self._target(fault, tally)
        if node is not None:
            seconds = self._round_seconds / 2 if fault.seconds is None else fault.seconds
            if fault.action in UNDONE:
                self._later.append(_Later(now + seconds, UNDONE[fault.action], node))
            if fault.action in {"kill", "leave", "restart", "steal"}:
                self._taken.add(node)
        return Strike("kill" if fault.action == "restart" else fault.action, node, option)

    def _target(self, fault: Fault, tally: Tally) -> str | None:
        """The node's name, None while nobody fits."""
        if fault.kind == "miner":
            return f"miner-{fault.number}"
        there = (m.name for m in tally.miners.values() if m.stage == fault.number and m.state not in GONE)
        return min((name for name in there if name not in self._taken), default=None)
