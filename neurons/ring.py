"""How much host memory a miner needs to answer for its work: what `--ring` must be at least.

At worst every picked window of the rounds that are answered for is held with two states of its own, while the windows
of a slot come and go: as many as a seed picks, and the one that is open. Where windows are shorter than slots, a ring
of this size gives up some before their seed is known; one that holds all windows of a slot gives up none.
"""

from __future__ import annotations

from model.split import StagePlan
from neurons.archive import ROUNDS
from neurons.drive import DEPTH_LIMIT_PER_STAGE
from neurons.slots import slots_of
from subnet.manifest import Manifest
from subnet.messages import Shapes
from subnet.transport.synapse import wire_bytes

VALUE_BYTES = 4
VALUES_OF_A_STATE = 3
"""Per parameter: itself and its two moments."""


def capacity_of(plan: StagePlan) -> int:
    """Inputs that a stage may hold open."""
    return 2 * DEPTH_LIMIT_PER_STAGE * plan.count


def state_bytes(parameters: int) -> int:
    """Of a stage's weights and moments."""
    return VALUE_BYTES * VALUES_OF_A_STATE * parameters


def window_bytes(manifest: Manifest, plan: StagePlan, parameters: int) -> int:
    """The most that one window holds: two states, the backward units of a step, and the forward units that can be
    computed meanwhile, those still open included."""
    shapes, backward = Shapes.of(manifest), manifest.optimizer.accumulation
    forward = 0 if plan.is_last else backward + capacity_of(plan)
    return (
        2 * state_bytes(parameters)
        + forward * wire_bytes(shapes.unit(plan, backward=False))
        + backward * wire_bytes(shapes.unit(plan, backward=True))
    )


def least_ring(manifest: Manifest, plan: StagePlan, parameters: int) -> int:
    """Bytes below which a miner of this stage could not show what is picked."""
    picked = ROUNDS * slots_of(manifest) * manifest.audit.windows
    cuts = ROUNDS * VALUES_OF_A_STATE * VALUE_BYTES * parameters
    return cuts + (picked + manifest.audit.windows + 1) * window_bytes(manifest, plan, parameters)
