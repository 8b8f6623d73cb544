"""Checks of the run: the manifest is the one on chain, and its data are here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.data import DataError
from neurons.node import open_corpus
from scripts.doctor.chain import OnChain
from scripts.doctor.options import DoctorOptions
from scripts.doctor.report import Finding, fail, ok, skipped
from subnet.manifest import LoadedManifest, ManifestError, check_announced, check_space
from subnet.quantities import written


def check_manifest(
    loaded: LoadedManifest | None, problem: str, chain: OnChain | None, hotkey: str | None, options: DoctorOptions
) -> Finding:
    """`problem`: why it could not be read."""
    if problem:
        return fail("manifest", problem, "--manifest with the file that the run's authority published")
    if loaded is None:
        return skipped("manifest", "needs --manifest")
    manifest = loaded.manifest
    name = f"{manifest.run.name}, hash {loaded.digest.hex()[:16]}"
    if manifest.run.netuid != options.netuid:
        return fail(
            "manifest",
            f"{name}: it is for netuid {manifest.run.netuid}, not {options.netuid}",
            f"--netuid {manifest.run.netuid}",
        )
    if options.stage is not None and options.stage >= manifest.swarm.stages:
        return fail("manifest", f"{name}: it has no stage {options.stage}", f"--stage 0 to {manifest.swarm.stages - 1}")
    if chain is None:
        return skipped("manifest", f"{name} can be read; whether it is the announced one: needs the chain")
    return _on_chain(loaded, name, chain, hotkey)


def _on_chain(loaded: LoadedManifest, name: str, chain: OnChain, hotkey: str | None) -> Finding:
    manifest = loaded.manifest
    if hotkey == manifest.run.authority:
        return fail(
            "manifest",
            f"{name}: this hotkey is its authority, whose commitment a node's record would replace",
            "--hotkey with another one",
        )
    authority = chain.state.by_hotkey(manifest.run.authority)
    try:
        check_announced(loaded, authority.record if authority else None)
        if chain.space_limit is not None:
            check_space(manifest, chain.state.tempo, chain.space_limit)
    except ManifestError as error:
        return fail("manifest", str(error), "--manifest with the file whose sha256sum the authority has on chain")
    return ok("manifest", f"{name}, as announced on chain; {manifest.swarm.stages} stages")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """What is there of the manifest's data."""

    count: int
    bytes: int
    missing: tuple[str, ...]
    broken: str = ""
    """What a look at the content has found."""
    hashed: bool = False


def look_at_shards(loaded: LoadedManifest, folder: Path, *, deep: bool) -> Shards:
    """Whether they are there; `deep` reads them whole."""
    shards = loaded.manifest.data.shards
    sizes = {shard.name: _size(folder / shard.name) for shard in shards}
    missing = tuple(name for name, size in sizes.items() if not size)
    broken = ""
    if deep and not missing:
        try:
            open_corpus(loaded, folder)
        except (DataError, OSError) as error:
            broken = str(error)
    return Shards(
        count=len(shards), bytes=sum(sizes.values()), missing=missing, broken=broken, hashed=deep and not missing
    )


def check_data(shards: Shards | None, options: DoctorOptions) -> Finding:
    if shards is None:
        return skipped("data", "needs --manifest and --data")
    if shards.missing:
        more = f" and {len(shards.missing) - 1} more" if len(shards.missing) > 1 else ""
        return fail(
            "data",
            f"{len(shards.missing)} of {shards.count} shards missing or empty in {options.data}: "
            f"{shards.missing[0]}{more}",
            "copy the run's shards there, or --data with their folder",
        )
    if shards.broken:
        return fail("data", shards.broken, "copy that shard again from its publisher")
    found = f"{shards.count} shards, {written(shards.bytes)}"
    if shards.hashed:
        return ok("data", f"{found}, hashes as in the manifest")
    return ok("data", f"{found}; their hashes were not looked at (--deep does, a node does when it starts)")


def check_uplink(options: DoctorOptions, *, least: float) -> Finding:
    """What is declared, in bits per second."""
    found = f"--uplink says {options.uplink / 1e6:g} Mbit/s"
    if options.role == "miner" and options.uplink < least:
        return fail(
            "uplink",
            f"{found}, and validators count on {least / 1e6:g} Mbit/s from every miner",
            "another line, or what it really has",
        )
    return ok("uplink", found)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
