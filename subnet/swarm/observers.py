"""Validators at work: who has a permit, and a record on chain that says it watches this run.

Miners push their window heads to them, their stakes weigh acknowledgements, and each replays its stake's part of the
audit budget. Whom those with most of the stake hold convicted has no place in the swarm.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from subnet.metagraph import ChainState
from subnet.swarm.record import Flags, Record, short_name


@dataclass(frozen=True, slots=True)
class Observer:
    """One validator at work."""

    hotkey: str
    stake: float
    record: Record
    record_block: int

    def committed(self, number: int) -> bytes | None:
        """What it committed to for round `number`; None if its record is of another."""
        return self.record.root if self.record.round == number else None


def observers(state: ChainState, run: bytes) -> dict[str, Observer]:
    """By hotkey, in the order of uids."""
    found = {}
    for neuron in state.neurons:
        record = Record.decode(neuron.record, neuron.shards)
        if neuron.validator_permit and record is not None and record.run == run and record.flags & Flags.OBSERVER:
            found[neuron.hotkey] = Observer(neuron.hotkey, neuron.stake, record, neuron.record_block or 0)
    return found


def shares(found: dict[str, Observer]) -> dict[str, float]:
    """Each one's part of the stake at work."""
    weights = stakes(found)
    return {hotkey: weight / sum(weights.values()) for hotkey, weight in weights.items()}


def stakes(found: dict[str, Observer]) -> dict[str, float]:
    """What each one's word weighs. With no stake among them each weighs the same."""
    whole = sum(observer.stake for observer in found.values())
    return {hotkey: observer.stake if whole > 0 else 1.0 for hotkey, observer in found.items()}


def condemned(state: ChainState, run: bytes, *, fresh_from: int) -> frozenset[str]:
    """Hotkeys that validators with more than half of the stake at work hold convicted. Whose record is older than
    `fresh_from` has no say."""
    fresh = {key: one for key, one in observers(state, run).items() if one.record_block >= fresh_from}
    weights, votes = stakes(fresh), defaultdict[bytes, list[float]](list)
    for key, one in fresh.items():
        for name in one.record.convicts:
            votes[name].append(weights[key])
    # Exact sums: everybody must count alike, and the built-in one rounds otherwise from Python 3.12 on.
    whole = math.fsum(weights.values())
    named = {name for name, stake in votes.items() if 2 * math.fsum(stake) > whole}
    return frozenset(neuron.hotkey for neuron in state.neurons if named and short_name(neuron.hotkey) in named)
