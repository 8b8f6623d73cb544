"""Heads among themselves: who has started what, so that a dead head's microbatches are not lost with it.

A head announces its indices to every sibling before it starts them, a few ahead so that nothing waits for the answer,
and says which of them are not back. Notices are also the heartbeat: a sibling that no longer answers as one who plays
this round, and is not heard either, is gone after a short patience. Then its open samples are due here, in the order
that `heirs` draws for each sample: the first living head takes it at once, the next ones only if that has not helped.

A process that was stopped for a while (its own timers tell it) asks its siblings first what they did in its place;
their answer to a notice names the samples. What a hostile head can say wrongly concerns its own samples: those it
calls done are not taken over. What it claims of another's is believed of a microbatch only that is overdue there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Iterator

from neurons.delivery import ASLEEP, RETRY_PAUSE
from neurons.training import Sibling, TrainingRound
from subnet.identity import Identity
from subnet.messages import OPEN_LIMIT, Noted, Notice
from subnet.swarm.routing import head_of, heirs, sample_id
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import Busy, Dropped, Refused, TransportError, UnknownHotkey, Unreachable

log = logging.getLogger("orion.neurons.heads")

HEARTBEAT = 1.0
"""Seconds between two notices without news."""
NOTICE_DEADLINE = 2.0
GRACE = 1.0
"""Seconds that a new microbatch waits for a sibling to know of it; one that takes longer is not waited for."""
PATIENCE = 1.5
"""Seconds without a sign after which a head is gone. What crossed the first boundary mostly comes back meanwhile."""
BEAT = 0.25
"""Seconds between looks at what is due."""


class Heads:
    """What one head knows of its siblings; the state of a round is in `TrainingRound`."""

    def __init__(
        self,
        *,
        identity: Identity,
        run: bytes,
        samples: int,
        dendrite: Dendrite,
        endpoint_of: Callable[[str], str | None],
    ) -> None:
        """`samples` is how many a round has, over all heads."""
        self._own = identity.hotkey
        self._run = run.hex()
        self._samples = samples
        self._dendrite = dendrite
        self._endpoint_of = endpoint_of

    # -- samples --------------------------------------------------------------------------------------------------

    def sample(self, current: TrainingRound, head: str, index: int) -> int:
        heads = current.roster.stages[0]
        base = current.number * self._samples
        return sample_id(base=base, heads=len(heads), head=heads.index(head), index=index)

    def place(self, current: TrainingRound, sample: int) -> tuple[str, int]:
        """The head that a sample of the round belongs to, and its index there."""
        heads = current.roster.stages[0]
        base = current.number * self._samples
        return heads[head_of(sample, base=base, heads=len(heads))], (sample - base) // len(heads)

    def settled(self, current: TrainingRound, sample: int) -> bool:
        """Whether somebody else says that the sample is back: its owner, or a sibling that took it over."""
        if sample in current.elsewhere:
            return True
        owner, index = self.place(current, sample)
        link = current.siblings.get(owner)
        return link is not None and index < link.started and index not in link.open

    # -- telling --------------------------------------------------------------------------------------------------

    def meet(self, current: TrainingRound) -> None:
        """Know who the siblings of the round are."""
        if not current.siblings:
            current.siblings = {hotkey: Sibling() for hotkey in current.roster.stages[0] if hotkey != self._own}

    def announce(self, current: TrainingRound, lease: int) -> None:
        """Own indices below `lease` may be started once the siblings know."""
        current.out.update(range(current.lease, lease))
        current.lease = lease
        now = asyncio.get_running_loop().time()
        for link in current.siblings.values():
            link.asked = now if link.asked is None else link.asked
            link.news.set()

    def covered(self, current: TrainingRound) -> int:
        """Below which index every sibling knows, but for those that cannot be reached or keep us waiting."""
        now = asyncio.get_running_loop().time()
        return min(
            (
                link.told
                for link in current.siblings.values()
                if link.failing is None and (link.asked is None or now - link.asked < GRACE)
            ),
            default=current.lease,
        )

    async def tell(self, current: TrainingRound, hotkey: str) -> None:
        """Keep one sibling informed until the round closes."""
        link = current.siblings[hotkey]
        while current.accepting:
            link.news.clear()
            pause = await self._exchange(current, hotkey, link)
            current.room.set()
            try:
                async with asyncio.timeout(pause):
                    await link.news.wait()
            except TimeoutError:
                continue

    async def _exchange(self, current: TrainingRound, hotkey: str, link: Sibling) -> float:
        """Send one notice. Seconds until the next, unless there are news."""
        loop = asyncio.get_running_loop()
        start, lease = loop.time(), current.lease
        notice = Notice(
            run=self._run,
            round=current.number,
            started=lease,
            open=sorted(current.out)[-OPEN_LIMIT:],
            taken=sorted(current.taken)[-OPEN_LIMIT:],
        )
        pause = HEARTBEAT
        try:
            endpoint = self._endpoint_of(hotkey)
            if endpoint is None:
                raise Unreachable(f"{hotkey} serves no axon at the last finalized block")
            reply, _ = await self._dendrite.call(endpoint, hotkey, notice, reply=Noted, deadline=NOTICE_DEADLINE)
        except TransportError as error:
            # A deadline that passed while this process was stopped says nothing about the other side; a refusal does,
            # if it comes from one who took part before: the process that did is no more.
            awake = loop.time() - start < NOTICE_DEADLINE + ASLEEP
            if link.failing is None and awake and link.heard < start and (link.met or isinstance(error, Unreachable)):
                link.failing = loop.time()
                log.info("head %s does not answer: %s", hotkey, error)
            if isinstance(error, Refused):
                pause = error.retry_after or RETRY_PAUSE if link.failing is None else HEARTBEAT
        else:
            link.met, link.failing = True, None
            link.told = lease
            link.asked = None if lease == current.lease else loop.time()
            self._believe(current, reply.taken)
        link.exchanged = max(link.exchanged, start)
        return pause

    # -- hearing --------------------------------------------------------------------------------------------------

    def hear(self, current: TrainingRound, caller: str, notice: Notice) -> Noted:
        """Enter a sibling's notice. Raises a `Refused` for one that no head can send."""
        self.meet(current)
        link = current.siblings.get(caller)
        if link is None:
            raise UnknownHotkey(f"{caller} is no sibling of this head", "send notices to the other heads")
        quota = self._samples // len(current.roster.stages[0])
        if notice.started > quota or any(index >= notice.started for index in notice.open):
            raise Dropped(
                f"a notice of {notice.started} microbatches, open up to {max(notice.open, default=0)}, of {quota}",
                "announce what the roster gives to you",
            )
        if notice.started >= link.started:
            link.started, link.open = notice.started, frozenset(notice.open)
        link.met, link.failing = True, None
        link.heard = asyncio.get_running_loop().time()
        self._believe(current, notice.taken)
        own = sorted(sample for sample in current.taken if self.place(current, sample)[0] == caller)
        return Noted(taken=own[-OPEN_LIMIT:])

    def _believe(self, current: TrainingRound, samples: Iterable[int]) -> None:
        base = current.number * self._samples
        current.elsewhere.update(sample for sample in samples if base <= sample < base + self._samples)

    # -- who is there ---------------------------------------------------------------------------------------------

    def in_touch(self, current: TrainingRound, head: str) -> bool:
        """Whether that sibling takes part as far as known; it is asked again at once."""
        link = current.siblings.get(head)
        if link is None or not link.met:
            return False
        if link.failing is None:
            link.news.set()
        return link.failing is None

    def _silence(self, link: Sibling) -> float:
        """For how long there has been no sign of it, seconds."""
        if link.failing is None:
            return 0.0
        return asyncio.get_running_loop().time() - max(link.failing, link.heard)

    def due(self, current: TrainingRound, *, turn: float) -> Iterator[tuple[str, int]]:
        """What siblings that are gone left open and this head should start now: (owner, index).

        `turn` is how long (seconds) each living head before this one in a sample's order has for it.
        """
        gone = self._gone(current)
        for owner in sorted(gone):
            for index in sorted(current.siblings[owner].open):
                sample = self.sample(current, owner, index)
                if sample in current.foreign or sample in current.elsewhere:
                    continue
                wait = PATIENCE + turn * self._before(current, sample, gone)
                if self._silence(current.siblings[owner]) > wait:
                    yield owner, index

    def anothers_turn(self, current: TrainingRound, sample: int, *, turn: float) -> bool:
        """Whether a living head comes before this one in the order of a sample whose owner is gone, and its time for it
        (`turn` seconds each, as for `due`) is not over. A gradient that comes here all the same was sent by one who
        cannot reach that head, which may well be at work on it."""
        owner, _ = self.place(current, sample)
        living = self._before(current, sample, self._gone(current) | {owner})
        link = current.siblings.get(owner)
        return living > 0 and link is not None and link.met and self._silence(link) <= PATIENCE + turn * living

    def _gone(self, current: TrainingRound) -> set[str]:
        return {hotkey for hotkey, link in current.siblings.items() if self._silence(link) > PATIENCE}

    def _before(self, current: TrainingRound, sample: int, gone: Collection[str]) -> int:
        """How many heads that are not `gone` come before this one in the order of the sample's heirs."""
        order = heirs(current.roster.stages[0], seed=current.seed, sample=sample)
        return sum(head not in gone for head in order[: order.index(self._own)])

    # -- having been stopped --------------------------------------------------------------------------------------

    def overslept(self, current: TrainingRound) -> None:
        """This process was stopped: ask the siblings what they did meanwhile."""
        current.woke = asyncio.get_running_loop().time()
        for link in current.siblings.values():
            link.news.set()

    def awake(self, current: TrainingRound, now: float) -> bool:
        """Whether this process, if it was ever stopped, has asked every sibling since. For the compute thread too."""
        asked = all(link.exchanged >= current.woke for link in current.siblings.values())
        return asked and now - current.beat <= BEAT + ASLEEP

    def require_awake(self, current: TrainingRound) -> None:
        """After a stop no gradient is taken before every sibling was asked: it may have gone to one of them."""
        if not self.awake(current, asyncio.get_running_loop().time()):
            raise Busy("this head was stopped and asks its siblings first", "push again", retry_after=RETRY_PAUSE)
