"""`--adversary KIND[:uid]`: nodes of a local swarm that are started as cheaters.

Their program is the checkout's `tests.adversaries`, which no installation has: it is found by name when it is asked
for. Without a uid every miner is started with that program and the first one that fits, once a roster says who holds
what, cheats; all others are what they would be without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from scripts.tally import Tally
from subnet.commandline import UsageError

PROGRAM = "tests.adversaries.program"
RULES = "tests.adversaries.places"
FIRST_UID = 1
"""Of the first miner of a local swarm: uid 0 is the owner's."""
_OPTION = re.compile(r"([^:]+)(?::(\d+))?")


class AdversaryOptionError(UsageError):
    """An adversary that cannot be started: one line with the value and the remedy."""


class Program(Protocol):
    """What is needed of the adversaries' program."""

    def run(self, argv: list[str]) -> int:
        """Become the node."""


class Rules(Protocol):
    """What is needed of the adversaries' rules. Both raise `ValueError`, one line with what fits."""

    def role_of(self, kind: str) -> str:
        """Miner or validator."""

    def check(self, kinds: Sequence[str], *, stages: int, replicas: int, gathers: bool, named: bool) -> None:
        """Whether miners of these kinds can play in a swarm of that shape."""


@dataclass(frozen=True, slots=True)
class Adversary:
    """One option."""

    kind: str
    uid: int | None

    @classmethod
    def parse(cls, text: str) -> Adversary:
        """Raises `AdversaryOptionError`."""
        found = _OPTION.fullmatch(text)
        if found is None:
            raise AdversaryOptionError(f"--adversary {text!r} is not of the form noise or noise:3")
        return cls(found[1], None if found[2] is None else int(found[2]))

    @property
    def text(self) -> str:
        """What `parse` reads."""
        return self.kind if self.uid is None else f"{self.kind}:{self.uid}"


def program() -> Program:
    """Raises `AdversaryOptionError` where the checkout's tests are not there."""
    return cast("Program", _module(PROGRAM))


def _module(name: str) -> object:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise AdversaryOptionError(f"--adversary needs {name}, which is not installed: run it from a checkout")
    return importlib.import_module(name)


@dataclass(frozen=True, slots=True)
class Casting:
    """By node: the arguments that its program takes before those of a neuron. Other nodes are what they always are."""

    arguments: dict[str, list[str]]

    @classmethod
    def of(
        cls, adversaries: Sequence[Adversary], *, stages: int, replicas: int, validators: int, gathers: bool
    ) -> Casting:
        """Of a swarm of that shape; `gathers` if its merges have no holders. Raises `AdversaryOptionError`."""
        if not adversaries:
            return cls({})
        rules, miners = cast("Rules", _module(RULES)), stages * replicas
        arguments: dict[str, list[str]] = {}
        unnamed: list[str] = []
        try:
            roles = [rules.role_of(adversary.kind) for adversary in adversaries]
            for named in (False, True):
                playing = [
                    adversary.kind
                    for adversary, role in zip(adversaries, roles, strict=True)
                    if role == "miner" and (adversary.uid is not None) == named
                ]
                rules.check(playing, stages=stages, replicas=replicas, gathers=gathers, named=named)
        except ValueError as error:
            raise AdversaryOptionError(f"--adversary: {error}") from error
        for adversary, role in zip(adversaries, roles, strict=True):
            if role == "validator" and validators < 2:
                raise AdversaryOptionError(
                    f"--adversary {adversary.text} needs an honest validator: raise --validators"
                )
            if role == "miner" and adversary.uid is None:
                unnamed.append(adversary.kind)
                continue
            name = _node(adversary, role, miners=miners, validators=validators)
            if name in arguments:
                raise AdversaryOptionError(f"--adversary {adversary.text}: {name} is one already: name another uid")
            arguments[name] = [adversary.kind]
        if unnamed and any(name.startswith("miner") for name in arguments):
            raise AdversaryOptionError(f"--adversary {unnamed[0]} names no uid and others do: give all a uid, or none")
        if unnamed:
            arguments |= {f"miner-{index}": [",".join(unnamed), "--first"] for index in range(miners)}
        return cls(arguments)


def _node(adversary: Adversary, role: str, *, miners: int, validators: int) -> str:
    count, first = (miners, FIRST_UID) if role == "miner" else (validators, FIRST_UID + miners)
    uid = first if adversary.uid is None else adversary.uid
    if not first <= uid < first + count:
        uids = f"{first} to {first + count - 1}" if count > 1 else str(first)
        raise AdversaryOptionError(f"--adversary {adversary.text}: uid {uid} is no {role}, they have {uids}")
    return f"{role}-{uid - first}"


def outcome(tally: Tally) -> list[dict[str, object]]:
    """Who cheated, when it was convicted and why, and its weight on chain by round (mean over honest validators)."""
    found: list[dict[str, object]] = []
    rounds: defaultdict[int, list[dict[int, float]]] = defaultdict(list)
    for number, name, weights in tally.weights_history:
        if name not in tally.adversaries:
            rounds[number].append(weights)
    for name, kind in sorted(tally.adversaries.items()):
        hotkey = tally.hotkeys.get(name, "")
        scored = tally.scores.get(hotkey)
        uid = scored.uid if scored is not None else None
        first = min((one for one in tally.convictions if one.hotkey == hotkey), key=lambda one: one.round, default=None)
        found.append(
            {
                "kind": kind,
                "node": name,
                "hotkey": hotkey,
                "uid": uid,
                "stage": scored.stage if scored is not None else None,
                "convicted_round": first.round if first is not None else None,
                "reason": first.reason if first is not None else None,
                "weights": {
                    number: round(sum(row.get(uid, 0.0) for row in rows) / len(rows), 5)
                    for number, rows in sorted(rounds.items())
                    if uid is not None
                },
            }
        )
    return found


def lines(adversaries: Iterable[dict[str, object]]) -> list[str]:
    """`outcome` for a person."""
    found = []
    for one in adversaries:
        weights = one["weights"]
        assert isinstance(weights, dict)  # noqa: S101 - made by outcome()
        scored = "" if one["uid"] is None else f", uid {one['uid']}, stage {one['stage']}"
        convicted = one["convicted_round"] is not None
        fate = f"convicted in round {one['convicted_round']}, {one['reason']}" if convicted else "not convicted"
        by_round = ", ".join(f"{weight:.4f}" for weight in weights.values())
        paid = f"; weight by round {by_round}" if by_round else ""
        found.append(f"adversary {one['kind']} ({one['node']}{scored}) {fate}{paid}")
    return found
