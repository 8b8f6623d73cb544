"""The validator: replays units, settles ledgers, scores miners, sets weights, measures validation loss.

    python -m neurons.validator --network ws://127.0.0.1:9944 --wallet w --hotkey validator-0 \\
        --manifest manifest.toml --data shards/

It follows the same roster as the miners. Once a round's roots are on chain and the audit seed is known it fetches every
miner's closed ledger, checks it against its root, replays units of the windows the seed picks, settles what is paid,
and sets weights. Losses and scores are computed here, from public evidence.
"""

from __future__ import annotations

import asyncio
import sys

from neurons.auditing import Auditor
from neurons.follower import PublicStates
from neurons.node import Node, main
from neurons.notary import Notary
from neurons.telemetry import NodeFinished, RoundStarted
from subnet.swarm.record import Flags, Phase, Record


async def validate(node: Node) -> None:
    """A validator's whole life in one run."""
    manifest = node.loaded.manifest
    node.flags |= Flags.OBSERVER
    notary = Notary(node)
    notary.open()
    await node.listen()
    states = PublicStates(node)
    auditor = Auditor(node, states, notary)
    roster = await node.enter()
    if roster.round == 0:
        await states.validate(0)
    while manifest.round.count == 0 or roster.round < manifest.round.count:
        node.telemetry.emit(
            RoundStarted(
                round=roster.round,
                block=roster.block,
                stage=None,
                replicas=[len(stage) for stage in roster.stages],
                roster=roster.digest.hex(),
            )
        )
        await node.publish(Record(run=node.loaded.run_id, round=roster.round, phase=Phase.READY, root=auditor.commit()))
        start = states.round_start(roster)
        following = asyncio.create_task(states.follow(roster))
        try:
            await auditor.judge(roster, start)
            await following
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await states.validate(roster.round + 1)
        roster = await node.next_roster()
    node.telemetry.emit(NodeFinished(rounds=roster.round))


def run(argv: list[str]) -> int:
    """The program: flags in, exit status out."""
    return main(argv, role="validator", description="Audit, score and set weights.", body=validate)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
