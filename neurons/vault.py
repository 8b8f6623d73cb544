"""The checkpoints of a run: public ones by stage, private ones by replica, in a folder or an object store.

    checkpoints/stage-SS/round-RRRRR.safetensors     public state of a stage at the start of a round
    replicas/<hotkey>/round-RRRRR.safetensors        what a replica alone has: inner optimizer, residual, own weights

A file is believed only after it is proven (`model/checkpoint.py`): content digest, manifest, round, and whose state it
is (the folder's name is sealed into it). `newest` goes back to the one before when a file fails, and says which file
and why. After a put the file's header is read back; older rounds go, but never the newest `keep` whole ones, never the
newest round that all stages here still have, never another run's files.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Self

from torch import Tensor

from model.checkpoint import (
    HEADER_LIMIT,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointInfo,
    CheckpointMismatchError,
    CheckpointMissingError,
    Header,
    check_owner,
    encode,
    header_length,
    read_header,
)
from neurons.stores import DEADLINE, Store, StoreContentError, StoreError, StoreNameError, open_store

log = logging.getLogger("orion.neurons.vault")

STAGES = "checkpoints"
REPLICAS = "replicas"
FIRST = 64 << 10
"""Bytes read to learn what a file is; enough for the header of some 500 tensors."""
PROBES = 8
"""Headers read at once."""
_STAGE = re.compile(rf"({STAGES}/stage-\d{{2,}})/round-(\d{{5,}})\.safetensors")
_ROUND = re.compile(r".*/round-(\d{5,})\.safetensors")
_HOTKEY = re.compile(r"[1-9A-HJ-NP-Za-km-z]+")

Tensors = Mapping[str, Tensor]
Check = Callable[[int, Tensors], str | None]
"""A reader's own test of (round, tensors), run on a thread: None, or in a few words what is wrong."""


def stage_file(stage: int, number: int) -> str:
    """Path of a public checkpoint within the folder or store."""
    return f"{_stage_folder(stage)}/{_round_file(number)}"


def replica_file(hotkey: str, number: int) -> str:
    """Path of a private checkpoint within the folder or store. Raises `StoreNameError`."""
    return f"{_replica_folder(hotkey)}/{_round_file(number)}"


