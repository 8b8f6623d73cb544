"""The folder that preparation writes: token shards, their tokenizer, and `dataset.json`, which says what they are.

Training shards come first, those with held-out documents last: `Corpus` holds out the last windows, and
`DataManifest.held_out_share` is the share that makes the border between them its border.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.data import DataError, ShardEntry, TokenShard

MANIFEST = "dataset.json"
TOKENIZER = "tokenizer.json"

Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Dtype = Literal["uint16", "uint32"]
Format = Literal["parquet", "jsonl", "text"]


class Strict(BaseModel):
    """What is read from a file has to be as it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Recipe(Strict):
    """Everything but the sources that the shards' bytes depend on."""

    format: Format
    column: str
    """Where the text is; text files have no columns."""
    separator: str | None
    """Between documents of a text file; None where a file is a document."""
    longest: Positive
    """Bytes of a document (in JSONL of its line) above which it is left out."""
    seed: int
    held_out: Annotated[float, Field(gt=0, lt=0.5)]
    """Share of the documents kept for validation."""
    shard_tokens: Positive
    """The most tokens in a shard."""
    block_bytes: Positive
    """About what is read in one go."""
    window: Positive
    """Characters that are shuffled, tokenised and kept together."""
    end_of_text: str
    tokenizer: Sha256Hex
    vocab: Positive
    dtype: Dtype
    tokenizers: str
    """Version of the library that encoded."""


class SourceEntry(Strict):
    name: str
    size: Count
    identity: str
    """`model.corpora.source.Source.identity`."""


class Plan(Strict):
    """What a folder is made of."""

    version: Literal[1] = 1
    recipe: Recipe
    sources: Annotated[list[SourceEntry], Field(min_length=1)]


class Counts(Strict):
    """Documents by what became of them."""

    training: Count = 0
    held_out: Count = 0
    empty: Count = 0
    """Nothing but white space, or null."""
    too_long: Count = 0
    """More bytes than `longest`, or more tokens than a shard takes."""
    broken: Count = 0
    """No UTF-8, or no JSON; without --skip-broken these are errors."""


class Shard(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=128)]
    sha256: Sha256Hex
    tokens: Positive
    documents: Positive
    held_out: bool


class DataManifest(Strict):
    """The content of `dataset.json`."""

    version: Literal[1] = 1
    recipe: Recipe
    counts: Counts
    shards: Annotated[list[Shard], Field(min_length=2)]
    sources: Annotated[list[SourceEntry], Field(min_length=1)]

    @model_validator(mode="after")
    def _parts_in_order(self) -> Self:
        parts = [shard.held_out for shard in self.shards]
        if parts != sorted(parts) or parts[0] or not parts[-1]:
            raise ValueError("shards must be some to train on, then some held out")
        return self

    @property
    def plan(self) -> Plan:
        return Plan(recipe=self.recipe, sources=self.sources)

    @property
    def entries(self) -> list[ShardEntry]:
        """The shards as `Corpus` takes them, in order."""
        return [ShardEntry(name=shard.name, sha256=shard.sha256, dtype=self.recipe.dtype) for shard in self.shards]

    def tokens(self, *, held_out: bool) -> int:
        return sum(shard.tokens for shard in self.shards if shard.held_out is held_out)

    def windows(self, sequence: int) -> dict[bool, int]:
        """Windows of `sequence` tokens, as `Corpus` cuts them, in training shards (False) and held-out ones (True)."""
        counts = {False: 0, True: 0}
        for shard in self.shards:
            counts[shard.held_out] += (shard.tokens - 1) // sequence
        return counts

    def held_out_share(self, sequence: int) -> float:
        """The `held_out` with which `Corpus` trains on exactly the training shards, in windows of `sequence` tokens.

        Of n windows, h of them in held-out shards, (h - 1/2) / n is held out: h - 1 windows. The first of the h is the
        one that `Corpus` leaves between the parts. Raises `DataError` when the parts are too small for that.
        """
        windows = self.windows(sequence)
        if not windows[False] or windows[True] < 2:
            raise DataError(
                f"{windows[False]} windows of {sequence} tokens to train on and {windows[True]} held out are too few, "
                "1 and 2 are needed: prepare more data, or lower --sequence"
            )
        share = (windows[True] - 0.5) / (windows[False] + windows[True])
        if share >= 0.5:
            raise DataError(
                f"{windows[True]} of {windows[False] + windows[True]} windows of {sequence} tokens are held out, which "
                "must be less than half: prepare again with a lower --held-out"
            )
        return share


def read_manifest(folder: Path) -> DataManifest:
    """What `folder` holds. Raises `DataError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}: give a folder that orion data prepare has finished")
    return read_model(path, DataManifest)


def verify(folder: Path, manifest: DataManifest, shard: Shard) -> None:
    """Proves size, hash and ids of a shard. Raises `DataError`."""
    entry = ShardEntry(name=shard.name, sha256=shard.sha256, dtype=manifest.recipe.dtype)
    found = len(TokenShard.open(folder, entry, vocab=manifest.recipe.vocab).tokens)
    if found != shard.tokens:
        raise DataError(f"shard {folder / shard.name} has {found} tokens, {MANIFEST} says {shard.tokens}: restore it")


def verify_tokenizer(folder: Path, manifest: DataManifest) -> None:
    """Proves the tokenizer's hash. Raises `DataError`."""
    path = folder / TOKENIZER
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): restore it") from error
    if found != manifest.recipe.tokenizer:
        raise DataError(f"{path} has SHA-256 {found}, expected {manifest.recipe.tokenizer}: restore it")


def check_same(folder: Path, there: Plan, wanted: Plan) -> None:
    """Raises `DataError` naming the first setting or source in which the plan of `folder` differs from `wanted`."""
    remedy = "give the same again, or another --out"
    for name, value in wanted.recipe:
        begun = getattr(there.recipe, name)
        if begun != value:
            raise DataError(f"{folder} was prepared with {name} {begun!r}, not {value!r}: {remedy}")
    for old, new in zip(there.sources, wanted.sources, strict=False):
        if old != new:
            raise DataError(
                f"{folder} was prepared from {old.name} ({old.size} bytes, {old.identity:.20}), not {new.name} "
                f"({new.size} bytes, {new.identity:.20}): {remedy}"
            )
    if len(there.sources) != len(wanted.sources):
        raise DataError(f"{folder} was prepared from {len(there.sources)} files, not {len(wanted.sources)}: {remedy}")


M = TypeVar("M", bound=BaseModel)


def read_model(path: Path, kind: type[M]) -> M:
    """The JSON file as a `kind`. Raises `DataError` naming the first thing that is wrong."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): restore it") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}; it must be as orion data prepare wrote it") from error


def write_whole(path: Path, data: bytes) -> None:
    """Puts `data` at `path` whole or not at all, also when the power fails. Raises `OSError`."""
    temporary = path.with_name(part_name(path.name))
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def part_name(name: str) -> str:
    """What a file is called while it is written."""
    return f".{name}.part"


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` last. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
