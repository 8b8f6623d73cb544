"""A validator that audits nothing: it sets the weights that others have set."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping

from neurons.node import Node
from neurons.telemetry import NodeFinished, WeightsSet
from subnet.chain import ChainError

log = logging.getLogger("orion.adversaries.copier")


def mean_row(rows: Mapping[int, Mapping[int, float]], *, own: int) -> dict[int, float]:
    """The mean of all other validators' rows, by uid."""
    others = [row for uid, row in rows.items() if uid != own and row]
    total: defaultdict[int, float] = defaultdict(float)
    for row in others:
        for uid, weight in row.items():
            total[uid] += weight / len(others)
    return dict(total)


async def copy_weights(node: Node) -> None:
    """Once a round set the mean of what the others have on chain, until the run is over."""
    await node.listen()
    roster = await node.enter()
    count = node.loaded.manifest.round.count
    state = await node.state(roster.block)
    me = state.by_hotkey(node.identity.hotkey)
    assert me is not None, "Node.open has checked that"
    while True:
        over = count > 0 and roster.round >= count
        row = mean_row(await node.chain.weights(), own=me.uid)
        if row:
            try:
                landed = await node.chain.set_weights(row)
            except ChainError as error:
                log.warning("round %d: the copied weights are not set: %s", roster.round, error)
            else:
                node.telemetry.emit(WeightsSet(round=roster.round, block=landed, weights=row))
        if over:
            break
        roster = await node.next_roster()
    node.telemetry.emit(NodeFinished(rounds=roster.round))
