"""`orion export`: the weights of a run's folder as one Hugging Face folder.

Manifest and checkpoints come from the run's folder, the tokenizer from the corpus in the cache whose hash the manifest
names, the model card's facts from the validators' event logs.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console

from model.checkpoint import CheckpointError
from model.config import ConfigError
from model.corpus import find_tokenizer
from model.data import DataError
from model.export import ExportError, ExportSource, export
from neurons.telemetry import Validated, read_events
from neurons.vault import stage_file
from scripts.localnet import cache_folder
from scripts.progress import ProgressView
from subnet.manifest import LoadedManifest, ManifestError, load_manifest

GIGABYTE = 1_000_000_000
_ROUND = re.compile(r"round-(\d+)\.safetensors")
_VALIDATED = '"kind":"validated"'


def export_run(*, run: Path, out: Path, number: int | None, tokenizer: Path | None, shard_gb: float) -> int:
    """Export round `number` of `run`, by default the newest that every stage has; 0 done, 1 refused."""
    try:
        loaded = load_manifest(run / "manifest.toml")
        source = _source(run, loaded, number, tokenizer)
        with ProgressView(Console(stderr=True, soft_wrap=True, markup=False, highlight=False)) as view:
            exported = export(source, out, shard_bytes=int(shard_gb * GIGABYTE), tell=view.show)
    except (ManifestError, ConfigError, DataError, CheckpointError, ExportError) as error:
        print(f"orion export: {error}", file=sys.stderr)
        return 1
    kind = "plain Llama" if exported.plain else "Llama with boundaries: load with trust_remote_code=True"
    print(f"{out}: {exported.parameters:,} parameters ({kind}), round {source.round}, {exported.shards} weight file(s)")
    for name, value in source.facts.items():
        print(f"{name}: {value}")
    return 0


def _source(run: Path, loaded: LoadedManifest, number: int | None, tokenizer: Path | None) -> ExportSource:
    manifest = loaded.manifest
    stages = manifest.swarm.stages
    chosen = _newest(run, stages) if number is None else number
    return ExportSource(
        name=manifest.run.name,
        config=manifest.model.config(),
        wire_dtype=manifest.model.wire_dtype,
        checkpoints=[run / stage_file(stage, chosen) for stage in range(stages)],
        manifest_hash=loaded.digest.hex(),
        round=chosen,
        tokenizer=tokenizer or _tokenizer(loaded),
        facts=_facts(run, chosen),
    )


def _newest(run: Path, stages: int) -> int:
    """The newest round of which every stage has a file. Raises `ExportError` naming what each stage has."""
    held = [_rounds((run / stage_file(stage, 0)).parent) for stage in range(stages)]
    complete = set.intersection(*held)
    if not complete:
        have = ", ".join(f"stage {stage}: {max(rounds, default='none')}" for stage, rounds in enumerate(held))
        raise ExportError(
            f"{run} has no round with checkpoints of all {stages} stages (newest of {have}): give another --run"
        )
    return max(complete)


def _rounds(folder: Path) -> set[int]:
    return {int(match[1]) for path in folder.glob("round-*") if (match := _ROUND.fullmatch(path.name))}


def _tokenizer(loaded: LoadedManifest) -> Path:
    cache = cache_folder()
    found = find_tokenizer(cache, [shard.sha256 for shard in loaded.manifest.data.shards])
    if found is None:
        raise ExportError(
            f"{cache} holds no corpus with the manifest's shards: give its tokenizer with --tokenizer FILE"
        )
    return found


def _facts(run: Path, number: int) -> dict[str, str]:
    """What the validators measured at the start of round `number`, as rows of the model card.

    Other events are not read, so a run of another version exports too; nor is a line that a killed node left
    unfinished.
    """
    facts = {}
    for log in sorted((run / "events").glob("*.jsonl")):
        lines = [line for line in log.read_text().splitlines(keepends=True) if _VALIDATED in line and line[-1] == "\n"]
        for stamped in read_events(lines):
            event = stamped.event
            if isinstance(event, Validated) and event.round == number:
                facts[f"validation loss ({log.stem})"] = (
                    f"{event.loss} nats per token, {event.tokens:,} held-out tokens"
                )
    return facts
