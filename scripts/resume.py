"""The folder of a local run: what it was started with, and whether it can go on.

`localnet.json` holds the options, written once when the manifest is on chain: from then on a run can be resumed after
everything has died at any instant.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scripts.adversaries import Adversary, AdversaryOptionError
from scripts.faults import FaultError, parse_faults
from scripts.options import Codec, LocalnetError, LocalnetOptions, Optimizer, check_options

FILE = "localnet.json"
CHAIN_FILE = Path("chain") / "chain.sqlite"


class ResumeError(LocalnetError):
    """A run that cannot go on: one line with the folder and the remedy."""


class RunFile(BaseModel):
    """The content of `localnet.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    started_at: float
    """Seconds since the epoch."""
    manifest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of manifest.toml."""
    data: str
    """Folder with the token shards."""
    stages: int
    replicas: int
    validators: int
    rounds: int
    model: str
    seed: int
    block_time: float
    round_seconds: float
    overlap: bool
    codec: Codec
    optimizer: Optimizer | None
    accumulation: int
    device: str
    latency: str | None
    bandwidth: str | None
    loss: str | None
    faults: dict[str, list[str]]
    """Texts by action."""
    chaos: int | None
    adversaries: list[str]

    @classmethod
    def of(cls, options: LocalnetOptions, *, started_at: float, manifest: str, data: Path) -> Self:
        plain = asdict(options)
        plain["faults"] = {}
        for fault in options.faults:
            plain["faults"].setdefault(fault.action, []).append(fault.text)
        plain["adversaries"] = [adversary.text for adversary in options.adversaries]
        return cls(started_at=started_at, manifest=manifest, data=str(data.absolute()), **plain)

    def options(self) -> LocalnetOptions:
        """Raises `LocalnetError`, `FaultError` or `AdversaryOptionError` for values that `orion localnet` would not
        have taken."""
        plain = self.model_dump(exclude={"version", "started_at", "manifest", "data", "faults", "adversaries"})
        adversaries = tuple(Adversary.parse(text) for text in self.adversaries)
        options = LocalnetOptions(**plain, faults=parse_faults(self.faults), adversaries=adversaries)
        check_options(options)
        return options

    def write(self, folder: Path) -> None:
        """Whole or not at all."""
        temporary = folder / f".{FILE}"
        with temporary.open("w") as stream:
            stream.write(self.model_dump_json(indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(folder / FILE)


class _Summary(BaseModel):
    """What of `summary.json` decides here."""

    complete: bool = False


def read_run(folder: Path) -> RunFile:
    """The run in `folder`, checked to be one that can go on. Raises `ResumeError`."""
    path = folder / FILE
    try:
        run = RunFile.model_validate_json(path.read_bytes())
        run.options()
    except OSError as error:
        raise ResumeError(
            f"--resume {folder} is not the folder of a run that had begun ({FILE}: {error.strerror}): "
            "give the --out folder of one"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ResumeError(f"{path}: {where}: {first['msg']}; it must be as orion localnet wrote it") from error
    except (LocalnetError, FaultError, AdversaryOptionError) as error:
        raise ResumeError(f"{path}: {error}; it must be as orion localnet wrote it") from error
    _check_files(folder, run)
    return run


def _check_files(folder: Path, run: RunFile) -> None:
    try:
        digest = hashlib.sha256((folder / "manifest.toml").read_bytes()).hexdigest()
    except OSError as error:
        raise ResumeError(f"{folder / 'manifest.toml'} cannot be read ({error.strerror}): restore it") from error
    if digest != run.manifest:
        raise ResumeError(
            f"{folder / 'manifest.toml'} is manifest {digest[:16]}, the run's is {run.manifest[:16]}: restore it"
        )
    if not (folder / CHAIN_FILE).exists():
        raise ResumeError(f"{folder / CHAIN_FILE} is missing, and with it the run's chain: start a new run")
    if not Path(run.data).is_dir():
        raise ResumeError(f"{run.data}, the folder of the run's token shards, is missing: restore it")
    written = folder / "summary.json"
    try:
        done = written.exists() and _Summary.model_validate_json(written.read_bytes()).complete
    except ValidationError as error:
        raise ResumeError(f"{written} cannot be read: remove it and resume again") from error
    if done:
        raise ResumeError(f"--resume {folder} is complete, all {run.rounds} rounds: see {written}")
