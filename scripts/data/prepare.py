"""`orion data prepare`: token shards in a folder, from sources wherever they lie; killed at any moment it goes on."""

from __future__ import annotations

import sys

from rich.console import Console

from model.config import ModelConfig
from model.corpora.folder import DataManifest, Plan, Recipe, SourceEntry
from model.corpora.prepare import LOCKS, Advance, check_folder, cut, prepare
from model.corpora.tokenise import DocumentTokenizer
from model.data import DataError
from scripts.data.addresses import find_sources
from scripts.data.options import DataOptionError, PrepareOptions
from scripts.data.report import print_summary
from scripts.locks import Lock, StillRunning
from scripts.progress import ProgressView

BLOCK_BYTES = 1 << 20
"""Some sixteen blocks from all over the sources are in one window."""
WINDOW = 16 << 20
"""Characters: half a minute of work on one core, which is the most that a kill costs."""


def prepare_data(options: PrepareOptions, *, plain: bool, as_json: bool) -> int:
    """Prepare `options.out`; 0 done, 1 failed, 2 usage, 130 stopped by Ctrl-C."""
    try:
        manifest = _prepared(options, plain=plain)
    except DataOptionError as error:
        return _refused(str(error), 2)
    except (DataError, StillRunning) as error:
        return _refused(str(error), 1)
    except OSError as error:
        return _refused(
            f"--out {options.out} cannot be written ({error.strerror or error}): make room or give another folder, "
            "the same command goes on from here",
            1,
        )
    except KeyboardInterrupt:
        return _refused("stopped; the same command goes on from here", 130)
    print_summary(options.out, manifest, as_json=as_json)
    return 0


def _prepared(options: PrepareOptions, *, plain: bool) -> DataManifest:
    config = options.check()
    tokenizer = DocumentTokenizer.open(options.tokenizer, options.end_of_text)
    if config is not None:
        _check_vocabulary(tokenizer, options, config)
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    form, sources = find_sources(options.addresses, options.format, tell=console.print)
    if options.separator is not None and form != "text":
        raise DataOptionError(f"--separator is for text files, the sources are {form}: leave it out")
    recipe = Recipe(
        format=form,
        column=options.column,
        separator=options.separator,
        longest=options.longest,
        seed=options.seed,
        held_out=options.held_out,
        shard_tokens=options.shard_tokens,
        block_bytes=BLOCK_BYTES,
        window=WINDOW,
        end_of_text=tokenizer.mark,
        tokenizer=tokenizer.sha256,
        vocab=tokenizer.vocab,
        dtype=tokenizer.dtype,
        tokenizers=tokenizer.version,
    )
    entries = [SourceEntry(name=source.name, size=source.size, identity=source.identity) for source in sources]
    plan = Plan(recipe=recipe, sources=entries)
    check_folder(options.out, plan)  # before a lock is left in it
    blocks = cut(recipe, sources)
    lock = Lock.take(options.out / LOCKS / "prepare")
    try:
        with ProgressView(console, plain=plain) as view:

            def tell(advance: Advance) -> None:
                note = f"{advance.documents:,} documents  {advance.tokens:,} tokens"
                view.show(advance.read, advance.total, note)

            return prepare(options.out, plan, sources, blocks, tokenizer, tell=tell, skip_broken=options.skip_broken)
    finally:
        lock.release()


def _check_vocabulary(tokenizer: DocumentTokenizer, options: PrepareOptions, config: ModelConfig) -> None:
    if tokenizer.vocab > config.vocab:
        raise DataError(
            f"tokenizer {options.tokenizer} has {tokenizer.vocab} ids, model {options.model} takes {config.vocab}: "
            "give a smaller tokenizer or another --model"
        )


def _refused(line: str, status: int) -> int:
    print(f"orion data prepare: {line}", file=sys.stderr)
    return status
