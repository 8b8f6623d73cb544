"""The seeds of a round's slots, as everybody reads them from the chain."""

from __future__ import annotations

from neurons.node import Node
from subnet.manifest import Manifest
from subnet.swarm.roster import Roster
from subnet.trust.heads import slot_end, slots_in


def slots_of(manifest: Manifest) -> int:
    """Slots of a round."""
    return slots_in(manifest.round.close, manifest.audit.slot, manifest.audit.grace)


async def slot_seeds(node: Node, roster: Roster) -> list[bytes]:
    """By slot, once the last of them is known: nobody knows one before its slot has ended."""
    rules = node.loaded.manifest.audit
    return [
        await node.seed(roster.block + slot_end(slot, rules.slot) + rules.seed_delay, "orion/slot/1")
        for slot in range(slots_of(node.loaded.manifest))
    ]
