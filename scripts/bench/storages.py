"""Bytes of tensors that are alive, counted on any device: what a CUDA allocator would report, without one.

Every operator's outputs are watched by their storages, so views count once, and what only a graph holds counts too.
Not seen: what an operator allocates and frees inside itself, and what was made before the counting began.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within `with Storages() as alive`: `alive.bytes()` at any time, `alive.peak` the most there were at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self._watched[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        """Bytes of what was made inside and is alive."""
        dead = [key for key, (watched, _) in self._watched.items() if watched.expired()]  # type: ignore[no-untyped-call]
        for key in dead:
            del self._watched[key]
        return sum(count for _, count in self._watched.values())
