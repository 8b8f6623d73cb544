"""The roster: which hotkey holds which stage in a round, as a pure function of finalized chain state.

Nobody declares its own stage and nobody assigns one. Every node reads the same finalized blocks and computes the
same roster; its digest stands in every record. Round 0 begins at the first gathering block where enough valid
hotkeys are there (`gather`); from then on a roster is a recurrence over the one before (`advance`): who stays valid
keeps its stage, who does not is out, who comes later waits.

A hotkey is valid if it is registered, serves an axon, and its record decodes, names this run and is younger than its
own registration. Identity is the hotkey; a uid is looked up only when weights are set.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from subnet.metagraph import ChainState, Endpoint
from subnet.swarm.record import MAX_HAVE, ROSTER_DIGEST_BYTES, Record


@dataclass(frozen=True, slots=True)
class Candidate:
    """A neuron as the roster sees it."""

    hotkey: str
    endpoint: Endpoint
    record: Record


@dataclass(frozen=True)
class Roster:
    """Who holds which stage in `round`. `stages[s]` are the replicas of stage s in hotkey order."""

    round: int
    stages: tuple[tuple[str, ...], ...]
    waiting: tuple[str, ...]

    @cached_property
    def _stage_of(self) -> dict[str, int]:
        return {hotkey: stage for stage, replicas in enumerate(self.stages) for hotkey in replicas}

    def stage_of(self, hotkey: str) -> int | None:
        return self._stage_of.get(hotkey)

    @cached_property
    def members(self) -> frozenset[str]:
        return frozenset(self._stage_of)

    @cached_property
    def digest(self) -> bytes:
        """15 bytes over round, stages and waiting list, as records carry it."""
        text = ";".join([str(self.round), *(",".join(stage) for stage in self.stages), ",".join(self.waiting)])
        return hashlib.sha256(b"orion/roster/1" + text.encode()).digest()[:ROSTER_DIGEST_BYTES]


def records_of(state: ChainState) -> dict[str, Record | None]:
    """Every neuron's record by hotkey; None for those whose commitment is something else."""
    return {neuron.hotkey: Record.decode(neuron.record, neuron.shards) for neuron in state.neurons}


def candidates(state: ChainState, run: bytes, *, fresh_from: int = 0) -> dict[str, Candidate]:
    """The valid neurons of `state` for the run, by hotkey. A record older than `fresh_from` is no sign of life."""
    valid: dict[str, Candidate] = {}
    for neuron in state.neurons:
        record = Record.decode(neuron.record, neuron.shards)
        if (
            neuron.endpoint is not None
            and not ipaddress.ip_address(neuron.endpoint.ip).is_unspecified
            and record is not None
            and record.run == run
            and neuron.record_block is not None
            and neuron.record_block >= max(neuron.registered_at, fresh_from)
        ):
            valid[neuron.hotkey] = Candidate(neuron.hotkey, neuron.endpoint, record)
    return valid


def _order(hotkeys: Sequence[str], seed: bytes) -> list[str]:
    """By H(seed ‖ hotkey): an order that nobody chooses and everybody knows."""
    return sorted(hotkeys, key=lambda hotkey: hashlib.sha256(seed + hotkey.encode()).digest())


def gather(state: ChainState, run: bytes, *, stages: int, replicas: int) -> Roster | None:
    """Round 0's roster, or None while fewer than `stages * replicas` valid hotkeys are there.

    Hotkeys in the order of H(block hash ‖ hotkey) fill the stage with the fewest holders; the lowest stage breaks
    ties. All that are there at this block take part, up to the 64 replicas per stage that the have-bitmap holds.
    """
    valid = candidates(state, run)
    if len(valid) < stages * replicas:
        return None
    seed = bytes.fromhex(state.head.hash.removeprefix("0x"))
    order = _order(list(valid), seed)
    held: list[list[str]] = [[] for _ in range(stages)]
    for hotkey in order[: stages * MAX_HAVE]:
        min(held, key=len).append(hotkey)
    return Roster(0, tuple(tuple(sorted(stage)) for stage in held), tuple(order[stages * MAX_HAVE :]))


def advance(previous: Roster, state: ChainState, run: bytes, *, fresh_from: int) -> Roster:
    """R_r = f(R_{r-1}, state at the first block of round r): members stay while valid, newcomers wait in hash order.

    `fresh_from` is the first block of round r-1: who has put no record on chain since then is gone.
    """
    valid = candidates(state, run, fresh_from=fresh_from)
    stages = tuple(tuple(hotkey for hotkey in stage if hotkey in valid) for stage in previous.stages)
    kept = {hotkey for stage in stages for hotkey in stage}
    seed = bytes.fromhex(state.head.hash.removeprefix("0x"))
    waiting = tuple(_order([hotkey for hotkey in valid if hotkey not in kept], seed))
    return Roster(previous.round + 1, stages, waiting)
