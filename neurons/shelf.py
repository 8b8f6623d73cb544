"""What a miner may still have to show, on its disk: a file for each picked window, and one for what a cut came from.

    evidence/<name>/round-RRRRR-window-VVVVVVVV.safetensors
    evidence/<name>/round-RRRRR-cut.safetensors

A file is there whole or not at all (`model/checkpoint.py`), is mapped into memory as soon as it is, and goes when its
round is forgotten. What is read from it is not proven here: who asks has the roots, and a miner whose disk lies to it
has nothing else to show. A killed miner finds its files again.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast, get_args

import torch

from model.checkpoint import CheckpointError, CheckpointInfo, encode, mapped
from neurons.kept import Cut, PickedWindow, Pieces, Vector
from neurons.stores import Folder, StoreFullError
from subnet.messages import StatePart
from subnet.quantities import written
from subnet.trust.audit import UnitTensors
from subnet.trust.ledger import Direction, UnitKey
from subnet.trust.tree import Tree

log = logging.getLogger("orion.neurons.shelf")

EVIDENCE = "evidence"
_FILE = re.compile(r".*/round-(\d{5,})-(?:window-(\d{8,})|cut)\.safetensors")
_NOWHERE = -1
"""In the place of a tensor's number: a unit without it."""

Tensors = Mapping[str, torch.Tensor]


class Shelf:
    """The files of the node `name` under `root`, in `limit` bytes at most.

    Methods raise `StoreError`, and those that write `CheckpointError`. One writes at a time.
    """

    def __init__(self, root: Path, name: str, *, manifest_hash: str, limit: int) -> None:
        self._store = Folder(root)
        self._folder = f"{EVIDENCE}/{name}"
        self._manifest_hash = manifest_hash
        self.limit = limit
        self._sizes: dict[str, int] = {}
        """Bytes by file."""

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self._sizes.values())

    async def put_window(self, number: int, version: int, window: PickedWindow) -> PickedWindow:
        """Write a window of round `number`; the same from its file."""
        name = f"{self._folder}/round-{number:05d}-window-{version:08d}.safetensors"
        await self._put(name, number, version, _of_window(window))
        return await asyncio.to_thread(lambda: _to_window(self._open(name)))

    async def put_cut(self, number: int, cut: Cut) -> Cut:
        """Write what the cut of round `number` was taken from; the same from its file."""
        name = f"{self._folder}/round-{number:05d}-cut.safetensors"
        await self._put(name, number, 0, {part: vector.values for part, vector in cut.vectors.items()})
        trees = {part: await asyncio.to_thread(vector.tree) for part, vector in cut.vectors.items()}
        return _to_cut(await asyncio.to_thread(self._open, name), trees)

    async def find(self, number: int) -> tuple[dict[int, PickedWindow], Cut]:
        """What there is of round `number`, windows by version. A file that cannot be read is said, and counts as none;
        what killed writers left is removed."""
        await self._store.clean(EVIDENCE)
        windows, cut = dict[int, PickedWindow](), Cut()
        for name, (held, version) in (await self._files()).items():
            if held != number:
                continue
            _, self._sizes[name] = await self._store.first(name, 0)
            try:
                tensors = await asyncio.to_thread(self._open, name)
            except CheckpointError as error:
                log.error("evidence is lost: %s", error)  # noqa: TRY400 - a line for a person
                continue
            if version is None:
                cut = _to_cut(tensors, {})
            else:
                windows[version] = await asyncio.to_thread(_to_window, tensors)
        return windows, cut

    async def forget(self, which: Callable[[int], bool]) -> None:
        """Delete the files of those rounds."""
        for name, (number, _) in (await self._files()).items():
            if which(number):
                await self._store.delete(name)
                self._sizes.pop(name, None)

    async def _put(self, name: str, number: int, version: int, tensors: Tensors) -> None:
        info = CheckpointInfo(manifest_hash=self._manifest_hash, round=number, version=version)
        encoded = await asyncio.to_thread(encode, tensors, info, subject=name)
        if self.bytes + encoded.size > self.limit:
            raise StoreFullError(
                f"{encoded.size} bytes beside {self.bytes} are more than --evidence-disk {written(self.limit)} takes: "
                "raise it"
            )
        await self._store.put(name, encoded)
        self._sizes[name] = encoded.size

    async def _files(self) -> dict[str, tuple[int, int | None]]:
        """Round and version of each file, in order; a cut has no version."""
        found = {}
        for name in sorted(await self._store.names(self._folder)):
            if match := _FILE.fullmatch(name):
                found[name] = int(match[1]), None if match[2] is None else int(match[2])
        return found

    def _open(self, name: str) -> dict[str, torch.Tensor]:
        return mapped(Path(self._store.place(name)), manifest_hash=self._manifest_hash, subject=name)


def _to_cut(tensors: Tensors, trees: Mapping[str, Tree]) -> Cut:
    vectors = {part: Vector(values, trees.get(part)) for part, values in tensors.items()}
    return Cut(vectors.get("closing"), vectors.get("owed"), vectors.get("still_owed"), mapped=True)


def _of_window(window: PickedWindow) -> dict[str, torch.Tensor]:
    found = {"weights": window.weights}
    for part, pieces in window.parts.items():
        found |= {
            f"{part}.count": torch.tensor(pieces.count),
            f"{part}.numbers": torch.tensor(pieces.numbers),
            f"{part}.data": pieces.data,
            f"{part}.lengths": torch.tensor(pieces.lengths),
            f"{part}.hashes": pieces.hashes,
        }
    places: dict[int, int] = {}  # units share inputs: each tensor is written once

    def place(tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return _NOWHERE
        at = places.setdefault(id(tensor), len(places))
        found[f"tensor.{at}"] = tensor
        return at

    rows = [
        (key.sample, key.direction.value, place(unit.input), place(unit.gradient), place(unit.output))
        for key, unit in window.units.items()
    ]
    found["units"] = torch.tensor(rows, dtype=torch.int64).view(-1, 5)
    return found


def _to_window(tensors: Tensors) -> PickedWindow:
    parts: dict[StatePart, Pieces] = {}
    for part in cast("tuple[StatePart, ...]", get_args(StatePart)):
        if f"{part}.data" in tensors:
            parts[part] = Pieces(
                count=int(tensors[f"{part}.count"]),
                numbers=tuple(tensors[f"{part}.numbers"].tolist()),
                data=tensors[f"{part}.data"],
                lengths=tuple(tensors[f"{part}.lengths"].tolist()),
                hashes=tensors[f"{part}.hashes"],
            )
    units = {}
    for sample, direction, *places in tensors["units"].tolist():
        x, gradient, output = (None if at == _NOWHERE else tensors[f"tensor.{at}"] for at in places)
        assert x is not None  # noqa: S101 - every unit has an input
        units[UnitKey(sample, Direction(direction))] = UnitTensors(x, gradient, output)
    return PickedWindow(tensors["weights"], parts, units, mapped=True)
