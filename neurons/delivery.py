"""Delivery: activations to the next stage, gradients back, and what is done when the other side is gone.

A forward goes to the hop the lottery planned, else to its siblings, until one signs for it or the round closes. A
gradient goes to the replica the input came from; if that one is gone, to a sibling, which fetches the input from the
stage before and computes only the backward. Every receipt is checked before it is believed. Deadlines come from
measured times: an output whose gradient is overdue is offered to another replica. A duplicate costs nothing, because
whoever has it already says so.

Who is full is not asked again before it said there would be room. While all replicas are, activations stand in line and
only the first is offered: each offer carries the tensor, and many would fill the uplink for nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping

import torch

from model.split import StagePlan
from neurons.reach import Reach
from neurons.training import Awaited, TrainingRound
from subnet.identity import Identity, verify
from subnet.manifest import LoadedManifest
from subnet.messages import (
    Accepted,
    Backward,
    Forward,
    Holder,
    HolderRequest,
    InputRequest,
    Push,
    Shapes,
    Tensors,
)
from subnet.swarm.routing import heirs, hops
from subnet.transport.dendrite import NO_SPECS, NO_TENSORS, Dendrite
from subnet.transport.errors import (
    BadReply,
    Busy,
    Full,
    Refused,
    Silent,
    TransportError,
    Unavailable,
    Unreachable,
)
from subnet.transport.synapse import S, Specs, Synapse
from subnet.trust.ledger import NO_RECEIPT, Direction, Leaf, UnitKey, receipt_message

log = logging.getLogger("orion.neurons.delivery")

PUSH_DEADLINE = 10.0
PUSH_FACTOR = 20.0
RETRY_PAUSE = 0.05
LONGEST_PAUSE = 1.0
HOLDER_DEADLINE = 1.0
"""Seconds."""
OVERDUE_FLOOR = 2.0
OVERDUE_FACTOR = 2.0
"""A gradient is overdue after this many times the slowest recent return, and not before the floor (seconds)."""
RECENT_RETURNS = 16
OVERDUE_CHECK = 0.5
"""Seconds between looks for overdue gradients."""

ASLEEP = 1.0
"""A timer that is later than this many seconds: this process was stopped, and nobody else was late."""

NO_SAMPLE = 2**63 - 1
"""Asked for to hear any answer: nobody has it."""

Spawn = Callable[[set[asyncio.Task[None]], Coroutine[object, object, None]], None]
"""Runs a coroutine among the given tasks of a round."""

TRY_ANOTHER = (Busy, Unavailable, Unreachable, BadReply)
"""Answers after which another try, elsewhere or later, makes sense."""


class RecentMean:
    """Exponential mean of a measured duration in seconds; 0 before the first."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, sample: float) -> None:
        self.value = sample if self.value == 0.0 else 0.9 * self.value + 0.1 * sample


def overdue_after(returns: Collection[float], *, crossing: float) -> float:
    """After how many seconds a gradient is overdue where the last ones took so long.

    Before the first is back `crossing` must do: a microbatch's way through all stages and back, of whose computing only
    forwards may be known so far, so twice as much may be the truth.
    """
    return max(OVERDUE_FLOOR, OVERDUE_FACTOR * max(returns, default=max(OVERDUE_FLOOR, 2 * crossing)))


def push_deadline(push_seconds: float) -> float:
    """Seconds a push may take: many times what pushes take as a rule, so that a frozen peer is noticed."""
    return min(PUSH_DEADLINE, max(OVERDUE_FLOOR, PUSH_FACTOR * push_seconds))


