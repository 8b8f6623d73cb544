"""The roster: who stands where in a round, as a pure function of finalized chain state.

Nobody declares its own stage and nobody assigns one. Every node reads the same finalized blocks and computes the same
roster; its digest stands in every record. Round 0 begins at the first gathering block where enough valid hotkeys are
there (`gather`); from then on a roster is a recurrence over the one before (`subnet.swarm.membership`).

A hotkey is valid if it is registered, serves an axon, and its record decodes, names this run, wants a stage and is
younger than its own registration. Identity is the hotkey; a uid is looked up only when weights are set.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from subnet.metagraph import ChainState, Neuron
from subnet.swarm.record import MAX_HAVE, ROSTER_DIGEST_BYTES, Record

NO_WEIGHTS = bytes(32)


class Standing(StrEnum):
    """Where a hotkey stands. Who is not in the table is out."""

    WAIT = "wait"
    """Valid, without a stage."""
    JOIN = "join"
    """Has a stage, fetches its public state, does not count yet."""
    ACTIVE = "active"
    """Holds its stage and counts."""
    BENCH = "bench"
    """Failed; back to WAIT at its round `until`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One hotkey's row."""

    hotkey: str
    standing: Standing
    stage: int | None = None
    """Of JOIN and ACTIVE."""
    since: int = 0
    """Round in which it came to this standing and stage."""
    missed: int = 0
    """Closed rounds in a row in whose source list it was not."""
    strikes: int = 0
    """How often it was benched; the next bench lasts 2^strikes rounds."""
    until: int = 0
    """Of BENCH: the round in which it ends."""
    moving: int | None = None
    """Of ACTIVE: the stage it moves to at the next refresh, if that still needs it."""


class Anchor(NamedTuple):
    """The public state of a stage that counts: digest of the weights after `held` merges.

    Zero `weights` with `held` 0 mean the weights that everybody builds from the manifest's seed.
    """

    held: int
    weights: bytes


FROM_SEED = Anchor(0, NO_WEIGHTS)


@dataclass(frozen=True)
class Roster:
    """Who stands where in `round`, which begins at `block`. `table` is in hotkey order; nobody is in it twice."""

    round: int
    table: tuple[Member, ...]
    anchors: tuple[Anchor, ...]
    """By stage."""
    dark: tuple[int, ...]
    """By stage: refreshes in a row at which no replica counted and those who joined could not take over."""
    block: int = 0
    parent: bytes = bytes(ROSTER_DIGEST_BYTES)
    """Digest of the roster before; zero at round 0. So a digest fixes all of history."""

    @classmethod
    def of(cls, stages: Sequence[Iterable[str]], *, waiting: Iterable[str] = (), block: int = 0) -> Roster:
        """Round 0 with these replicas of every stage."""
        rows = [
            Member(hotkey=hotkey, standing=Standing.ACTIVE, stage=stage)
            for stage, hotkeys in enumerate(stages)
            for hotkey in hotkeys
        ]
        rows += [Member(hotkey=hotkey, standing=Standing.WAIT) for hotkey in waiting]
        table = tuple(sorted(rows, key=lambda member: member.hotkey))
        return cls(0, table, (FROM_SEED,) * len(stages), (0,) * len(stages), block)

    @cached_property
    def _rows(self) -> dict[str, Member]:
        return {member.hotkey: member for member in self.table}

    @cached_property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The replicas that count, in hotkey order, by stage."""
        return tuple(self._at(stage, Standing.ACTIVE) for stage in range(len(self.anchors)))

    def _at(self, stage: int, standing: Standing) -> tuple[str, ...]:
        return tuple(member.hotkey for member in self.table if member.stage == stage and member.standing is standing)

    @cached_property
    def waiting(self) -> tuple[str, ...]:
        return tuple(member.hotkey for member in self.table if member.standing is Standing.WAIT)

    def joining(self, stage: int) -> tuple[str, ...]:
        """Who fetches the state of the stage and does not count yet, in hotkey order."""
        return self._at(stage, Standing.JOIN)

    def member(self, hotkey: str) -> Member | None:
        return self._rows.get(hotkey)

    def state_of(self, hotkey: str) -> Standing | None:
        """None: out."""
        member = self._rows.get(hotkey)
        return member.standing if member is not None else None

    def stage_of(self, hotkey: str) -> int | None:
        """The stage that the hotkey holds and counts in."""
        member = self._rows.get(hotkey)
        return member.stage if member is not None and member.standing is Standing.ACTIVE else None

    def target_of(self, hotkey: str) -> int | None:
        """The stage whose public state the hotkey should fetch: the one it joins, or moves to next."""
        member = self._rows.get(hotkey)
        if member is None:
            return None
        return member.stage if member.standing is Standing.JOIN else member.moving

    @cached_property
    def members(self) -> frozenset[str]:
        """All that count."""
        return frozenset(hotkey for replicas in self.stages for hotkey in replicas)

    @cached_property
    def encoded(self) -> bytes:
        """The one way to write this roster: what its digest is taken of and what a snapshot holds."""
        content = {
            "round": self.round,
            "block": self.block,
            "parent": self.parent.hex(),
            "anchors": [[anchor.held, anchor.weights.hex()] for anchor in self.anchors],
            "dark": self.dark,
            "table": [
                [
                    member.hotkey,
                    member.standing.value,
                    member.stage,
                    member.since,
                    member.missed,
                    member.strikes,
                    member.until,
                    member.moving,
                ]
                for member in self.table
            ],
        }
        return json.dumps(content, separators=(",", ":")).encode()

    @cached_property
    def digest(self) -> bytes:
        """15 bytes over everything, as records carry it."""
        return hashlib.sha256(b"orion/roster/2" + self.encoded).digest()[:ROSTER_DIGEST_BYTES]


def records_of(state: ChainState) -> dict[str, Record | None]:
    """Every neuron's record by hotkey; None for those whose commitment is something else."""
    return {neuron.hotkey: Record.decode(neuron.record, neuron.shards) for neuron in state.neurons}


