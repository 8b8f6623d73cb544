"""How much host memory a miner needs to answer for its work: what `--ring` must be at least.

What is picked lies on disk; the windows of a slot come and go whole: as many as a seed picks, which are held until they
are written, and the one that is open. At the end of a round comes what its cut was taken from, until that is written.
Where windows are shorter than slots, a ring of this size gives up some before their seed is known; one that holds all
windows of a slot gives up none.
"""

from __future__ import annotations

import math

from model.layout import Layout
from model.split import StagePlan
from neurons.drive import DEPTH_LIMIT_PER_STAGE
from subnet.manifest import Manifest
from subnet.messages import Shapes
from subnet.trust.audit import POOL
from subnet.trust.cost import PIECE_PARTS
from subnet.trust.polar import look_pieces
from subnet.trust.quota import Sizes
from subnet.trust.tree import HASH_BYTES, PIECE_BYTES, PROOF_LIMIT, pieces_of


def capacity_of(plan: StagePlan) -> int:
    """Inputs that a stage may hold open."""
    return 2 * DEPTH_LIMIT_PER_STAGE * plan.count


def unit_bytes(manifest: Manifest, plan: StagePlan, sizes: Sizes) -> int:
    """The most that the units of one window hold: the backward ones of a step, and the forward ones that can be
    computed meanwhile, those still open included."""
    backward = manifest.optimizer.accumulation
    forward = 0 if plan.is_last else backward + capacity_of(plan)
    return forward * sizes.forward + backward * sizes.backward


def picked_bytes(manifest: Manifest, plan: StagePlan, layout: Layout, sizes: Sizes) -> int:
    """The most that is kept of one window once it is picked: its weights, its units, and the pieces of its states that
    its seed names, those before a merge too, with their proofs."""
    pieces = min(POOL, pieces_of(sizes.flat)) * (PIECE_PARTS + 1)
    pieces += max((look_pieces(place) for place in layout.matrices), default=0)
    return sizes.flat + pieces * (PIECE_BYTES + PROOF_LIMIT * HASH_BYTES) + unit_bytes(manifest, plan, sizes)


def least_ring(manifest: Manifest, plan: StagePlan, layout: Layout) -> int:
    """Bytes below which a miner of this stage could not show what is picked."""
    sizes = Sizes.of(plan, layout, Shapes.of(manifest))
    windows = math.ceil(manifest.audit.windows) + 1  # and one before which a merge is taken over
    weights, cut = sizes.flat, 3 * sizes.flat
    pending = (windows + 1) * (2 * sizes.state + unit_bytes(manifest, plan, sizes)) + weights
    return pending + windows * picked_bytes(manifest, plan, layout, sizes) + cut
