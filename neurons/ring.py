"""How much host memory a miner needs to answer for its work: what `--ring` must be at least.

At worst every picked window of the rounds that are answered for is held with two states of its own, while the windows
of a slot come and go: as many as a seed picks, and the one that is open. Where windows are shorter than slots, a ring
of this size gives up some before their seed is known; one that holds all windows of a slot gives up none.
"""

from __future__ import annotations

import math

from model.split import StagePlan
from neurons.archive import ROUNDS
from neurons.drive import DEPTH_LIMIT_PER_STAGE
from neurons.slots import slots_of
from subnet.manifest import Manifest
from subnet.messages import Shapes
from subnet.trust.quota import Sizes


def capacity_of(plan: StagePlan) -> int:
    """Inputs that a stage may hold open."""
    return 2 * DEPTH_LIMIT_PER_STAGE * plan.count


def window_bytes(manifest: Manifest, plan: StagePlan, sizes: Sizes) -> int:
    """The most that one window holds: two states, the backward units of a step, and the forward units that can be
    computed meanwhile, those still open included."""
    backward = manifest.optimizer.accumulation
    forward = 0 if plan.is_last else backward + capacity_of(plan)
    return 2 * sizes.state + forward * sizes.forward + backward * sizes.backward


def least_ring(manifest: Manifest, plan: StagePlan, parameters: int) -> int:
    """Bytes below which a miner of this stage could not show what is picked."""
    sizes = Sizes.of(plan, parameters, Shapes.of(manifest))
    windows = math.ceil(manifest.audit.windows)
    picked = ROUNDS * (slots_of(manifest) * windows + 1)  # and one before which a merge is taken over
    cuts = ROUNDS * sizes.state  # of three vectors each
    return cuts + ROUNDS * sizes.state // 3 + (picked + windows + 1) * window_bytes(manifest, plan, sizes)
