"""From sources to a finished folder, going on where a killed run stopped.

Same sources, recipe and seed give the same bytes, however often the work was interrupted: what is read next follows
from the journal alone. Which documents are held out follows from each document's text alone, so copies of one never lie
on both sides, and whoever prepares other data with the same or a larger share holds the same ones out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

from model.corpora.documents import Block, JsonLines, LeftOut, PlainText, Reader
from model.corpora.folder import (
    MANIFEST,
    TOKENIZER,
    Counts,
    DataManifest,
    Plan,
    Recipe,
    check_same,
    part_name,
    read_manifest,
    read_model,
    write_whole,
)
from model.corpora.order import Cursor, Window, ahead, permutation, windows
from model.corpora.parquet import ParquetRows
from model.corpora.shards import JOURNAL, Part, Progress, keep, name_full, read_progress
from model.corpora.source import Source
from model.corpora.tokenise import DocumentTokenizer
from model.data import DataError
from model.hashing import digest

PLAN = ".plan.json"
LOCKS = ".locks"
"""Where whoever prepares holds its lock."""
TOLD = 1 << 20
"""Characters between two words on how far it is."""


@dataclass(frozen=True, slots=True)
class Advance:
    """How far a preparation is: bytes of blocks read, of all; documents kept and their tokens."""

    read: int
    total: int
    documents: int
    tokens: int


def held_out(text: str, share: float) -> bool:
    """Whether this document is for validation: a `share` of all texts is, by their hash."""
    return int.from_bytes(digest(b"orion/held-out/", text.encode())[:8], "little") < share * 2**64


def reader_of(recipe: Recipe, *, skip_broken: bool = False) -> Reader:
    """Raises `DataError` for a separator that cannot be used."""
    if recipe.format == "parquet":
        return ParquetRows(recipe.column, recipe.longest, skip_broken)
    if recipe.format == "jsonl":
        return JsonLines(recipe.column, recipe.longest, skip_broken)
    return PlainText(recipe.separator, recipe.longest, skip_broken)


def cut(recipe: Recipe, sources: Sequence[Source]) -> list[Block]:
    """The blocks of all sources, in the order in which they are read. Raises `DataError` for a source of another kind
    than the recipe's."""
    reader = reader_of(recipe)
    with ThreadPoolExecutor() as pool:  # of parquet files the ends are read, which may be far away
        found = pool.map(lambda number: reader.blocks(number, sources[number], recipe.block_bytes), range(len(sources)))
        blocks = list(chain.from_iterable(found))
    if not blocks:
        raise DataError(f"the {len(sources)} source file(s) hold no documents: check --from")
    return [blocks[place] for place in permutation(recipe.seed, "blocks", len(blocks))]


def check_folder(out: Path, plan: Plan) -> DataManifest | None:
    """What `out` holds if it is finished. Raises `DataError` if it is neither new, nor empty, nor of an equal plan."""
    if (out / MANIFEST).exists():
        finished = read_manifest(out)
        check_same(out, finished.plan, plan)
        return finished
    if (out / PLAN).exists():
        check_same(out, read_model(out / PLAN, Plan), plan)
    elif out.exists():
        foreign = sorted(path.name for path in out.iterdir() if path.name not in (LOCKS, part_name(PLAN)))
        if foreign:
            raise DataError(f"--out {out} holds {foreign[0]}, which is none of ours: give a new folder")
    return None


