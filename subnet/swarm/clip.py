"""No source moves a merge much further than its siblings do.

A contribution whose norm is above `clip` times the lower median of all norms is scaled down to that. Audits find who
sends a false one with some probability per round; this bounds what it does until then, and in a round whose windows
nobody looks into. Who has worked up to `clip` times as much as the median is not touched.

Every replica has to scale by the same bits, and a sum of floats depends on the order in which a machine takes them; so
norms are sums of integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

STEPS = 1 << 20
"""A value counts in steps of the largest magnitude / 2^20: what is below half a step counts nothing."""
CHUNK = 1 << 22
"""Values summed at once: 2^22 squares of at most 2^40 fit 63 bits."""


def norm(values: torch.Tensor) -> float:
    """The Euclidean norm of finite fp32 values (n,) on the CPU, the same bits on every machine.

    Within 1e-6 of the largest magnitude times sqrt(n).
    """
    flat = values.numpy()
    top = float(np.abs(flat).max(initial=0.0))
    if top == 0.0:
        return 0.0
    scale, total = STEPS / top, 0
    for start in range(0, flat.size, CHUNK):
        steps = np.rint(flat[start : start + CHUNK].astype(np.float64) * scale).astype(np.int64)
        total += int((steps * steps).sum())
    return top / STEPS * math.sqrt(total)


def factors(norms: Sequence[float], clip: float) -> tuple[float, ...]:
    """What each contribution is multiplied by, at most 1. Who contributes nothing has no say in the median."""
    moved = sorted(size for size in norms if size > 0)
    if not moved:
        return (1.0,) * len(norms)
    most = clip * moved[(len(moved) - 1) // 2]
    return tuple(min(1.0, most / size) if size > 0 else 1.0 for size in norms)
