"""What a stage gives up when its device has no memory left: one step of a ladder each time, from whole graphs to none.

Every rung computes the same bits (`model.recompute`), so who goes down in the middle of a step goes on with the same
numbers and pays with time: a forward more for each graph that is not held.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import torch

from model.recompute import Recompute

_SAID = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""By the CPU's allocator, by the driver, by cuBLAS for its workspace: all of them as a plain `RuntimeError`."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What is held of open units between forward and backward."""

    recompute: Recompute
    graphs: int
    """Units whose graph is held at a time."""

    def __str__(self) -> str:
        return f"recompute {self.recompute} with {self.graphs} graphs"

    def lower(self) -> Holding | None:
        """With less memory: selective graphs in place of whole ones, then half as many, then none; None below that."""
        if self.recompute is Recompute.KEEP:
            return replace(self, recompute=Recompute.SELECTIVE)
        if not self.graphs:
            return None
        graphs = self.graphs // 2
        return Holding(Recompute.SELECTIVE if graphs else Recompute.FULL, graphs)


@dataclass(frozen=True, slots=True)
class Relief:
    """One step down, and what the allocator had said."""

    device: str
    before: Holding
    after: Holding
    reason: str


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how an allocator says no, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def brief(error: BaseException) -> str:
    """What it says, in one line without its advice."""
    words = " ".join(str(error).split()) or type(error).__name__
    return ". ".join(words.split(". ")[:2]).rstrip(".")


def release(device: torch.device) -> None:
    """Give back to the device what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
