"""The check of the disk that `--out` is on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neurons.needs import Needs
from scripts.doctor.machine import down
from scripts.doctor.report import Finding, fail, ok, skipped, warn
from subnet.quantities import written

VALIDATOR = 10**9
"""Bytes that a validator writes, roughly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    out: Path
    free: int
    """Bytes, what nodes have written there before included."""
    problem: str = ""
    """Why nothing can be written there."""


def check_disk(disk: Disk, needs: Needs | None, *, evidence_disk: int, checkpoints_here: bool, role: str) -> Finding:
    """
    Args:
        needs: of the stage that needs most; None without a manifest, and not read of a validator, which keeps little.
        evidence_disk: the option, bytes.
        checkpoints_here: whether checkpoints go to `out` and not to a store.
    """
    if disk.problem:
        return fail("disk", f"--out {disk.out} cannot be written: {disk.problem}", "--out with a folder of your own")
    free = f"{down(disk.free)} free under {disk.out}"
    if role == "validator":
        if disk.free < VALIDATOR:
            return fail("disk", f"{free}; logs and states take {written(VALIDATOR)}", "--out on another disk")
        return ok("disk", free)
    if needs is None:
        return skipped("disk", f"{free}; how much is needed: needs --manifest")
    return _miner(disk, free, needs, evidence_disk=evidence_disk, checkpoints=needs.checkpoints * checkpoints_here)


def _miner(disk: Disk, free: str, needs: Needs, *, evidence_disk: int, checkpoints: int) -> Finding:
    found = f"{free}; checkpoints {written(checkpoints)}, evidence {written(needs.evidence)} or more"
    limit = f"--evidence-disk {written(evidence_disk)}"
    if needs.evidence + checkpoints > disk.free:
        return fail("disk", found, "--out on another disk, or make room; --checkpoints takes a store (s3://…)")
    if evidence_disk < needs.evidence:
        return fail("disk", f"{found}, and {limit} is less", f"--evidence-disk {written(needs.evidence)}")
    spare = disk.free - checkpoints
    if evidence_disk > spare:
        return warn("disk", f"{found}, and {limit} would fill it", f"--evidence-disk {down(spare)}")
    return ok("disk", f"{found}, at most {limit}")
