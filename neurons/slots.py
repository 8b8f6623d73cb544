"""The seeds of a round's slots, as everybody reads them from the chain, and what a miner keeps by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from model.layout import Layout
from neurons.archive import RoundArchive
from neurons.node import Node
from neurons.quota import Audience
from subnet.manifest import Manifest
from subnet.swarm.observers import Observer, observers, shares
from subnet.swarm.roster import Roster
from subnet.trust.audit import select_windows
from subnet.trust.heads import WindowHead, slot_end, slots_in
from subnet.trust.pool import Pool
from subnet.trust.quota import Sizes


def slots_of(manifest: Manifest) -> int:
    """Slots of a round."""
    return slots_in(manifest.round.close, manifest.audit.slot, manifest.audit.grace)


async def slot_seed(node: Node, roster: Roster, slot: int) -> bytes:
    """Nobody knows it before the slot has ended."""
    rules = node.loaded.manifest.audit
    return await node.seed(roster.block + slot_end(slot, rules.slot) + rules.seed_delay, "orion/slot/1")


async def slot_seeds(node: Node, roster: Roster) -> list[bytes]:
    """By slot, once the last of them is known."""
    return [await slot_seed(node, roster, slot) for slot in range(slots_of(node.loaded.manifest))]


async def watchers(node: Node, roster: Roster) -> dict[str, Observer]:
    """Validators at work in a round: with overlap the next round's records follow before CUT."""
    marks = node.loaded.manifest.round
    state = await node.state(roster.block + min(marks.cut, marks.length - 1))
    return observers(state, node.loaded.run_id)


def pick(
    heads: Iterable[WindowHead], *, seed: bytes, hotkey: str, slot: int, count: float, layout: Layout
) -> dict[int, Pool]:
    """The windows of a slot that its seed picks, by version, each with the pieces of its states that may be asked
    for."""
    return {
        head.version: Pool.of(layout, seed=seed, hotkey=hotkey, version=head.version)
        for head in select_windows(heads, seed=seed, hotkey=hotkey, slot=slot, count=count)
    }


async def keep_picked(
    node: Node, roster: Roster, held: RoundArchive, layout: Layout, sizes: Sizes, current_slot: Callable[[], int]
) -> None:
    """Leave of each slot only the windows that its seed picks, and of them what it names, as soon as it is known. Ends
    with the last slot, when it is known too who may ask for them.

    `current_slot` is that of a window which closes now. Raises `ChainError`.
    """
    hotkey, count = node.identity.hotkey, node.loaded.manifest.audit.windows
    for slot in range(slots_of(node.loaded.manifest)):
        seed = await slot_seed(node, roster, slot)
        held.reach(current_slot())
        held.seeded(slot, partial(pick, seed=seed, hotkey=hotkey, slot=slot, count=count, layout=layout))
    held.audience = Audience(shares(await watchers(node, roster)), sizes)
