"""What a prepared folder holds (`orion data show`), whether it still does (`verify`), and how a run names it
(`section`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tomli_w

from model.corpora.folder import MANIFEST, DataManifest, read_manifest, verify, verify_tokenizer
from model.data import DataError
from subnet.manifest import DataSection, ShardSection
from subnet.quantities import size


def show_data(folder: Path, *, as_json: bool) -> int:
    """Print what is in `folder`; 0 done, 1 refused."""
    try:
        print_summary(folder, read_manifest(folder), as_json=as_json)
    except DataError as error:
        return _refused("show", error)
    return 0


def verify_data(folder: Path) -> int:
    """Hash everything in `folder`; 0 if all is as `dataset.json` says, 1 if not."""
    wrong = 0
    try:
        manifest = read_manifest(folder)
        verify_tokenizer(folder, manifest)
    except DataError as error:
        return _refused("verify", error)
    for shard in manifest.shards:
        try:
            verify(folder, manifest, shard)
        except DataError as error:
            wrong = _refused("verify", error)
    if not wrong:
        print(f"{folder}: tokenizer and {len(manifest.shards)} shards are as {MANIFEST} says")
    return wrong


def print_section(
    folder: Path, *, sequence: int, batch: int, samples_per_round: int, validation_batches: int, out: Path | None
) -> int:
    """Print a run manifest's [data] section, or write it to `out`; 0 done, 1 refused."""
    try:
        section = data_section(
            read_manifest(folder),
            sequence=sequence,
            batch=batch,
            samples_per_round=samples_per_round,
            validation_batches=validation_batches,
        )
        text = tomli_w.dumps({"data": section.model_dump(mode="json")})
        if out is None:
            print(text, end="")
        else:
            out.write_text(text)
    except DataError as error:
        return _refused("section", error)
    except OSError as error:
        return _refused("section", DataError(f"--out {out} cannot be written ({error.strerror}): change it"))
    return 0


def data_section(
    manifest: DataManifest, *, sequence: int, batch: int, samples_per_round: int, validation_batches: int
) -> DataSection:
    """The section with which `Corpus` trains on exactly the training documents; sizes are at least 1. Raises
    `DataError`."""
    share = manifest.held_out_share(sequence)
    batches = (manifest.windows(sequence)[True] - 1) // batch
    if batches < validation_batches:
        raise DataError(
            f"{validation_batches} validation batches are more than the {batches} of {batch} x {sequence} tokens held "
            "out: lower --validation-batches or --batch, or prepare again with a higher --held-out"
        )
    return DataSection(
        batch=batch,
        sequence=sequence,
        samples_per_round=samples_per_round,
        held_out=share,
        validation_batches=validation_batches,
        shards=[ShardSection(name=e.name, sha256=e.sha256, dtype=e.dtype) for e in manifest.entries],
    )


def print_summary(folder: Path, manifest: DataManifest, *, as_json: bool) -> None:
    """On stdout, in lines or as one JSON object."""
    parts = {
        name: {
            "tokens": manifest.tokens(held_out=held_out),
            "documents": manifest.counts.held_out if held_out else manifest.counts.training,
            "shards": sum(shard.held_out is held_out for shard in manifest.shards),
        }
        for name, held_out in (("training", False), ("held_out", True))
    }
    recipe, counts = manifest.recipe, manifest.counts
    total = sum(source.size for source in manifest.sources)
    if as_json:
        content = {
            "folder": str(folder),
            **parts,
            "left_out": {"empty": counts.empty, "too_long": counts.too_long, "broken": counts.broken},
            "sources": {"files": len(manifest.sources), "bytes": total},
            "recipe": recipe.model_dump(mode="json"),
        }
        print(json.dumps(content, indent=2))
        return
    for name, part in parts.items():
        print(
            f"{name.replace('_', ' ')}: {part['tokens']:,} tokens of {part['documents']:,} documents in "
            f"{part['shards']} shard(s)"
        )
    print(f"left out: {counts.empty:,} empty, {counts.too_long:,} too long, {counts.broken:,} broken documents")
    print(
        f"tokenizer: {recipe.vocab:,} ids as {recipe.dtype}, '{recipe.end_of_text}' before every document, SHA-256 "
        f"{recipe.tokenizer[:16]}…"
    )
    names = ", ".join(source.name for source in manifest.sources[:3]) + (", …" if len(manifest.sources) > 3 else "")
    print(f"sources: {len(manifest.sources):,} {recipe.format} file(s), {size(total)} ({names}); seed {recipe.seed}")
    print(f"next: orion data section {folder}")


def _refused(action: str, error: DataError) -> int:
    print(f"orion data {action}: {error}", file=sys.stderr)
    return 1
