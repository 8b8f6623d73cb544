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
PUSH_FACTOR = 20.0
RETRY_PAUSE = 0.05
LONGEST_PAUSE = 1.0
OVERDUE_FLOOR = 2.0
OVERDUE_FACTOR = 2.0
"""A gradient is overdue after this many times the slowest recent return, and not before the floor (seconds)."""
RECENT_RETURNS = 16

DOWN_SECONDS = 5.0
"""A replica that could not be reached is asked last for so long."""

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
        self._down: dict[str, float] = {}
        self.push_seconds = RecentMean()

    async def forward(
        self, current: TrainingRound, push: Forward, leaf: Leaf, y: torch.Tensor, *, avoid: str | None = None
    ) -> None:
        """Push `y` to the planned hop (`avoid`: the one to ask last), else to siblings, until one accepts or the round
        closes."""
        stage = self._plan.index + 1
        replicas = current.roster.stages[stage]
        order = hops(replicas, seed=current.seed, head=push.head, stage=stage, index=push.index)
        planned = order[0]
        order = tuple(sorted(order, key=lambda hop: (self.is_down(hop), hop == avoid)))
        turn = 0
        while current.accepting and order:
            hop = order[turn % len(order)]
            turn += 1
            try:
                receipt = await self._push(current, hop, push, {"y": y}, leaf)
            except TRY_ANOTHER as refusal:
                log.debug("forward of sample %d to %s: %s", push.sample, hop, refusal)
                if turn % len(order) == 0:
                    await asyncio.sleep(_pause(refusal))
                continue
            except Refused as refusal:
                log.warning("forward of sample %d was refused by %s: %s", push.sample, hop, refusal)
                order = tuple(other for other in order if other != hop)
                continue
            current.awaited[push.sample] = Awaited(hop, asyncio.get_running_loop().time())
            current.sinks.setdefault(push.sample, set()).add(hop)
            if receipt is not None:
                current.ledger.receipt(leaf.key, sink=replicas.index(hop), signature=receipt)
                current.rerouted += hop != planned
            return

    async def backward(self, current: TrainingRound, push: Backward, leaf: Leaf, dx: torch.Tensor, source: str) -> None:
        """Push the input's gradient to `source`; if it cannot be reached, to a sibling that takes the unit over.

        Whoever has it already says so, so offering it again is harmless.
        """
        if push.sample in current.delivering:
            return
        current.delivering.add(push.sample)
        try:
            await self._deliver(current, push, leaf, dx, source)
        finally:
            current.delivering.discard(push.sample)

    async def _deliver(self, current: TrainingRound, push: Backward, leaf: Leaf, dx: torch.Tensor, source: str) -> None:
        replicas = current.roster.stages[self._plan.index - 1]
        order = tuple(sorted((source, *(hop for hop in replicas if hop != source)), key=self.is_down))
        turn = 0
        while current.accepting:
            hop = order[turn % len(order)]
            try:
                receipt = await self._push(current, hop, push, {"g": dx}, leaf)
            except TRY_ANOTHER as refusal:
                log.debug("gradient of sample %d to %s: %s", push.sample, hop, refusal)
                # A replica that answers keeps its turn: it is busy, or fetching the input to take the unit over.
                turn += isinstance(refusal, Unreachable | BadReply)
                await asyncio.sleep(_pause(refusal))
                continue
            except Refused as refusal:
                log.warning("gradient of sample %d was refused by %s: %s", push.sample, hop, refusal)
                return
            if receipt is not None:
                current.ledger.receipt(leaf.key, sink=replicas.index(hop), signature=receipt)
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
        return [
            sample
            for sample, awaited in current.awaited.items()
            if now - awaited.since > patience or self.is_down(awaited.sink)
        ]

    async def probe(self, current: TrainingRound, push: Forward, leaf: Leaf, y: torch.Tensor) -> None:
        """Offer an activation again to those who signed for it, only to learn whether they are still there."""
        for hop in current.sinks.get(push.sample, ()):
            try:
                await self._push(current, hop, push, {"y": y}, leaf)
            except TransportError as error:
                log.debug("probe of %s: %s", hop, error)

    def is_down(self, hop: str) -> bool:
        """Whether this replica could not be reached a moment ago."""
        return self._down.get(hop, 0.0) > asyncio.get_running_loop().time()

    def _deadline(self) -> float:
        """Seconds a push may take: many times what pushes take now, so that a frozen peer is noticed."""
        return min(PUSH_DEADLINE, max(OVERDUE_FLOOR, PUSH_FACTOR * self.push_seconds.value))

    async def _push(
        self, current: TrainingRound, hop: str, push: Push, tensors: Mapping[str, torch.Tensor], leaf: Leaf
    ) -> bytes | None:
        """One push. Its receipt, or None if the other side has this microbatch from somebody else."""
        endpoint = self._endpoint_of(hop)
        if endpoint is None:
            raise Unreachable(f"{hop} serves no axon at the last finalized block; a sibling is tried")
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            accepted, _ = await self._dendrite.call(
                endpoint, hop, push, tensors, reply=Accepted, deadline=self._deadline()
            )
        except Unreachable:
            self._down[hop] = loop.time() + DOWN_SECONDS
            raise
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


def _pause(refusal: TransportError) -> float:
    """How long to wait before the next try: what the other side asks for, within reason."""
    asked = refusal.retry_after if isinstance(refusal, Refused) else None
    return min(asked or RETRY_PAUSE, LONGEST_PAUSE)
