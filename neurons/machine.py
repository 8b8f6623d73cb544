"""What this machine has that a node may run out of: memory, a card, room on a disk, open files.

Facts only, read at the moment of asking; what a stage needs of them is `neurons/needs.py`. A container is judged by its
own limits where the kernel tells them (cgroup v2), not by its host's.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU, as its driver describes it."""

    name: str
    capability: tuple[int, int]
    memory: int
    """Bytes."""
    free: int
    """Bytes that no process has taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What is there now."""

    memory: int
    """Bytes of host memory that a new process can take."""
    disk: int
    """Bytes that can be written where the node writes, what it has written there before included."""
    files: int
    """Files and sockets that this process may have open."""
    card: Card | None = None


def room(out: Path) -> Room:
    """Of a node that writes to `out`."""
    return Room(memory=free_memory(), disk=free_disk(out) + held_bytes(out), files=open_files()[0], card=card())


def free_memory() -> int:
    """Bytes of host memory that a new process can take."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(_MEMINFO), re.MULTILINE)
    if found is None:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, limit, used = 1024 * int(found[1]), _text(_CGROUP / "memory.max"), _text(_CGROUP / "memory.current")
    return min(free, max(0, int(limit) - int(used))) if limit.isdigit() and used.isdigit() else free


def cores() -> float:
    """CPU cores that this process may use."""
    allowed = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    quota, _, period = _text(_CGROUP / "cpu.max").partition(" ")
    return min(allowed, int(quota) / int(period)) if quota.isdigit() and period.isdigit() else allowed


def free_disk(out: Path) -> int:
    """Bytes free on the file system that `out` is on, or will be. Raises `OSError`."""
    return shutil.disk_usage(existing(out)).free


def existing(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above it that does."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def held_bytes(out: Path) -> int:
    """Bytes that nodes have written there which they write again or replace: evidence and checkpoints."""
    total = 0
    for part in ("evidence", "checkpoints", "replicas"):
        for folder, _, names in os.walk(out / part):
            for name in names:
                try:
                    total += (Path(folder) / name).stat().st_size
                except FileNotFoundError:
                    continue  # replaced meanwhile
    return total


def open_files() -> tuple[int, int]:
    """How many files this process may have open, and what it may raise that to without root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**31 - 1
    return (most if soft == resource.RLIM_INFINITY else soft), (most if hard == resource.RLIM_INFINITY else hard)


def card() -> Card | None:
    """The GPU that torch would use first, None if it sees none. Raises `RuntimeError` for one that does not answer."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    free, memory = torch.cuda.mem_get_info(0)
    return Card(name=properties.name, capability=(properties.major, properties.minor), memory=memory, free=free)


def _text(path: Path) -> str:
    """A kernel's file, empty where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