class Vault:
    """Checkpoints of the run `manifest_hash` (hex).

    Methods raise `StoreError` when the store fails (see its kinds), those that read a given file `CheckpointError`
    when it cannot be used. `report` gets one line for every file that is passed over.
    """

    def __init__(
        self, store: Store, *, manifest_hash: str, keep: int = 3, report: Callable[[str], None] | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint must stay: give 1 or more")
        self._store = store
        self._manifest_hash = manifest_hash
        self._keep = keep
        self._report = report or (lambda line: log.warning("%s", line))
        self._refused: set[str] = set()
        """Names found unsound by reading them whole; their headers are not believed until they are written anew."""
        self._probes = asyncio.Semaphore(PROBES)

    @classmethod
    async def open(
        cls,
        url_or_folder: str,
        *,
        manifest_hash: str,
        keep: int = 3,
        report: Callable[[str], None] | None = None,
        deadline: float = DEADLINE,
    ) -> Self:
        """The vault at a folder or URL, cleared of temporaries that killed writers left.

        `deadline` is in seconds, for each request; a transfer has longer, by its size.
        """
        store = open_store(url_or_folder, deadline=deadline)
        for folder in (STAGES, REPLICAS):
            if removed := await store.clean(folder):
                log.info("%s: removed %d unfinished files", store.place(folder), removed)
        return cls(store, manifest_hash=manifest_hash, keep=keep, report=report)

    def place(self, name: str) -> str:
        """Where `stage_file` or `replica_file` lies: path or URL."""
        return self._store.place(name)

    async def put_stage(self, stage: int, number: int, tensors: Tensors, version: int) -> bytes:
        """Write a stage's public state at the start of round `number`; returns its content digest (32 bytes).

        `tensors` must not change until this returns; if they do, `CheckpointContentError` is raised and nothing is
        written. Raises `CheckpointMismatchError` if another run's file lies there.
        """
        return await self._put(_stage_folder(stage), number, tensors, version)

    async def put_replica(self, hotkey: str, number: int, tensors: Tensors, version: int = 0) -> bytes:
        """`put_stage` for what the replica `hotkey` alone has."""
        return await self._put(_replica_folder(hotkey), number, tensors, version)

    async def rounds(self, stage: int) -> tuple[int, ...]:
        """Rounds of which the stage has a file, newest first, by name alone."""
        return tuple(await self._listed(_stage_folder(stage)))

    async def complete(self, stages: int) -> tuple[int, ...]:
        """Rounds of which all `stages` stages have a file of this run that is whole by its header, newest first."""
        held = await asyncio.gather(*(self._whole(_stage_folder(stage)) for stage in range(stages)))
        return tuple(sorted(set.intersection(*held), reverse=True)) if held else ()

    async def load_stage(self, stage: int, number: int, *, check: Check | None = None) -> dict[str, Tensor]:
        """A proven public state. Raises `CheckpointError`, also when `check` objects."""
        return await self._load(_stage_folder(stage), number, check)

    async def newest(
        self, stage: int, *, at_most: int | None = None, check: Check | None = None
    ) -> tuple[int, dict[str, Tensor]] | None:
        """The newest public state that is sound, of round `at_most` or before; None if there is none.

        A store that fails raises: an older checkpoint would be the wrong answer to a bad line.
        """
        return await self._newest(_stage_folder(stage), at_most, check)

    async def newest_replica(
        self, hotkey: str, *, at_most: int | None = None, check: Check | None = None
    ) -> tuple[int, dict[str, Tensor]] | None:
        """`newest` for what the replica `hotkey` alone has."""
        return await self._newest(_replica_folder(hotkey), at_most, check)

    async def _put(self, folder: str, number: int, tensors: Tensors, version: int) -> bytes:
        name = f"{folder}/{_round_file(number)}"
        with suppress(CheckpointMissingError, CheckpointCorruptError):
            there, _ = await self._header(name)
            check_owner(self.place(name), there, manifest_hash=self._manifest_hash, subject=None)
        info = CheckpointInfo(manifest_hash=self._manifest_hash, round=number, version=version)
        encoded = await asyncio.to_thread(encode, tensors, info, subject=folder)
        await self._store.put(name, encoded)
        try:
            written, size = await self._header(name)
        except CheckpointError as error:
            raise StoreContentError(f"{self.place(name)} is not what was just put there: {error}") from error
        if written.digest != encoded.digest or not written.size == size == encoded.size:
            raise StoreContentError(
                f"{self.place(name)} holds {size} bytes of content {written.digest.hex()[:16]}… where {encoded.size} "
                f"of {encoded.digest.hex()[:16]}… were just put: does another replica with other weights write there?"
            )
        self._refused.discard(name)
        try:
            await self._prune(folder, number)
        except StoreError as error:
            self._report(f"old checkpoints stay: {error}")
        return encoded.digest

    async def _load(self, folder: str, number: int, check: Check | None) -> dict[str, Tensor]:
        name = f"{folder}/{_round_file(number)}"
        place = self.place(name)
        try:
            tensors, info = await self._store.load(name, self._manifest_hash, folder)
            if info.round != number:
                raise CheckpointMismatchError(
                    f"checkpoint {place} is of round {info.round}, not of {number}: put the right file in its place"
                )
            if check is not None and (reason := await asyncio.to_thread(check, number, tensors)):
                raise CheckpointMismatchError(f"checkpoint {place} is sound but not the one wanted: {reason}")
        except CheckpointError:
            self._refused.add(name)
            raise
        self._refused.discard(name)
        return tensors

    async def _newest(
        self, folder: str, at_most: int | None, check: Check | None
    ) -> tuple[int, dict[str, Tensor]] | None:
        for number in await self._listed(folder):
            if at_most is not None and number > at_most:
                continue
            try:
                return number, await self._load(folder, number, check)
            except CheckpointError as error:
                self._report(f"passed over: {error}")
        return None

    async def _listed(self, folder: str) -> list[int]:
        return sorted(
            {int(match[1]) for name in await self._store.names(folder) if (match := _ROUND.fullmatch(name))},
            reverse=True,
        )

    async def _header(self, name: str) -> tuple[Header, int]:
        """The file's header and size in bytes. Raises `CheckpointMissingError` or `CheckpointCorruptError`."""
        async with self._probes:
            first, size = await self._store.first(name, FIRST)
            needed = header_length(first)
            if len(first) < needed <= min(size, HEADER_LIMIT):
                first, size = await self._store.first(name, needed)
        return read_header(self.place(name), first), size

    async def _examine(self, folder: str, number: int) -> bool | None:
        """By its header: whether the file is whole; None if it is not of this run, or nothing says so."""
        name = f"{folder}/{_round_file(number)}"
        try:
            header, size = await self._header(name)
        except CheckpointError:
            return None
        if header.info.manifest_hash != self._manifest_hash:
            return None
        misplaced = header.subject != folder or header.info.round != number
        return header.size == size and not misplaced and name not in self._refused

    async def _own(self, folder: str) -> dict[int, bool]:
        """This run's files in `folder` by round, newest first: whether each is whole."""
        listed = await self._listed(folder)
        found = await asyncio.gather(*(self._examine(folder, number) for number in listed))
        return {number: whole for number, whole in zip(listed, found, strict=True) if whole is not None}

    async def _whole(self, folder: str) -> set[int]:
        return {number for number, whole in (await self._own(folder)).items() if whole}

    async def _prune(self, folder: str, newest: int) -> None:
        """Delete what is older than the `keep` newest whole files up to `newest`; what is younger is not touched."""
        own = {number: whole for number, whole in (await self._own(folder)).items() if number <= newest}
        whole = [number for number, sound in own.items() if sound]
        oldest = whole[: self._keep][-1] if len(whole) >= self._keep else 0
        spare = {number for number in own if number < oldest}
        if spare and folder.startswith(f"{STAGES}/"):
            names = await self._store.names(STAGES)
            folders = sorted({match[1] for name in names if (match := _STAGE.fullmatch(name))})
            held = await asyncio.gather(*(self._whole(other) for other in folders))
            spare.discard(max(set(whole).intersection(*(rounds for rounds in held if rounds)), default=-1))
        for number in spare:
            await self._store.delete(f"{folder}/{_round_file(number)}")


def _stage_folder(stage: int) -> str:
    return f"{STAGES}/stage-{stage:02d}"


def _replica_folder(hotkey: str) -> str:
    if not _HOTKEY.fullmatch(hotkey):
        raise StoreNameError(f"{hotkey!r} is no hotkey's address: give its SS58 form, letters and digits")
    return f"{REPLICAS}/{hotkey}"


def _round_file(number: int) -> str:
    return f"round-{number:05d}.safetensors"
