"""What goes wrong in a simulation, and when: a schedule, drawn from the seed, that can be written down and cut short.

Faults of one node are only drawn while its stage keeps a replica to which nothing happens, or while most of the stake
is at validators to which nothing happens: what goes beyond is not promised to be survived (docs/reliability.md). The
last part of a run is quiet, in which everything has to come right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

import numpy as np


class Kind(StrEnum):
    """What can happen. Those of a node first, then those of the net, then those of the chain."""

    KILL = "kill"
    """SIGKILL; started again later, with its disk."""
    WIPE = "wipe"
    """The same, with an empty disk."""
    DARK = "dark"
    """The machine is without current: it says nothing, and comes back with its disk."""
    PAUSE = "pause"
    """SIGSTOP, then SIGCONT."""
    SLOW = "slow"
    """Its compute takes `amount` times as long."""
    SKEW = "skew"
    """Its clock is `amount` seconds ahead."""
    LEAVE = "leave"
    """It is told to leave, and started again later."""
    FULL = "full"
    """Its disk takes nothing more: of real processes only (`orion localnet --chaos`)."""
    ISOLATE = "isolate"
    """Nobody reaches it and it reaches nobody; the chain it does."""
    MUTE = "mute"
    """One way: what it sends reaches nobody."""
    DEAF = "deaf"
    """The other way: nothing reaches it."""
    SPLIT = "split"
    """The nodes named reach each other and nobody else."""
    LOSSY = "lossy"
    """It loses a share `amount` of its segments."""
    NARROW = "narrow"
    """Its line has `amount` of its bandwidth."""
    FAR = "far"
    """Its line has `amount` seconds more of latency."""
    REPEAT = "repeat"
    """Somebody on its way sends a share `amount` of the requests to it again, some of them before the first comes."""
    CUT_OFF = "cut-off"
    """Its chain endpoint says nothing."""
    STALL = "stall"
    """The chain makes no blocks."""
    LATE = "late"
    """Extrinsics take up to `amount` blocks to reach the author."""


HARD: Final = (Kind.KILL, Kind.WIPE, Kind.DARK, Kind.PAUSE, Kind.ISOLATE, Kind.MUTE, Kind.DEAF, Kind.CUT_OFF)
"""What takes a node away for a while."""
DOWN: Final = frozenset({Kind.KILL, Kind.WIPE, Kind.DARK})
"""After which a process is started again."""
PARTITIONS: Final = frozenset({Kind.ISOLATE, Kind.MUTE, Kind.DEAF, Kind.SPLIT})
"""In which both sides may go on with the same work."""
SOFT: Final = (Kind.SLOW, Kind.SKEW, Kind.LOSSY, Kind.NARROW, Kind.FAR, Kind.REPEAT)
GLOBAL: Final = (Kind.STALL, Kind.LATE)
HARD_SECONDS: Final = (2.0, 150.0)
SOFT_SECONDS: Final = (20.0, 300.0)
STALL_SECONDS: Final = (10.0, 60.0)
LEAVE_SECONDS: Final = (60.0, 600.0)
QUIET_FROM: Final = 0.65
"""Share of a run after which nothing more goes wrong."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One of them: from second `at` on, for so many `seconds`."""

    kind: Kind
    at: float
    seconds: float
    nodes: tuple[str, ...] = ()
    amount: float = 0.0

    @property
    def ends(self) -> float:
        return self.at + self.seconds

    def row(self) -> dict[str, object]:
        return asdict(self) | {"kind": self.kind.value, "nodes": list(self.nodes)}

    @classmethod
    def of(cls, row: Mapping[str, object]) -> Fault:
        fields = dict(row)
        return cls(
            kind=Kind(str(fields["kind"])),
            at=float(str(fields["at"])),
            seconds=float(str(fields["seconds"])),
            nodes=tuple(str(name) for name in fields["nodes"]),  # type: ignore[attr-defined]
            amount=float(str(fields["amount"])),
        )

    def __str__(self) -> str:
        whom = ",".join(self.nodes) or "all"
        amount = f" {self.amount:g}" if self.amount else ""
        return f"{self.at:7.1f} s  {self.kind.value:<8} {whom}{amount} for {self.seconds:.1f} s"