def prepare(
    out: Path,
    plan: Plan,
    sources: Sequence[Source],
    blocks: Sequence[Block],
    tokenizer: DocumentTokenizer,
    *,
    tell: Callable[[Advance], None],
    skip_broken: bool = False,
) -> DataManifest:
    """Writes the shards of `plan`, whose sources and blocks (`cut`) these are; a finished folder stays as it is.

    `skip_broken` leaves out, and counts, documents that cannot be read. It is no part of the plan: whoever is stopped
    by one of them goes on with it. One process at a time. Raises `DataError`, or `OSError` when the disk is full: what
    was kept until then is kept, and the same call goes on from there.
    """
    finished = check_folder(out, plan)
    if finished is not None:
        _clear(out)
        return finished
    if not (out / PLAN).exists():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / PLAN, (plan.model_dump_json(indent=1) + "\n").encode())
    if not (out / TOKENIZER).exists():
        write_whole(out / TOKENIZER, tokenizer.raw)
    progress = _Work(
        out, plan.recipe, sources, blocks, tokenizer, reader_of(plan.recipe, skip_broken=skip_broken)
    ).whole(tell)
    counts = progress.counts
    if not counts.training or not counts.held_out:
        _abandon(out, progress)
        raise DataError(_nothing(plan.recipe, counts))
    manifest = DataManifest(recipe=plan.recipe, counts=counts, shards=progress.full, sources=plan.sources)
    write_whole(out / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    _clear(out)
    return manifest


class _Work:
    """One preparation, from its last journal to its end."""

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        sources: Sequence[Source],
        blocks: Sequence[Block],
        tokenizer: DocumentTokenizer,
        reader: Reader,
    ) -> None:
        self._out, self._recipe, self._sources, self._blocks = out, recipe, sources, blocks
        self._tokenizer, self._reader = tokenizer, reader
        self._progress = read_progress(out)
        name_full(out, self._progress.full)
        self._read = [0, *accumulate(block.size for block in blocks)]
        self._training = self._part(held_out=False)
        self._held_out = self._part(held_out=True)

    def _part(self, *, held_out: bool) -> Part:
        recipe = self._recipe
        return Part(self._out, held_out=held_out, dtype=recipe.dtype, most=recipe.shard_tokens, progress=self._progress)

    def whole(self, tell: Callable[[Advance], None]) -> Progress:
        recipe = self._recipe
        stream = windows(
            self._blocks, self._documents, seed=recipe.seed, size=recipe.window, start=self._progress.cursor
        )
        try:
            tell(self._advance())
            for window, cursor in ahead(stream):
                counts = self._pack(window, cursor, tell)
                self._keep(place=cursor.place, taken=cursor.taken, windows=cursor.windows, counts=counts)
                tell(self._advance())
            for part in (self._training, self._held_out):
                part.fill()
            self._keep()
        finally:
            self._training.close()
            self._held_out.close()
        return self._progress

    def _documents(self, block: Block) -> Iterator[str | LeftOut]:
        return self._reader.documents(self._sources[block.source], block)

    def _pack(self, window: Window, cursor: Cursor, tell: Callable[[Advance], None]) -> Counts:
        """Appends the documents of the window, which ends at `cursor`, to their shards; how many there are with it."""
        counts, before = self._progress.counts, self._advance()
        kept = {False: counts.training, True: counts.held_out}
        too_long = counts.too_long + window.left_out[LeftOut.TOO_LONG]
        length = self._read[cursor.place] - before.read
        seen, told, tokens = 0, 0, before.tokens
        for text, ids in zip(window.texts, self._tokenizer.encode(window.texts), strict=True):
            side = held_out(text, self._recipe.held_out)
            if (self._held_out if side else self._training).add(ids):
                kept[side] += 1
                tokens += len(ids)
            else:
                too_long += 1
            seen += len(text)
            if seen - told >= TOLD:
                told = seen
                tell(Advance(before.read + length * seen // window.size, before.total, sum(kept.values()), tokens))
        return Counts(
            training=kept[False],
            held_out=kept[True],
            empty=counts.empty + window.left_out[LeftOut.EMPTY],
            too_long=too_long,
            broken=counts.broken + window.left_out[LeftOut.BROKEN],
        )

    def _keep(self, **changes: int | Counts) -> None:
        """Makes what was added since the last call, and `changes`, part of what a killed run goes on from."""
        parts = (self._training, self._held_out)
        for part in parts:
            part.flush()
        state = {
            "full": [shard for part in parts for shard in part.full],
            "training": self._training.open,
            "held_out": self._held_out.open,
        }
        known = {shard.name for shard in self._progress.full}
        self._progress = self._progress.model_copy(update=state | changes)
        keep(self._out, self._progress)
        name_full(self._out, [shard for shard in self._progress.full if shard.name not in known])

    def _advance(self) -> Advance:
        progress = self._progress
        return Advance(
            read=self._read[progress.place],
            total=self._read[-1],
            documents=progress.counts.training + progress.counts.held_out,
            tokens=sum(shard.tokens for shard in progress.full) + progress.training.tokens + progress.held_out.tokens,
        )


def _clear(out: Path) -> None:
    """Removes what only an unfinished folder needs."""
    for name in (JOURNAL, PLAN):
        (out / name).unlink(missing_ok=True)


def _abandon(out: Path, progress: Progress) -> None:
    """Removes everything: nobody can go on from here. Without a journal the work begins anew, without a plan the folder
    is nobody's: that order, since this may be cut short too."""
    for name in (JOURNAL, *(shard.name for shard in progress.full), TOKENIZER, PLAN):
        (out / name).unlink(missing_ok=True)


def _nothing(recipe: Recipe, counts: Counts) -> str:
    kept = counts.training + counts.held_out
    if kept:
        part = "is held out" if not counts.held_out else "is left to train on"
        change = "raise" if not counts.held_out else "lower"
        return f"none of {kept} documents {part} at --held-out {recipe.held_out}: {change} it, or prepare more"
    lost = (
        f"all {counts.empty + counts.too_long + counts.broken} documents were left out, {counts.empty} empty, "
        f"{counts.broken} broken"
    )
    if counts.too_long:
        return (
            f"{lost} and {counts.too_long} longer than {recipe.longest} bytes or a shard: raise --longest, or name a "
            "--separator"
        )
    return f"{lost} and 0 too long: check --column and --from"
