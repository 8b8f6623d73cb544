"""Small tokenizers, documents in every format, and preparations that are killed where a test says."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.corpora.folder import DataManifest, Plan, Recipe, SourceEntry
from model.corpora.prepare import Advance, cut, prepare
from model.corpora.source import LocalSource, Source
from model.corpora.tokenise import DocumentTokenizer
from model.corpus import END_OF_TEXT


@cache
def tokenizer_json(vocab: int = 300, mark: str = END_OF_TEXT) -> bytes:
    """A byte-level BPE with one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[mark],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the words of a document, and the next one"] * 20, trainer)
    return tokenizer.to_str().encode()


@cache
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer(tokenizer_json(), "tokenizer", None)


def texts(count: int, *, seed: int = 0) -> list[str]:
    """Distinct documents of 2 to 60 words."""
    generator = np.random.default_rng(seed)
    words = ("the", "stage", "größe", "naïve", "流れ", "merge\n", "x = 1", "round", "token", "Ωmega")
    lengths = generator.integers(2, 60, count)
    return [
        f"document {number} " + " ".join(words[k] for k in generator.integers(0, len(words), lengths[number])).strip()
        for number in range(count)
    ]


def write_jsonl(path: Path, documents: Sequence[str | None], **more: Any) -> Path:  # noqa: ANN401
    lines = [json.dumps({"id": number, "text": text, **more}) for number, text in enumerate(documents)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_parquet(path: Path, documents: Sequence[str | None], *, rows: int = 7, kind: Any = None) -> Path:  # noqa: ANN401
    table = pa.table({"id": list(range(len(documents))), "text": pa.array(documents, kind or pa.string())})
    pq.write_table(table, path, row_group_size=rows)
    return path


def recipe(**changes: Any) -> Recipe:  # noqa: ANN401
    """Small blocks, windows and shards, so that a few documents need many."""
    given = {
        "format": "jsonl",
        "column": "text",
        "separator": None,
        "longest": 4_000,
        "seed": 3,
        "held_out": 0.2,
        "shard_tokens": 900,
        "block_bytes": 700,
        "window": 2_500,
        "end_of_text": END_OF_TEXT,
        "tokenizer": tokenizer().sha256,
        "vocab": tokenizer().vocab,
        "dtype": "uint16",
        "tokenizers": tokenizer().version,
    }
    return Recipe(**(given | changes))


def made(
    out: Path, files: Sequence[Path], given: Recipe, told: list[Advance] | None = None, *, skip_broken: bool = False
) -> DataManifest:
    """Prepares `out` from local files."""
    sources: list[Source] = [LocalSource.open(path, path.name) for path in files]
    entries = [SourceEntry(name=source.name, size=source.size, identity=source.identity) for source in sources]
    tell = (lambda _advance: None) if told is None else told.append
    plan, blocks = Plan(recipe=given, sources=entries), cut(given, sources)
    return prepare(out, plan, sources, blocks, tokenizer(), tell=tell, skip_broken=skip_broken)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def documents_in(folder: Path, manifest: DataManifest, *, held_out: bool) -> list[str]:
    """The documents of one part, in order, decoded."""
    found, decoder = [], Tokenizer.from_buffer(tokenizer().raw)
    for shard in manifest.shards:
        if shard.held_out is held_out:
            ids = np.fromfile(folder / shard.name, dtype=np.dtype(manifest.recipe.dtype).newbyteorder("<"))
            starts = np.flatnonzero(ids == tokenizer().end)
            assert starts[0] == 0
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                found.append(decoder.decode(ids[start + 1 : end].tolist()))
    return found


@dataclass
class MemorySource:
    """A source whose bytes are at hand, and the ranges that were read of it."""

    data: bytes
    name: str = "memory"
    identity: str = "size"
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, end: int) -> bytes:
        assert 0 <= start <= end <= self.size
        self.reads.append((start, end))
        return self.data[start:end]