def draw(
    generator: np.random.Generator,
    groups: Sequence[Sequence[str]],
    newcomers: Sequence[str] = (),
    *,
    begin: float,
    end: float,
) -> list[Fault]:
    """The faults of one run between two moments, in order. `groups` are the nodes of each stage, and the validators;
    on `newcomers` nothing depends."""
    faults: list[Fault] = []
    last = begin + QUIET_FROM * (end - begin)
    rate = generator.uniform(0.2, 2.0)  # some runs are calm, others are not
    targets = [*groups, newcomers] if newcomers else groups
    for _ in range(int(generator.poisson(rate * (last - begin) / 60))):
        found = _one(generator, targets, validators=len(groups) - 1, begin=begin, last=last)
        if _survivable(faults, found, groups):
            faults.append(found)
    return sorted(faults, key=lambda fault: (fault.at, fault.kind.value, fault.nodes))


def _one(
    generator: np.random.Generator, groups: Sequence[Sequence[str]], *, validators: int, begin: float, last: float
) -> Fault:
    at = round(float(generator.uniform(begin, last)), 3)
    pick = float(generator.random())

    def lasting(span: tuple[float, float]) -> float:
        least, most = span
        seconds = least * math.exp(math.log(most / least) * float(generator.random()))
        return round(min(seconds, last - at), 3)

    number = int(generator.integers(len(groups)))
    group = groups[number]
    node = group[int(generator.integers(len(group)))]
    if pick < 0.05 and number != validators:
        return Fault(Kind.LEAVE, at, lasting(LEAVE_SECONDS), (node,))
    if pick < 0.55:
        return Fault(HARD[int(generator.integers(len(HARD)))], at, lasting(HARD_SECONDS), (node,))
    if pick < 0.85:
        kind = SOFT[int(generator.integers(len(SOFT)))]
        return Fault(kind, at, lasting(SOFT_SECONDS), (node,), round(_amount(generator, kind), 4))
    if pick < 0.93:
        chosen = tuple(names[int(generator.integers(len(names)))] for names in groups if generator.random() < 0.6)
        return Fault(Kind.SPLIT, at, lasting(HARD_SECONDS), chosen or (node,))
    kind = GLOBAL[int(generator.integers(len(GLOBAL)))]
    return Fault(kind, at, lasting(STALL_SECONDS), (), 0.0 if kind is Kind.STALL else 3.0)


def _amount(generator: np.random.Generator, kind: Kind) -> float:
    ranges = {
        Kind.SLOW: (1.5, 6.0),
        Kind.SKEW: (-1.5, 1.5),
        Kind.LOSSY: (0.02, 0.3),
        Kind.NARROW: (0.002, 0.2),
        Kind.FAR: (0.05, 1.0),
        Kind.REPEAT: (0.1, 1.0),
    }
    return float(generator.uniform(*ranges[kind]))


MERGE_SECONDS: Final = 180.0
"""How long a replica may take after a fault until it counts again."""
AWAY: Final = frozenset({*HARD, Kind.SPLIT, Kind.LEAVE})


def _back(fault: Fault) -> float:
    """From when on its nodes count again. Who left comes back as somebody new, to whichever stage."""
    return math.inf if fault.kind is Kind.LEAVE else fault.ends + MERGE_SECONDS


def _survivable(faults: Sequence[Fault], found: Fault, groups: Sequence[Sequence[str]]) -> bool:
    """Whether every group keeps a node to which nothing of the kind happens about that time; of validators, most."""
    if found.kind not in AWAY:
        return True
    away = {
        name
        for fault in (*faults, found)
        if fault.kind in AWAY and fault.at < _back(found) and found.at < _back(fault)
        for name in fault.nodes
    }
    *stages, validators = groups
    return all(not away.issuperset(names) for names in stages) and 2 * len(away & set(validators)) < len(validators)
