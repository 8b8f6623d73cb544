"""Delivery: activations to the next stage, gradients back, and what is done when the other side is gone.

A forward goes to the hop the lottery planned, else to its siblings, until one signs for it or the round closes. A
gradient goes to the replica the input came from; if that one is gone, to a sibling, which fetches the input from the
stage before and computes only the backward. Every receipt is checked before it is believed. Deadlines come from
measured times: an output whose gradient is overdue is offered to another replica. A duplicate costs nothing, because
whoever has it already says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping

import torch

from model.split import StagePlan
from neurons.training import Awaited, TrainingRound
from subnet.identity import Identity, verify
from subnet.messages import Accepted, Backward, Forward, InputRequest, Push, Tensors
from subnet.swarm.routing import hops
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import BadReply, Busy, Refused, TransportError, Unavailable, Unreachable
from subnet.transport.synapse import TensorSpec
from subnet.trust.ledger import Leaf, receipt_message

log = logging.getLogger("orion.neurons.delivery")

PUSH_DEADLINE = 10.0
RETRY_PAUSE = 0.05
OVERDUE_FLOOR = 3.0
OVERDUE_FACTOR = 4.0
"""A gradient is overdue after this many times the slowest recent return, and not before the floor (seconds)."""
RECENT_RETURNS = 16

TRY_ANOTHER = (Busy, Unavailable, Unreachable, BadReply)
"""Answers after which another try, elsewhere or later, makes sense."""


class RecentMean:
    """Exponential mean of a measured duration in seconds; 0 before the first."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, sample: float) -> None:
        self.value = sample if self.value == 0.0 else 0.9 * self.value + 0.1 * sample


class Delivery:
    """What one replica sends. `push_seconds` is the mean duration of an accepted push."""

    def __init__(
        self,
        *,
        identity: Identity,
        run: bytes,
        plan: StagePlan,
        dendrite: Dendrite,
        endpoint_of: Callable[[str], str | None],
        boundary: TensorSpec,
    ) -> None:
        self._identity = identity
        self._run = run
        self._plan = plan
        self._dendrite = dendrite
        self._endpoint_of = endpoint_of
        self._boundary = boundary
        self._returns: deque[float] = deque(maxlen=RECENT_RETURNS)
        self.push_seconds = RecentMean()

    async def forward(
        self, current: TrainingRound, push: Forward, leaf: Leaf, y: torch.Tensor, *, avoid: str | None = None
    ) -> None:
        """Push `y` to the planned hop or, `avoid`ing one, a sibling, until one accepts or the round closes."""
        stage = self._plan.index + 1
        replicas = current.roster.stages[stage]
        order = hops(replicas, seed=current.seed, head=push.head, stage=stage, index=push.index)
        order = tuple(hop for hop in order if hop != avoid)
        turn = 0
        while current.accepting and order:
            hop = order[turn % len(order)]
            turn += 1
            try:
                receipt = await self._push(current, hop, push, {"y": y}, leaf)
            except TRY_ANOTHER as refusal:
                log.debug("forward of sample %d to %s: %s", push.sample, hop, refusal)
                await asyncio.sleep(getattr(refusal, "retry_after", None) or RETRY_PAUSE)
                continue
            except Refused as refusal:
                log.warning("forward of sample %d was refused by %s: %s", push.sample, hop, refusal)
                return
            if receipt is not None:
                current.ledger.receipt(leaf.key, sink=replicas.index(hop), signature=receipt)
                current.awaited[push.sample] = Awaited(hop, asyncio.get_running_loop().time())
                current.rerouted += hop != order[0] or avoid is not None
            return

    async def backward(self, current: TrainingRound, push: Backward, leaf: Leaf, dx: torch.Tensor, source: str) -> None:
        """Push the input's gradient to `source`; if it cannot be reached, to a sibling that takes the unit over."""
        replicas = current.roster.stages[self._plan.index - 1]
        order = (source, *(hop for hop in replicas if hop != source))
        turn = 0
        while current.accepting:
            hop = order[turn % len(order)]
            try:
                receipt = await self._push(current, hop, push, {"g": dx}, leaf)
            except TRY_ANOTHER as refusal:
                log.debug("gradient of sample %d to %s: %s", push.sample, hop, refusal)
                # A replica that answers keeps its turn: it is busy, or fetching the input to take the unit over.
                turn += isinstance(refusal, Unreachable | BadReply)
                await asyncio.sleep(getattr(refusal, "retry_after", None) or RETRY_PAUSE)
                continue
            except Refused as refusal:
                log.warning("gradient of sample %d was refused by %s: %s", push.sample, hop, refusal)
                return
            if receipt is not None:
                current.ledger.receipt(leaf.key, sink=replicas.index(hop), signature=receipt)
            current.delivered[push.sample] = hop
            return

    async def fetch_input(self, current: TrainingRound, push: Backward) -> tuple[str, torch.Tensor] | None:
        """The input of a sibling's unit from a replica of the stage before: (who had it, y), or None."""
        for hop in current.roster.stages[self._plan.index - 1]:
            endpoint = self._endpoint_of(hop)
            if endpoint is None:
                continue
            try:
                _, tensors = await self._dendrite.call(
                    endpoint,
                    hop,
                    InputRequest(run=self._run.hex(), round=current.number, sample=push.sample),
                    reply=Tensors,
                    reply_specs={"y": self._boundary},
                    deadline=PUSH_DEADLINE,
                )
            except TransportError as error:
                log.debug("input of sample %d from %s: %s", push.sample, hop, error)
                continue
            return hop, tensors["y"]
        return None

    def returned(self, current: TrainingRound, sample: int) -> None:
        """The gradient of a delivered output has come back."""
        awaited = current.awaited.pop(sample, None)
        if awaited is not None:
            self._returns.append(asyncio.get_running_loop().time() - awaited.since)

    def overdue(self, current: TrainingRound) -> list[int]:
        """Samples whose gradient should have been back by now."""
        patience = max(OVERDUE_FLOOR, OVERDUE_FACTOR * max(self._returns, default=OVERDUE_FLOOR))
        now = asyncio.get_running_loop().time()
        return [sample for sample, awaited in current.awaited.items() if now - awaited.since > patience]

    async def _push(
        self, current: TrainingRound, hop: str, push: Push, tensors: Mapping[str, torch.Tensor], leaf: Leaf
    ) -> bytes | None:
        """One push. Its receipt, or None if the other side has this microbatch from somebody else."""
        endpoint = self._endpoint_of(hop)
        if endpoint is None:
            raise Unreachable(f"{hop} serves no axon at the last finalized block; a sibling is tried")
        loop = asyncio.get_running_loop()
        start = loop.time()
        accepted, _ = await self._dendrite.call(endpoint, hop, push, tensors, reply=Accepted, deadline=PUSH_DEADLINE)
        self.push_seconds.add(loop.time() - start)
        if accepted.receipt is None:
            return None
        receipt = bytes.fromhex(accepted.receipt)
        message = receipt_message(
            self._run,
            current.number,
            producer=self._identity.hotkey,
            key=leaf.key,
            stage=self._plan.index,
            output=leaf.output,
        )
        if not verify(hop, message, receipt):
            raise BadReply(f"{hop} signed a receipt over something else than it was sent; a sibling is tried")
        return receipt
