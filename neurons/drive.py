"""At the head: what is started and when, what is in flight, and what is taken over from heads that are gone.

A head keeps W microbatches in flight, computed from measured times, and starts nothing that would not be back when the
round closes. A sibling's open microbatch is started from its tokens, as the sibling itself would have; those go first.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from model.data import Corpus
from model.engine import StageEngine
from neurons.delivery import ASLEEP, RETRY_PAUSE, Delivery, RecentMean, Spawn
from neurons.flights import Flight, Flights
from neurons.heads import BEAT, Heads
from neurons.telemetry import MicrobatchDone, MicrobatchStarted, Telemetry
from neurons.training import OpenInput, TrainingRound
from subnet.identity import Identity
from subnet.manifest import LoadedManifest
from subnet.messages import Forward, Push
from subnet.swarm.routing import depth
from subnet.transport.errors import Busy
from subnet.transport.synapse import tensor_bytes
from subnet.trust.ledger import NO_PEER, NO_RECEIPT, Direction, UnitKey, digest

log = logging.getLogger("orion.neurons.drive")

DEPTH_LIMIT_PER_STAGE = 4
"""At most this many microbatches in flight per head and stage: bounds input caches and staleness."""
NARROW_SPARE = 1.25
"""Without it a swarm of 48 that loses ten replicas an hour is 1 % slower (docs/simulate.md)."""
FLIGHT_FLOOR = 5.0
FLIGHT_FACTOR = 4.0
"""A head gives a flight up after this many times the slowest recent one (seconds, at least the floor)."""


def in_flight(*, stages: int, unit_seconds: float, push_seconds: float, load: float = 1.0) -> int:
    """Microbatches a head keeps in flight, from mean times: F + B of a unit and a push to its answer, seconds.

    `load` is heads per replica at the stage that has fewest. What keeps that stage busy is shared by so many heads,
    with some to spare; more would only wait there and be lost with whoever dies, or when the round closes.
    """
    limit = DEPTH_LIMIT_PER_STAGE * stages
    wanted = depth(stages=stages, compute=unit_seconds, latency=0.0, transfer=2 * push_seconds, limit=limit)
    return min(wanted, math.ceil(wanted * NARROW_SPARE / load))


def longest_flight(slowest: float, *, crossing: float) -> float:
    """After how many seconds a flight is not counted on any more; see `overdue_after` for `crossing`."""
    return FLIGHT_FACTOR * max(FLIGHT_FLOOR, slowest or 2 * crossing)


class Driver:
    """The first stage's own part. Other stages have one too; there it has nothing to do."""

    def __init__(
        self,
        *,
        identity: Identity,
        loaded: LoadedManifest,
        engine: StageEngine,
        corpus: Corpus,
        delivery: Delivery,
        heads: Heads,
        telemetry: Telemetry,
        synchronous: bool,
        enter: Callable[[TrainingRound, Forward, OpenInput], None],
        release: Callable[[TrainingRound, int], None],
        spawn: Spawn,
    ) -> None:
        """
        Args:
            enter: opens an input and computes its unit.
            release: forgets an open input that nobody waits for any more.
            spawn: see `Spawn`.
        """
        self.heads = heads
        self.unit_seconds = RecentMean()
        """F + B of a unit."""
        self._own = identity.hotkey
        self._run = loaded.run_id.hex()
        self._manifest = loaded.manifest
        self._engine = engine
        self._corpus = corpus
        self._delivery = delivery
        self._telemetry = telemetry
        self._synchronous = synchronous
        self._enter = enter
        self._release = release
        self._spawn = spawn
        self._flights = Flights()

    async def drive(self, current: TrainingRound, *, limit: int | None) -> None:
        """Keep the pipeline full until the round stops, or until `limit` microbatches were started and done."""
        if not all(current.roster.stages):
            return  # nothing would come back through a stage without replicas
        quota = self._manifest.data.samples_per_round // len(current.roster.stages[0])
        ends = quota if limit is None else min(quota, limit)
        loop = asyncio.get_running_loop()
        halfway = (loop.time() + current.closing_at) / 2
        self._flights.begin(len(current.roster.stages[0]) / min(len(stage) for stage in current.roster.stages))
        self._attend(current)
        while not current.stopping and current.started < ends:
            returns = self._flights.returns(
                loop.time(), current.flights.values(), closing_at=current.closing_at, probe_until=halfway
            )
            if not returns and not current.flights:
                return
            self._announce(current, ends)
            waits = self._resume(current) or not self._has_room(current)
            if waits or not returns or current.started >= self.heads.covered(current):
                current.room.clear()
                await current.room.wait()
                continue
            index = current.started
            current.started += 1
            self._start(current, self._own, index)
        while limit is not None and current.flights:
            current.room.clear()
            await current.room.wait()

    def depth(self) -> int:
        """Microbatches this head keeps in flight now."""
        if self._synchronous:
            return self._manifest.optimizer.accumulation
        return in_flight(
            stages=self._engine.plan.count,
            unit_seconds=self.unit_seconds.value,
            push_seconds=self._delivery.push_seconds.value,
            load=self._flights.load,
        )

    @property
    def crossing(self) -> float:
        """Seconds of one microbatch there and back through all stages if they and their links are as fast as this one;
        0 before the first."""
        stages = self._engine.plan.count
        return stages * self.unit_seconds.value + 2 * (stages - 1) * self._delivery.push_seconds.value

    def land(self, current: TrainingRound, sample: int) -> tuple[float, Flight] | None:
        """Take a flight out of the air; how long it lasted and how it left, None if none of this head's was."""
        left = current.flights.pop(sample, None)
        current.room.set()
        return None if left is None else (asyncio.get_running_loop().time() - left.time, left)

    def complete(self, current: TrainingRound, push: Push, loss: float) -> None:
        """A microbatch has come back here: an own one, or one taken over."""
        flight = self.land(current, push.sample)
        if push.head == self._own:
            if flight is not None:
                self._flights.land(*flight)
            self._count(current, push.index)
        else:
            current.foreign.add(push.sample)
            current.taken.add(push.sample)
        self._telemetry.emit(
            MicrobatchDone(
                round=current.number,
                sample=push.sample,
                loss=loss,
                seconds=0.0 if flight is None else round(flight[0], 4),
                depth=self.depth(),
            )
        )

    def adopt(self, current: TrainingRound, push: Push) -> OpenInput | None:
        """A gradient has come for a sample that a sibling forwarded: its input, or None if it is not to be had here.

        Raises `Busy` while the sibling is there: the gradient is its own; or another heir's, whose turn it is.
        """
        if push.head == self._own or self.heads.settled(current, push.sample):
            return None
        if self.heads.in_touch(current, push.head):
            raise Busy(f"head {push.head} is there as far as known here", "try it again", retry_after=RETRY_PAUSE)
        if self.heads.anothers_turn(current, push.sample, turn=self._patience()):
            raise Busy(f"sample {push.sample} is another heir's first", "try that one", retry_after=RETRY_PAUSE)
        return self._input(push.head, push.sample)

    def require_heir(self, current: TrainingRound, push: Push, caller: str) -> None:
        """A gradient for a sample that was started here in a sibling's place. If that one is back, only the gradient of
        what was sent from here is taken; one of what it had sent itself is its own. Raises `Busy`."""
        if push.sample in current.pushes:
            leaf = current.ledger.leaf(UnitKey(push.sample, Direction.FORWARD))
            if leaf.receipt != NO_RECEIPT and current.roster.stages[1][leaf.sink] == caller:
                return
        if self.heads.in_touch(current, push.head):
            raise Busy(f"head {push.head} is back as far as known here", "try it again", retry_after=RETRY_PAUSE)

    def may_count(self, current: TrainingRound, sample: int, *, taken: float, now: float) -> bool:
        """Whether a gradient that was taken at `taken` may enter a step: after a stop only once all siblings were
        asked, and if none of them took the sample over meanwhile. For the compute thread."""
        return self.heads.awake(current, now) and not (current.woke > taken and sample in current.elsewhere)

    async def still_due(self, current: TrainingRound, sample: int, *, taken: float) -> bool:
        """Wait until that is known of a gradient. If a sibling has the sample, its flight is over here."""
        loop = asyncio.get_running_loop()
        while current.accepting and not self.heads.awake(current, loop.time()):
            current.room.clear()
            await current.room.wait()
        if not current.accepting:
            return False
        if self.may_count(current, sample, taken=taken, now=loop.time()):
            return True
        log.info("sample %d came back at another head while this one was stopped", sample)
        self._end_elsewhere(current, sample)
        return False

    # -- starting -------------------------------------------------------------------------------------------------

    def _announce(self, current: TrainingRound, ends: int) -> None:
        """Tell the siblings of the next indices when half of those they know have left."""
        ahead = max(1, self.depth())
        if current.lease < ends and current.lease - current.started <= ahead // 2:
            self.heads.announce(current, min(ends, current.started + ahead))

    def _has_room(self, current: TrainingRound) -> bool:
        if self._synchronous and current.started % self._manifest.optimizer.accumulation == 0:
            return not current.flights
        return len(current.flights) < self.depth() and len(current.open) < self._engine.capacity

    def _start(self, current: TrainingRound, head: str, index: int) -> None:
        sample = self.heads.sample(current, head, index)
        now = asyncio.get_running_loop().time()
        current.flights[sample] = self._flights.leave(now, len(current.flights))
        self._telemetry.emit(MicrobatchStarted(round=current.number, sample=sample))
        push = Forward(
            run=self._run,
            round=current.number,
            sample=sample,
            head=head,
            index=index,
            version=self._engine.version,
            again=head != self._own,
        )
        self._enter(current, push, self._input(head, sample))

    def _input(self, head: str, sample: int) -> OpenInput:
        tokens = self._corpus.sample(sample)[:, :-1].contiguous()
        return OpenInput(head, NO_PEER, tokens, digest(tensor_bytes(tokens)), taken_over=head != self._own)

    def _resume(self, current: TrainingRound) -> bool:
        """Start what heads that are gone left open, as far as there is room; whether some waits for room."""
        if current.stopping or self._synchronous:
            return False
        for head, index in self.heads.due(current, turn=self._patience()):
            # However little time is left: what is not started here is lost, and what comes too late no more than that.
            if not self._has_room(current):
                return True
            sample = self.heads.sample(current, head, index)
            current.foreign.add(sample)
            if sample not in current.open:
                log.info("sample %d of head %s, which is gone, is started here", sample, head)
                self._start(current, head, index)
        return False

    # -- watching -------------------------------------------------------------------------------------------------

    def _attend(self, current: TrainingRound) -> None:
        """Begin to speak with the siblings and to look after the flights, once per round."""
        if current.watching or self._synchronous:
            return
        current.watching = True
        self.heads.meet(current)
        for hotkey in current.siblings:
            self._spawn(current.sends, self.heads.tell(current, hotkey))
        self._spawn(current.sends, self._watch(current))

    async def _watch(self, current: TrainingRound) -> None:
        loop = asyncio.get_running_loop()
        while current.accepting:
            before = current.beat = loop.time()
            await asyncio.sleep(BEAT)
            if loop.time() - before > BEAT + ASLEEP:
                self.heads.overslept(current)
            self._give_up(current)
            self._resume(current)
            current.room.set()  # what `covered` says is also a matter of time

    def _give_up(self, current: TrainingRound) -> None:
        """Let go of flights that ended elsewhere, and no longer count on those that take far too long."""
        now, patience, overdue = asyncio.get_running_loop().time(), self._patience(), self._delivery.patience()
        for sample, left in list(current.flights.items()):
            if UnitKey(sample, Direction.BACKWARD) in current.receipts:
                continue
            head, _ = self.heads.place(current, sample)
            late = now - left.time > overdue or left.time < current.woke
            if late and self.heads.settled(current, sample):
                log.info("sample %d came back at another head", sample)
                self._end_elsewhere(current, sample)
            elif head != self._own and sample in current.pushes and sample not in current.awaited:
                # Nobody has taken it from here, and its owner is back: it has all it needs itself.
                if self.heads.in_touch(current, head):
                    self._let_go(current, sample)
            elif now - left.time > patience:
                log.warning("sample %d has not come back within %.1f s: another takes its place", sample, patience)
                self.land(current, sample)

    def _end_elsewhere(self, current: TrainingRound, sample: int) -> None:
        self._let_go(current, sample)
        head, index = self.heads.place(current, sample)
        if head == self._own:
            self._count(current, index)

    def _let_go(self, current: TrainingRound, sample: int) -> None:
        self._release(current, sample)
        self.land(current, sample)

    def _count(self, current: TrainingRound, index: int) -> None:
        """An own microbatch is done, here or elsewhere."""
        if index in current.out:
            current.out.discard(index)
            current.completed += 1

    def _patience(self) -> float:
        """After how many seconds a flight is not counted on any more."""
        return longest_flight(self._flights.slowest, crossing=self.crossing)
