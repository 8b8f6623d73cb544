"""What a run on one machine learns from: the standard library, or a folder that `orion data prepare` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.config import preset
from model.corpora.folder import read_manifest
from model.corpus import standard_library_corpus
from model.data import Corpus, DataError, ShardEntry

HELD_OUT = 0.05
"""Share of the standard library's windows kept for validation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """Shards as a manifest names them, and where they lie."""

    folder: Path
    entries: tuple[ShardEntry, ...]
    held_out: float


def standard_library(cache: Path, model: str) -> RunData:
    """The standard library in the vocabulary of preset `model`, kept below `cache`. Raises `DataError`."""
    files = standard_library_corpus(cache, vocab=preset(model).vocab)
    return RunData(folder=files.folder, entries=files.entries, held_out=HELD_OUT)


def fitting(folder: Path, model: str) -> RunData:
    """The prepared shards in `folder`, if preset `model` can learn from them; no shard is read. Raises `DataError`."""
    manifest, config = read_manifest(folder), preset(model)
    if manifest.recipe.vocab > config.vocab:
        raise DataError(
            f"the tokenizer of {folder} has {manifest.recipe.vocab} ids, model {model} takes {config.vocab}: choose "
            "another --model, or prepare the data with a smaller tokenizer"
        )
    share = manifest.held_out_share(config.context)
    return RunData(folder=folder.absolute(), entries=tuple(manifest.entries), held_out=share)


def prepared(folder: Path, model: str, *, batch: int, validation_batches: int) -> RunData:
    """`fitting`, every shard hashed, and enough in them for batches of `batch` sequences. Raises `DataError`."""
    data, config = fitting(folder, model), preset(model)
    corpus = Corpus.open(
        folder,
        data.entries,
        seed=0,
        batch=batch,
        tokens=config.context,
        vocab=config.vocab,
        held_out=data.held_out,
    )
    if corpus.validation_samples < validation_batches:
        raise DataError(
            f"{folder} has {corpus.validation_samples} batches of {batch} x {config.context} tokens held out, "
            f"{validation_batches} are needed: prepare more data, or again with a higher --held-out"
        )
    return data
