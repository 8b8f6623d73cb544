"""What this machine has that a node computes with or may run out of: memory, a card, room on a disk, open files.

Facts only, read at the moment of asking; what a stage needs of them is `neurons/needs.py`. A container is judged by its
own limits where the kernel tells them (cgroup v2), not by its host's.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from model.relief import brief

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


class DeviceError(Exception):
    """A device that a node cannot compute on: one line with its name and the remedy."""


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


def room(out: Path, device: torch.device) -> Room:
    """Of a node that writes to `out` and computes on `device`."""
    disk = free_disk(out) + held_bytes(out)
    return Room(memory=free_memory(), disk=disk, files=open_files()[0], card=card(device))


def named_device(asked: str) -> torch.device:
    """What `--device` stands for on this machine; `auto` is the first card if there is one, else the CPU.

    Raises `DeviceError` for a card that is not there.
    """
    count = torch.cuda.device_count()
    if asked == "cpu" or (asked == "auto" and not count):
        return torch.device("cpu")
    number = int(asked.partition(":")[2] or 0)
    if not count:
        built = "" if torch.version.cuda else f", and torch {torch.__version__} is built without CUDA"
        raise DeviceError(
            f"--device {asked}: torch sees no GPU here{built}: see that nvidia-smi lists one and install a torch built "
            "for CUDA, or give --device cpu"
        )
    if number >= count:
        raise DeviceError(f"--device {asked}: torch sees {count} here, cuda:0 to cuda:{count - 1}: give one of these")
    return torch.device("cuda", number)


def device_of(asked: str) -> torch.device:
    """The same, once it has computed something. Raises `DeviceError` also for a card that does not compute."""
    device = named_device(asked)
    if device.type == "cpu":
        return device
    try:  # an old driver, a card too old for this torch or one that another process holds alone show only now
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        raise DeviceError(
            f"--device {asked}: {device} does not compute ({brief(error)}): update the driver that nvidia-smi shows, "
            "give another card, or --device cpu"
        ) from error
    return device


def free_memory() -> int:
    """Bytes of host memory that a new process can take."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(_MEMINFO), re.MULTILINE)
    if found is None:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, limit, used = 1024 * int(found[1]), _text(_CGROUP / "memory.max"), _text(_CGROUP / "memory.current")
    return min(free, max(0, int(limit) - int(used))) if limit.isdigit() and used.isdigit() else free


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds."""

    bytes: int
    """Of memory that is resident."""
    files: int
    """Descriptors: files, sockets and pipes."""
    tasks: int
    """Of the running event loop."""


def footprint() -> Footprint:
    """Of this process. Where the system does not say what is resident now: the most that ever was."""
    pages = _text(Path("/proc/self/statm")).split()
    resident = (
        int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
        if pages
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return Footprint(resident, len([*Path("/dev/fd").iterdir()]), len(asyncio.all_tasks()))


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


def card(device: torch.device) -> Card | None:
    """The GPU that `device` is, None if it is none. Raises `RuntimeError` for one that does not answer."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    free, memory = torch.cuda.mem_get_info(device)
    return Card(name=properties.name, capability=(properties.major, properties.minor), memory=memory, free=free)


def _text(path: Path) -> str:
    """A kernel's file, empty where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