class Delivery:
    """What one replica sends. `push_seconds` is the mean duration of an accepted push."""

    def __init__(
        self,
        *,
        identity: Identity,
        loaded: LoadedManifest,
        plan: StagePlan,
        dendrite: Dendrite,
        endpoint_of: Callable[[str], str | None],
        crossing: Callable[[], float],
    ) -> None:
        """`crossing` is about how many seconds one microbatch takes there and back through all stages, 0 if nothing is
        measured."""
        self._identity = identity
        self._run = loaded.run_id
        self._plan = plan
        self._dendrite = dendrite
        self._endpoint_of = endpoint_of
        self._boundary = Shapes.of(loaded.manifest).boundary
        self._lane = loaded.manifest.swarm.lane
        self._crossing = crossing
        self._returns: deque[float] = deque(maxlen=RECENT_RETURNS)
        self._reach = Reach()
        self._looking: set[str] = set()
        self._full: dict[str, float] = {}
        """Until when, by the loop's clock, a replica has said to be full."""
        self._line = asyncio.Lock()
        """Held by who is first in line for room at the next stage."""
        self._streams: dict[str, asyncio.Semaphore] = {}
        self.push_seconds = RecentMean()

    async def forward(
        self,
        current: TrainingRound,
        push: Forward,
        leaf: Leaf,
        y: torch.Tensor,
        *,
        avoid: str | None = None,
        again: str | None = None,
        first: float | None = None,
    ) -> None:
        """Push `y` to the planned hop (`avoid`: the one to ask last, `again`: first), else to siblings, until one
        accepts, nobody waits for its gradient any more, or the round closes. `first` is when it was delivered.

        What was sent before goes to who has it by another way, if somebody has: the planned hop may not, because it was
        full then, and would compute it a second time.
        """
        stage = self._plan.index + 1
        replicas = current.roster.stages[stage]
        heads = current.roster.stages[0]
        order = hops(
            replicas,
            seed=current.seed,
            stage=stage,
            head=heads.index(push.head),
            heads=len(heads),
            index=push.index,
            lane=self._lane,
        )
        planned = order[0]
        if push.again and again is None:
            again = await self._holder(current, push.sample, [hop for hop in order if hop != avoid])
        order = tuple(sorted(order, key=lambda hop: (self.is_down(hop), hop == avoid, hop != again)))
        missed: set[str] = set()
        in_line = False
        try:
            while current.accepting and order and push.sample in current.open:
                free = [hop for hop in order if not self._is_full(hop)]
                if not free:
                    in_line = in_line or await self._line.acquire()
                    await self._wait_for_room(order)
                    continue
                hop = next((hop for hop in free if hop not in missed), free[0])
                try:
                    receipt = await self._push(current, hop, push, {"y": y}, leaf)
                except Full as refusal:
                    self._full[hop] = asyncio.get_running_loop().time() + _pause(refusal)
                    continue
                except TRY_ANOTHER as refusal:
                    log.debug("forward of sample %d to %s: %s", push.sample, hop, refusal)
                    missed.add(hop)
                    if missed.issuperset(free):
                        missed.clear()
                        await asyncio.sleep(_pause(refusal))
                    continue
                except Refused as refusal:
                    log.warning("forward of sample %d was refused by %s: %s", push.sample, hop, refusal)
                    order = tuple(other for other in order if other != hop)
                    continue
                now = asyncio.get_running_loop().time()
                current.awaited[push.sample] = Awaited(
                    hop, now, now if first is None else first, shared=receipt is None
                )
                current.sinks.setdefault(push.sample, set()).add(hop)
                if receipt is not None:
                    current.ledger.receipt(leaf.key, sink=replicas.index(hop), signature=receipt)
                    current.rerouted += hop != planned
                return
        finally:
            if in_line:
                self._line.release()

    async def _holder(self, current: TrainingRound, sample: int, hops: Iterable[str]) -> str | None:
        """Which of them has the forward of a sample, if one says so."""
        request = HolderRequest(run=self._run.hex(), round=current.number, sample=sample)

        async def ask(hop: str) -> str | None:
            try:
                answer, _ = await self._call(hop, request, reply=Holder, deadline=HOLDER_DEADLINE)
            except TransportError as error:
                log.debug("who has sample %d: %s: %s", sample, hop, error)
                return None
            return hop if answer.holds else None

        answers = await asyncio.gather(*(ask(hop) for hop in hops if not self.is_down(hop)))
        return next((hop for hop in answers if hop is not None), None)

    def _is_full(self, hop: str) -> bool:
        return self._full.get(hop, 0.0) > asyncio.get_running_loop().time()

    async def _wait_for_room(self, hops: Iterable[str]) -> None:
        """Until one of them should have room."""
        soonest = min(self._full.get(hop, 0.0) for hop in hops)
        await asyncio.sleep(max(0.0, soonest - asyncio.get_running_loop().time()))

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
        order = [source, *(hop for hop in heirs(replicas, seed=current.seed, sample=push.sample) if hop != source)]
        # A head that signed for this gradient has counted it unless it died; one that is only silent may come back.
        signed = self._plan.index == 1 and leaf.receipt != NO_RECEIPT
        turn = 0
        while current.accepting:
            hop = source if signed else next((hop for hop in order if not self.is_down(hop)), order[turn % len(order)])
            try:
                receipt = await self._push(current, hop, push, {"g": dx}, leaf)
            except TRY_ANOTHER as refusal:
                log.debug("gradient of sample %d to %s: %s", push.sample, hop, refusal)
                # A replica that answers keeps its turn: it is busy, or fetching the input to take the unit over. One
                # that has not begun a round in which it sent something is not the one that did.
                if isinstance(refusal, Unreachable):
                    signed = signed and isinstance(refusal, Silent)
                    turn += 1
                elif isinstance(refusal, Unavailable):
                    signed = False
                    self._miss(hop, since=asyncio.get_running_loop().time())
                elif isinstance(refusal, BadReply):
                    order.remove(hop)
                    order.append(hop)
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
        for hop in sorted(current.roster.stages[self._plan.index - 1], key=self.is_down):
            try:
                return hop, await self._input(current, hop, push.sample, deadline=PUSH_DEADLINE)
            except TransportError as error:
                log.debug("input of sample %d from %s: %s", push.sample, hop, error)
        return None

    async def look(self, current: TrainingRound, hotkey: str, sample: int) -> None:
        """Find out whether a neighbour is there, by asking it for an activation. Of the stage after it gets a refusal,
        which is an answer too."""
        if hotkey in self._looking:
            return
        self._looking.add(hotkey)
        start = asyncio.get_running_loop().time()
        try:
            await self._input(current, hotkey, sample, deadline=self._deadline())
        except (Unreachable, Unavailable) as error:
            log.debug("%s is not there: %s", hotkey, error)
            self._miss(hotkey, since=start)
        except TransportError as error:
            log.debug("%s is there: %s", hotkey, error)
        finally:
            self._looking.discard(hotkey)

    async def _input(self, current: TrainingRound, hop: str, sample: int, *, deadline: float) -> torch.Tensor:
        request = InputRequest(run=self._run.hex(), round=current.number, sample=sample)
        specs = {"y": self._boundary}
        _, tensors = await self._call(hop, request, reply=Tensors, reply_specs=specs, deadline=deadline)
        return tensors["y"]

    def returned(self, current: TrainingRound, sample: int) -> None:
        """The gradient of a delivered output has come back."""
        awaited = current.awaited.pop(sample, None)
        if awaited is not None:
            self._returns.append(asyncio.get_running_loop().time() - awaited.first)

    def overdue(self, current: TrainingRound) -> list[int]:
        """Samples whose gradient should have been back by now."""
        patience = self.patience()
        now = asyncio.get_running_loop().time()
        return [
            sample
            for sample, awaited in current.awaited.items()
            if now - awaited.since > patience or self.is_down(awaited.sink)
        ]

    async def chase(self, current: TrainingRound, spawn: Spawn) -> None:
        """Until the round closes, offer outputs whose gradient is overdue to another replica of the next stage, and
        look whether neighbours that are down are back."""
        loop = asyncio.get_running_loop()
        while current.accepting:
            before = loop.time()
            await asyncio.sleep(OVERDUE_CHECK)
            late = loop.time() - before - OVERDUE_CHECK
            if late > ASLEEP:
                self.overslept(current, late)
            for hop in self._reach.missing(now=loop.time()):
                spawn(current.sends, self.look(current, hop, NO_SAMPLE))
            for sample in self.overdue(current):
                leaf, output = current.ledger.leaf(UnitKey(sample, Direction.FORWARD)), current.outputs.get(sample)
                awaited = current.awaited.pop(sample)
                if output is None:  # its gradient came while the push was answered
                    continue
                # Who had it from a sibling already is asked where the gradient is; a third replica would compute what
                # others are computing.
                again = awaited.sink if awaited.shared and not self.is_down(awaited.sink) else None
                avoid = awaited.sink if again is None else None
                push = current.pushes[sample].model_copy(update={"again": True})
                if again is None:
                    current.chased += 1
                    log.info("gradient of sample %d is overdue at %s: a sibling gets the input", sample, avoid)
                spawn(
                    current.sends,
                    self.forward(current, push, leaf, output, avoid=avoid, again=again, first=awaited.first),
                )

    def overslept(self, current: TrainingRound, seconds: float) -> None:
        """This process was stopped for so long: nobody else was late."""
        for awaited in current.awaited.values():
            awaited.since += seconds
            awaited.first += seconds

    def patience(self) -> float:
        """After how many seconds a gradient is overdue."""
        return overdue_after(self._returns, crossing=self._crossing())

    async def probe(self, current: TrainingRound, push: Forward, leaf: Leaf, y: torch.Tensor) -> None:
        """Offer an activation again to those who signed for it, only to learn whether they are still there."""
        for hop in sorted(current.sinks.get(push.sample, ())):  # a copy: others may sign meanwhile
            try:
                await self._push(current, hop, push, {"y": y}, leaf)
            except TransportError as error:
                log.debug("probe of %s: %s", hop, error)

    def is_down(self, hop: str) -> bool:
        """Whether this replica could not be reached a moment ago."""
        return self._reach.is_down(hop, now=asyncio.get_running_loop().time())

    def heard(self, hop: str) -> None:
        """A neighbour has called."""
        self._reach.heard(hop, now=asyncio.get_running_loop().time())

    def set_aside(self, hop: str) -> None:
        """Ask this replica last for a while, as if it could not be reached."""
        self._reach.set_aside(hop, now=asyncio.get_running_loop().time())

    def _deadline(self) -> float:
        """Seconds a push may take now."""
        return push_deadline(self.push_seconds.value)

    async def _push(
        self, current: TrainingRound, hop: str, push: Push, tensors: Mapping[str, torch.Tensor], leaf: Leaf
    ) -> bytes | None:
        """One push. Its receipt, or None if the other side has this microbatch from somebody else."""
        loop = asyncio.get_running_loop()
        streams = self._streams.setdefault(hop, asyncio.Semaphore(self._dendrite.streams))
        queued = streams.locked()
        # A deadline says how long the other side may take. What waits here for those before it is not late, and a full
        # pipeline's worth of pushes may; but if they find out that nobody is there, it need not find out for itself.
        async with streams:
            if queued and self.is_down(hop):
                raise Unreachable(f"{hop} has not answered the push before; a sibling is tried")
            start = loop.time()
            accepted, _ = await self._call(
                hop, push, tensors, reply=Accepted, deadline=self._deadline(), payload=leaf.output
            )
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

    async def _call(
        self,
        hop: str,
        message: Synapse,
        tensors: Mapping[str, torch.Tensor] = NO_TENSORS,
        *,
        reply: type[S],
        reply_specs: Specs = NO_SPECS,
        deadline: float,
        payload: bytes | None = None,
    ) -> tuple[S, dict[str, torch.Tensor]]:
        """One call; who cannot be reached is asked last for a while."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            endpoint = self._endpoint_of(hop)
            if endpoint is None:
                raise Unreachable(f"{hop} serves no axon at the last finalized block; a sibling is tried")
            answer = await self._dendrite.call(
                endpoint,
                hop,
                message,
                tensors,
                reply=reply,
                reply_specs=reply_specs,
                deadline=deadline,
                payload=payload,
            )
        except Unreachable:
            if loop.time() - start < deadline + ASLEEP:
                self._miss(hop, since=start)
            raise
        except Refused as refusal:
            if not isinstance(refusal, Unavailable):
                self._reach.answered(hop)
            raise
        self._reach.answered(hop)
        return answer

    def _miss(self, hop: str, *, since: float) -> None:
        self._reach.failed(hop, since=since, now=asyncio.get_running_loop().time())


def _pause(refusal: TransportError) -> float:
    """How long to wait before the next try: what the other side asks for, within reason."""
    asked = refusal.retry_after if isinstance(refusal, Refused) else None
    return min(asked or RETRY_PAUSE, LONGEST_PAUSE)
