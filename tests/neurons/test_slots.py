"""Nobody can know which windows are picked while their heads may still be acknowledged."""

from types import SimpleNamespace
from typing import cast

import pytest

from neurons.node import Node
from neurons.slots import slot_seed
from subnet.swarm.roster import Roster
from subnet.trust.heads import slot_of


@pytest.mark.parametrize(("slot_blocks", "delay"), [(8, 1), (17, 4), (100, 10)])
async def test_a_slots_seed_is_of_a_block_after_all_of_its_blocks(slot_blocks: int, delay: int) -> None:
    asked: list[tuple[int, str]] = []

    async def seed(block: int, purpose: str) -> bytes:
        asked.append((block, purpose))
        return b""

    audit = SimpleNamespace(slot=slot_blocks, seed_delay=delay)
    node = SimpleNamespace(loaded=SimpleNamespace(manifest=SimpleNamespace(audit=audit)), seed=seed)
    first = 1_000
    for slot in range(3):
        await slot_seed(cast("Node", node), cast("Roster", SimpleNamespace(block=first)), slot)
        block, purpose = asked[-1]
        last = max(offset for offset in range(4 * slot_blocks) if slot_of(offset, slot_blocks) == slot)
        assert block == first + last + delay
        assert purpose == "orion/slot/1"
    assert len({block for block, _ in asked}) == 3
