"""Who plays an adversary in a roster: a pure function, so that each process and whoever watches them choose alike."""

from __future__ import annotations

from collections.abc import Sequence

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
    return role is not Role.VALIDATOR


def choose(kind: Kind, stages: Stages) -> tuple[str, ...]:
    """The hotkeys that play it where none is named: two siblings, or the first replica of one stage.

    Of the stages that fit it is the last, because there all that a replica sends can be replayed; whoever forges
    receipts needs a neighbour behind it. Raises `AdversaryError` where siblings are needed and there are none.
    """
    role = PROFILES[kind].role
    fitting = [stage for stage in range(len(stages)) if fits(role, stage, len(stages))]
    if role is Role.NEIGHBOURS:
        fitting = fitting[:-1]
    needed = 2 if role is Role.SIBLINGS else 1
    for stage in reversed(fitting):
        if len(stages[stage]) >= needed:
            return tuple(stages[stage][:needed])
    raise AdversaryError(f"'{kind}' needs {role.value}, and {len(stages)} stages have none: add stages or replicas")


def accomplice(hotkey: str, stages: Stages) -> str | None:
    """Who signs for what `hotkey` invents: the first replica of the stage behind it, None at the last."""
    stage = next((stage for stage, replicas in enumerate(stages) if hotkey in replicas), len(stages))
    return stages[stage + 1][0] if stage + 1 < len(stages) else None