def defect(neuron: Neuron, run: bytes, *, fresh_from: int = 0) -> str:
    """Why a neuron is not valid for the run, in a few words; "" if it is.

    A record older than `fresh_from` is no sign of life.
    """
    record = Record.decode(neuron.record, neuron.shards)
    if neuron.endpoint is None or ipaddress.ip_address(neuron.endpoint.ip).is_unspecified:
        return "serves no axon"
    if record is None or neuron.record_block is None:
        return "has no record"
    if record.run != run:
        return f"its record is of run {record.run.hex()}"
    if neuron.record_block < neuron.registered_at:
        return f"its record of block {neuron.record_block} is older than its registration at {neuron.registered_at}"
    if neuron.record_block < fresh_from:
        return f"no record since block {neuron.record_block}, last refresh {fresh_from}"
    return "wants no stage" if record.stageless else ""


def candidates(state: ChainState, run: bytes, *, fresh_from: int = 0) -> dict[str, Record]:
    """The records of the valid neurons of `state`, by hotkey."""
    return {
        neuron.hotkey: record
        for neuron in state.neurons
        if not defect(neuron, run, fresh_from=fresh_from)
        and (record := Record.decode(neuron.record, neuron.shards)) is not None
    }


def in_order(hotkeys: Iterable[str], state: ChainState) -> list[str]:
    """By H(block hash ‖ hotkey): an order that nobody chooses and everybody knows."""
    seed = bytes.fromhex(state.head.hash.removeprefix("0x"))
    return sorted(hotkeys, key=lambda hotkey: hashlib.sha256(seed + hotkey.encode()).digest())


def gather(state: ChainState, run: bytes, *, stages: int, replicas: int, most: int = MAX_HAVE) -> Roster | None:
    """Round 0's roster, or None while fewer than `stages * replicas` valid hotkeys are there.

    Hotkeys in the order of H(block hash ‖ hotkey) fill the stage with the fewest holders; the lowest stage breaks
    ties. All that are there at this block take part, up to `most` replicas per stage, at most the 64 that the
    have-bitmap holds.
    """
    valid = candidates(state, run)
    if len(valid) < stages * replicas:
        return None
    order = in_order(valid, state)
    held: list[list[str]] = [[] for _ in range(stages)]
    for hotkey in order[: stages * most]:
        min(held, key=len).append(hotkey)
    return Roster.of(held, waiting=order[stages * most :], block=state.head.number)
