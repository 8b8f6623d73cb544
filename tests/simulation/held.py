"""What a calm simulated swarm holds in memory at two moments of its life, both as long after a round began.

python -m tests.simulation.held FOLDER FIRST SECOND      virtual seconds; prints JSON, {"kinds": ..., "bytes": ...}
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
from collections import Counter
from pathlib import Path

import bittensor_core
import numpy as np
import torch

from scripts.sim.clock import SimLoop
from scripts.sim.play import prepare
from scripts.sim.world import Size, World
from subnet.identity import SCHEME

SIZE = Size(stages=2, replicas=2, joiners=0, validators=1, minutes=30, round_blocks=20)
ROUND_SECONDS = SIZE.round_blocks * SIZE.block_time
FLOORS = ("subnet.", "neurons.", "model.")
CHAIN = ("subnet.metagraph.", "subnet.localchain.")
"""The simulation's own chain remembers every block; a node's does not."""


def held() -> tuple[Counter[str], int]:
    """Objects by kind, Orion's own and Python's together as `other`, and bytes of all tensors."""
    gc.collect()
    kinds, stores = Counter[str](), dict[int, int]()
    for thing in gc.get_objects():
        kind = type(thing)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not name.startswith(CHAIN):
            kinds[name if name.startswith(FLOORS) else "other"] += 1
        if issubclass(kind, torch.Tensor):
            store = thing.untyped_storage()
            stores[store.data_ptr()] = store.nbytes()
    return kinds, sum(stores.values())


def main(folder: str, *moments: str) -> None:
    SCHEME.set(bittensor_core.CRYPTO_ED25519)
    torch.set_num_threads(1)
    prepare()
    loop = SimLoop(np.random.default_rng((1, 1)))
    asyncio.set_event_loop(loop)
    logging.getLogger().handlers = [logging.NullHandler()]
    world = World(loop, 1, SIZE, Path(folder))
    found: list[tuple[Counter[str], int]] = []
    for moment in moments:
        loop.call_at(float(moment), lambda: found.append(held()))
    loop.run_until_complete(world.run([]))
    json.dump({"kinds": [dict(kinds) for kinds, _ in found], "bytes": [size for _, size in found]}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
