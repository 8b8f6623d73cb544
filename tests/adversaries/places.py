"""Who plays an adversary in a roster: pure functions, so that each process and whoever started them choose alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tests.adversaries.kinds import PROFILES, AdversaryError, Kind, Role

Stages = Sequence[Sequence[str]]
"""Hotkeys by stage, in hotkey order."""


def fits(role: Role, stage: int, stages: int) -> bool:
    """Whether a replica of `stage` can play it."""
    if role is Role.HEAD:
        return stage == 0
    if role is Role.TAIL:
        return stage == stages - 1
    if role is Role.NOT_HEAD:
        return stage > 0
    if role is Role.NEIGHBOURS:
        return stage < stages - 1
    return role is not Role.VALIDATOR


def choose(kinds: Sequence[Kind], stages: Stages) -> dict[str, Kind]:
    """Who plays what where nobody is named: by kind two siblings, or one replica, that play nothing else.

    Of the stages that fit it is the last: there all that a replica sends can be replayed. Raises `AdversaryError` where
    nobody is left.
    """
    chosen: dict[str, Kind] = {}
    for kind in kinds:
        chosen |= dict.fromkeys(_free(kind, stages, chosen), kind)
    return chosen


def _free(kind: Kind, stages: Stages, taken: Collection[str]) -> list[str]:
    role = PROFILES[kind].role
    needed = 2 if role is Role.SIBLINGS else 1
    for stage in reversed(range(len(stages))):
        free = [hotkey for hotkey in stages[stage] if hotkey not in taken]
        if fits(role, stage, len(stages)) and len(free) >= needed:
            return free[:needed]
    raise AdversaryError(f"'{kind}' needs a {role.value}, and none is left in {len(stages)} stages: add replicas")


def accomplice(hotkey: str, stages: Stages) -> str | None:
    """Who signs for what `hotkey` invents: the first replica of the stage behind it, None at the last."""
    stage = next((stage for stage, replicas in enumerate(stages) if hotkey in replicas), len(stages))
    return stages[stage + 1][0] if stage + 1 < len(stages) else None


HOLDERS = {Kind.LYING_HOLDER, Kind.COLLUDING_HOLDERS}


def role_of(kind: str) -> str:
    """Which program a kind is: miner or validator. Raises `AdversaryError`, which names the nearest kind."""
    return "validator" if PROFILES[Kind.parse(kind)].role is Role.VALIDATOR else "miner"


def check(kinds: Sequence[str], *, stages: int, replicas: int, gathers: bool, named: bool) -> None:
    """Whether miners of these kinds can play in a swarm of that shape; `gathers` if its merges have no holders.

    `named` are those whose uid is given. Raises `AdversaryError`.
    """
    known = [Kind.parse(kind) for kind in kinds]
    for kind in known:
        if gathers and kind in HOLDERS:
            raise AdversaryError(f"'{kind}' lies about merged shards, and this codec has none: give --codec int8")
        if named and PROFILES[kind].role is Role.SIBLINGS:
            raise AdversaryError(f"'{kind}' is a pair of siblings, who are known with the roster: leave out the uid")
    choose(known, [[f"{stage}/{index}" for index in range(replicas)] for stage in range(stages)])
