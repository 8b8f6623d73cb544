"""Rosters on disk and from peers, and which one the chain vouches for.

A snapshot is `Roster.encoded` and nothing else, so its digest is that of the roster. It comes from peers: size, shape
and values are checked before a roster is made of it, and only the one canonical spelling is taken. Whether it is the
right one is then a question of its digest alone: `agreed_digest` says what most of the permitted stake commits to.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from subnet.metagraph import ChainState
from subnet.swarm.record import MAX_HAVE, ROSTER_DIGEST_BYTES
from subnet.swarm.roster import Anchor, Member, Roster, Standing, records_of

log = logging.getLogger("orion.subnet.snapshot")

SNAPSHOT_LIMIT = 1 << 20
KEPT = 8
_STAGES = 1024
_ROWS = 8192
_NAME = re.compile(r"round-(\d{5,10})\.json")

_Number = Annotated[int, Field(ge=0, lt=2**32)]
_Stage = Annotated[int, Field(ge=0, lt=_STAGES)]
_Hotkey = Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,64}$")]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Row = tuple[
    _Hotkey,
    Standing,
    _Stage | None,
    _Number,
    _Number,
    Annotated[int, Field(ge=0, lt=64)],
    _Number,
    _Stage | None,
]


class SnapshotError(Exception):
    """These bytes are no roster, or cannot be kept: one line with the value, the limit and the remedy."""


class _Snapshot(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    round: _Number
    block: _Number
    parent: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * ROSTER_DIGEST_BYTES}}}$")]
    anchors: Annotated[tuple[tuple[_Number, _Digest], ...], Field(min_length=1, max_length=_STAGES)]
    dark: Annotated[tuple[_Number, ...], Field(max_length=_STAGES)]
    table: Annotated[tuple[_Row, ...], Field(max_length=_ROWS)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        count = len(self.anchors)
        if len(self.dark) != count:
            raise ValueError(f"{len(self.dark)} dark counts for {count} stages")
        hotkeys = [row[0] for row in self.table]
        if any(a >= b for a, b in pairwise(hotkeys)):
            raise ValueError("hotkeys are not in order, or one occurs twice")
        holders: Counter[int] = Counter()
        for hotkey, standing, stage, *_, moving in self.table:
            placed = standing in (Standing.JOIN, Standing.ACTIVE)
            if placed != (stage is not None) or (stage is not None and stage >= count):
                raise ValueError(f"{hotkey} is {standing.value} at stage {stage} of {count}")
            if moving is not None and (standing is not Standing.ACTIVE or moving >= count or moving == stage):
                raise ValueError(f"{hotkey} is {standing.value} and moves to stage {moving} of {count}")
            if stage is not None:
                holders[stage] += 1
        if holders and max(holders.values()) > MAX_HAVE:
            raise ValueError(f"a stage has {max(holders.values())} replicas, the limit is {MAX_HAVE}")
        return self


def parse(raw: bytes) -> Roster:
    """The roster that `raw` is the encoding of. Raises `SnapshotError`."""
    if len(raw) > SNAPSHOT_LIMIT:
        raise SnapshotError(f"a roster of {len(raw)} bytes, limit {SNAPSHOT_LIMIT}: take it from another peer")
    try:
        content = _Snapshot.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "roster"
        raise SnapshotError(f"{where}: {first['msg']}: take the roster from another peer") from None
    roster = Roster(
        round=content.round,
        table=tuple(
            Member(
                hotkey=hotkey,
                standing=standing,
                stage=stage,
                since=since,
                missed=missed,
                strikes=strikes,
                until=until,
                moving=moving,
            )
            for hotkey, standing, stage, since, missed, strikes, until, moving in content.table
        ),
        anchors=tuple(Anchor(held, bytes.fromhex(weights)) for held, weights in content.anchors),
        dark=content.dark,
        block=content.block,
        parent=bytes.fromhex(content.parent),
    )
    if roster.encoded != raw:
        raise SnapshotError("a roster that is not spelt the one way it can be: take it from another peer")
    return roster


# -- on disk ------------------------------------------------------------------------------------------------------


def write(folder: Path, roster: Roster) -> Path:
    """Put a snapshot into `folder`, whole or not at all, and keep the last `KEPT`. Raises `SnapshotError`."""
    path = folder / f"round-{roster.round:05d}.json"
    temporary = folder / f".{path.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SnapshotError(f"folder {folder} cannot be made ({error.strerror}): choose another --out") from error
    try:
        with temporary.open("wb") as file:
            file.write(roster.encoded)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        for old in _paths(folder)[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise SnapshotError(
            f"roster {path} cannot be written ({error.strerror}): make room or choose another --out"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read(path: Path) -> Roster:
    """The roster in a file. Raises `SnapshotError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(SNAPSHOT_LIMIT + 1)
    except OSError as error:
        raise SnapshotError(f"roster {path} cannot be read ({error.strerror}): check the folder") from error
    try:
        return parse(raw)
    except SnapshotError as error:
        raise SnapshotError(f"{path}: {error}") from error


def kept(folder: Path) -> list[Roster]:
    """The rosters in a folder that can be read, oldest first; the others are named in the log."""
    rosters = []
    for path in _paths(folder):
        try:
            rosters.append(read(path))
        except SnapshotError as error:
            log.warning("%s", error)
    return rosters


def _paths(folder: Path) -> list[Path]:
    found = {path: match for path in folder.glob("round-*.json") if (match := _NAME.fullmatch(path.name))}
    return sorted(found, key=lambda path: int(found[path][1]))


# -- on chain -----------------------------------------------------------------------------------------------------


def agreed_digest(state: ChainState, run: bytes) -> bytes | None:
    """The roster digest that more than two thirds of the permitted stake carry in their records, if there is one."""
    records = records_of(state)
    permitted = [neuron for neuron in state.neurons if neuron.validator_permit]
    stakes: dict[bytes, list[float]] = {}
    for neuron in permitted:
        record = records[neuron.hotkey]
        if record is not None and record.run == run and any(record.roster):
            stakes.setdefault(record.roster, []).append(neuron.stake)
    total = sum(neuron.stake for neuron in permitted)
    return next((digest for digest, stake in stakes.items() if 3 * sum(stake) > 2 * total), None)
