"""The corpus every machine has: the source text of the running Python's own standard library.

Real text, no download. Files are ordered by the hash of their name, so that the held-out end of the corpus
is a fair sample of it, and taken up to a byte cap; tests, caches, installed packages and tables of
characters are left out. A byte-level BPE is trained on the first part, every file is encoded behind an
end-of-text mark, and the ids go to one uint16 file. All of it is deterministic for a given Python, is
written to a temporary folder and appears by one rename; later calls verify and reuse it.
"""

import hashlib
import json
import shutil
import sysconfig
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.data import DataError, ShardEntry

END_OF_TEXT = "<|endoftext|>"
_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"})
_INDEX = "corpus.json"
_TOKENS = "tokens.bin"
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFiles:
    """A built corpus: where it lies, the entries a manifest names, and what it was made of."""

    folder: Path
    entries: tuple[ShardEntry, ...]
    vocab: int
    tokens: int
    tokenizer_sha256: str
    source_sha256: str


def standard_library_corpus(
    cache: Path, *, vocab: int = 1_024, cap_bytes: int = 8_000_000, training_bytes: int = 1_500_000
) -> CorpusFiles:
    """Builds the corpus below `cache`, or verifies and returns the one that is there.

    `cap_bytes` bounds the text, `training_bytes` the part that the BPE is trained on; `vocab` is at most
    65,536 ids. Raises `DataError` when the library's source is missing or a cached file was altered.
    """
    if not 257 <= vocab <= 65_536:
        raise DataError(f"vocab is {vocab}; a byte-level BPE in uint16 takes 257 to 65536: change vocab")
    texts = list(_texts(Path(sysconfig.get_paths()["stdlib"]), cap_bytes))
    if not texts:
        raise DataError("this Python has no standard library source (.py files): use another Python or a data folder")
    source = hashlib.sha256(b"\0".join(text.encode() for text in texts)).hexdigest()
    recipe = hashlib.sha256(f"{source}/{vocab}/{training_bytes}".encode()).hexdigest()[:16]
    folder = cache / f"stdlib-{recipe}"
    if not folder.exists():
        _build(folder, texts, source, vocab=vocab, training_bytes=training_bytes)
    return _verified(folder)


def find_tokenizer(cache: Path, shards: Collection[str]) -> Path | None:
    """The verified tokenizer.json below `cache` of a corpus whose tokens have one of these SHA-256s, if any.

    Raises `DataError` when that corpus was altered.
    """
    for index in sorted(cache.glob(f"stdlib-*/{_INDEX}")):
        content = index.read_text()
        if any(sha256 in content for sha256 in shards):
            return _verified(index.parent).folder / _TOKENIZER
    return None


def _texts(root: Path, cap: int) -> Iterator[str]:
    """File texts in order of the hash of their relative name, until `cap` bytes are reached."""
    files = [
        path.relative_to(root)
        for path in root.rglob("*.py")
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    ]
    files.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    size = 0
    for path in files:
        data = (root / path).read_bytes()
        size += len(data)
        if size > cap:
            return
        yield data.decode("utf-8", errors="replace")


def _build(folder: Path, texts: list[str], source: str, *, vocab: int, training_bytes: int) -> None:
    # Imported here: only the process that builds the corpus pays for it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_prefix(texts, training_bytes), trainer)
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = [[end, *encoding.ids] for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    ids = np.concatenate([np.asarray(part, dtype="<u2") for part in parts])

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        (temporary / _TOKENS).write_bytes(ids.tobytes())
        tokenizer.save(str(temporary / _TOKENIZER), pretty=False)
        index = {
            "vocab": vocab,
            "tokens": len(ids),
            "dtype": "uint16",
            "source_sha256": source,
            "sha256": {name: _sha256(temporary / name) for name in (_TOKENS, _TOKENIZER)},
        }
        (temporary / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
        try:
            temporary.rename(folder)
        except OSError:
            # Another process built the same corpus first; its files are verified next.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prefix(texts: list[str], size: int) -> Iterator[str]:
    for text in texts:
        if size <= 0:
            return
        yield text[:size]
        size -= len(text)


def _verified(folder: Path) -> CorpusFiles:
    remedy = f"delete {folder} and it will be rebuilt"
    try:
        index = json.loads((folder / _INDEX).read_text())
        hashes = {name: str(index["sha256"][name]) for name in (_TOKENS, _TOKENIZER)}
        vocab, tokens, source = int(index["vocab"]), int(index["tokens"]), str(index["source_sha256"])
        for name, expected in hashes.items():
            got = _sha256(folder / name)
            if got != expected:
                raise DataError(f"corpus file {folder / name} has SHA-256 {got}, expected {expected}: {remedy}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"corpus {folder} is incomplete ({error!r}): {remedy}") from error
    return CorpusFiles(
        folder=folder,
        entries=(ShardEntry(name=_TOKENS, sha256=hashes[_TOKENS], dtype="uint16"),),
        vocab=vocab,
        tokens=tokens,
        tokenizer_sha256=hashes[_TOKENIZER],
        source_sha256=source,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
