"""Microbatches through the stages and back, as nodes send them, and as they repair what a dead node leaves behind.

What decides is the nodes' own: the lottery and its heirs (`subnet.swarm.routing`), how much a replica takes before it
is full (`neurons.door`), how many a head keeps in flight and when it stops (`neurons.drive`, `neurons.flights`), what
is overdue and how long a push may take (`neurons.delivery`), backward first (`neurons.compute`). A dead node is one
that does not answer any more, the costlier way to be dead.

Left out, since it costs no time that matters or happens to liars only: receipts, ledgers and filters; the heads'
notices (siblings know at once what was started); a push that is given up because it is slow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from neurons.delivery import OVERDUE_CHECK, RETRY_PAUSE, push_deadline
from neurons.door import full_pause
from neurons.drive import DEPTH_LIMIT_PER_STAGE
from neurons.heads import NOTICE_DEADLINE, PATIENCE
from scripts.simulate.accounts import Accounts
from scripts.simulate.events import Clock
from scripts.simulate.network import Network
from scripts.simulate.replica import Job, Microbatch, Replica
from scripts.simulate.setting import Setting
from subnet.swarm.routing import heirs, hops, sample_id

DRAWS = 4096
"""At a time."""
SAMPLES = 1 << 24
"""Of a round: never too few."""


class Pipeline:
    """The swarm's training in one round after the other."""

    def __init__(self, clock: Clock, network: Network, setting: Setting, accounts: Accounts) -> None:
        self._clock = clock
        self._network = network
        self._setting = setting
        self._accounts = accounts
        self._last = setting.stages - 1
        self._capacity = max(2 * DEPTH_LIMIT_PER_STAGE * setting.stages, setting.pipeline.depth)
        self._stages: tuple[tuple[Replica, ...], ...] = ()
        self._number = -1
        self._accepting = False
        self._holding = 0
        """Heads that hold back."""
        self._factors = _factors(setting)

    # -- the frame of a round -------------------------------------------------------------------------------------

    def begin(self, number: int, stages: tuple[tuple[Replica, ...], ...], seed: bytes, *, closing_at: float) -> None:
        """Open a round among these replicas."""
        now = self._clock.now
        self._number, self._stages, self._seed, self._closing_at = number, stages, seed, closing_at
        self._halfway = (now + closing_at) / 2
        self._names = tuple(tuple(replica.name for replica in stage) for stage in stages)
        self._named = {replica.name: replica for stage in stages for replica in stage}
        self._flying: set[Microbatch] = set()
        self._inherited: dict[Replica, deque[Microbatch]] = {}
        self._accepting = all(stages)  # nothing would come back through a stage without replicas
        self._holding = 0
        self._accounts.began(stages, now)
        for stage in stages:
            for replica in stage:
                replica.begin()
        if not self._accepting:
            return
        load = len(stages[0]) / min(len(stage) for stage in stages)
        for head in stages[0]:
            head.flights.begin(load)
            self._pump(head)

    def close(self) -> None:
        """What is in flight is lost; what a thread has begun is cut short."""
        self._cut_all()
        self._accepting = False
        self._accounts.lost += len(self._flying)
        self._flying = set()
        for stage in self._stages:
            for replica in stage:
                replica.unmerged = 0

    def settle(self) -> None:
        """The simulation ends here, in mid-round or not."""
        if self._accepting:
            self._cut_all()

    def _cut_all(self) -> None:
        now = self._clock.now
        for stage in self._stages:
            for replica in stage:
                if replica.alive:
                    self._cut_short(replica, now)

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    def kill(self, replica: Replica) -> None:
        """It answers nothing any more."""
        now = self._clock.now
        if self._accepting and replica.name in self._named:
            self._cut_short(replica, now)
        replica.alive = False
        self._accounts.unmerged.append((now, replica.unmerged))
        if self._accepting and replica.stage == 0 and replica.name in self._named:
            self._hold(replica, holding=True)
            self._clock.at(now + PATIENCE + NOTICE_DEADLINE, self._bequeath, replica, self._number)

    def _cut_short(self, replica: Replica, now: float) -> None:
        running = replica.running
        if running is not None:
            job, start = running
            self._accounts.worked(replica, job, start, now)
            replica.running = None
        self._accounts.gone(replica, now)

    # -- heads ----------------------------------------------------------------------------------------------------

    def _pump(self, head: Replica) -> None:
        """Start what may be started."""
        setting, flights, in_air = self._setting, head.flights, head.in_air
        depth = head.depth() if setting.measured_depth else setting.pipeline.depth
        inherited = self._inherited.get(head)
        while head.alive and len(in_air) < depth and len(head.open) < self._capacity:
            if inherited:
                microbatch = inherited.popleft()
                if not microbatch.done and microbatch not in head.open:
                    self._start(head, microbatch)
                continue
            if setting.microbatches is not None and head.started >= setting.microbatches:
                return
            now = self._clock.now
            if not flights.returns(now, in_air.values(), closing_at=self._closing_at, probe_until=self._halfway):
                self._hold(head, holding=True)
                return
            self._hold(head, holding=False)
            heads = self._stages[0]
            sample = sample_id(
                base=self._number * SAMPLES, heads=len(heads), head=heads.index(head), index=head.started
            )
            microbatch = Microbatch(head, self._number, head.started, sample)
            head.started += 1
            self._accounts.started += 1
            self._flying.add(microbatch)
            self._start(head, microbatch)

    def _hold(self, head: Replica, *, holding: bool) -> None:
        if head.holding is not holding:
            head.holding = holding
            self._holding += 1 if holding else -1
            everybody = self._holding == len(self._stages[0])
            self._accounts.draining(self._clock.now if everybody else None)

    def _start(self, head: Replica, microbatch: Microbatch) -> None:
        head.in_air[microbatch] = head.flights.leave(self._clock.now, len(head.in_air))
        head.open[microbatch] = None
        self._submit(head, Job.TAIL if self._last == 0 else Job.FORWARD, microbatch)

    def _land(self, head: Replica, microbatch: Microbatch) -> None:
        """A microbatch has come back here: an own one, or one taken over."""
        now = self._clock.now
        left = head.in_air.pop(microbatch, None)
        if not microbatch.done:
            self._accounts.landed(microbatch, 0.0 if left is None else now - left.time, now)
            self._flying.discard(microbatch)
            if microbatch.head is not head:
                microbatch.head.in_air.pop(microbatch, None)
        if left is not None and microbatch.head is head:
            head.flights.land(now - left.time, left)
        self._pump(head)

    def _bequeath(self, dead: Replica, number: int) -> None:
        """Siblings take over what a dead head has in the air."""
        if number != self._number or not self._accepting:
            return
        for microbatch in dead.in_air:
            for name in heirs(self._names[0], seed=self._seed, sample=microbatch.sample):
                heir = self._named[name]
                if heir.alive:
                    self._inherited.setdefault(heir, deque()).append(microbatch)
                    break
        for heir in self._stages[0]:
            self._pump(heir)

    # -- compute --------------------------------------------------------------------------------------------------

    def _submit(self, replica: Replica, job: Job, microbatch: Microbatch) -> None:
        replica.work += 1
        replica.submit(job, microbatch)
        if replica.running is None:
            self._kick(replica)

    def _kick(self, replica: Replica) -> None:
        """Begin the next unit, if there is one."""
        now = self._clock.now
        while (taken := replica.take()) is not None:
            job, microbatch = taken
            if job is Job.FORWARD and (microbatch not in replica.open or microbatch in replica.computed):
                replica.work -= 1  # given up, or computed with its gradient
                continue
            if job is Job.BACKWARD and microbatch not in replica.computed:
                job = Job.ADOPTED
                self._accounts.adopted += 1
            replica.running = job, now
            self._accounts.takes(replica, now)
            ends = now + replica.durations[job] * next(self._factors)
            self._clock.at(ends, self._finished, replica, job, microbatch, now)
            return

    def _finished(self, replica: Replica, job: Job, microbatch: Microbatch, start: float) -> None:
        if not self._goes_on(microbatch) or not replica.alive:
            return
        now = self._clock.now
        replica.running = None
        replica.work -= 1
        replica.unit_seconds.add(2 * (now - start))
        self._accounts.worked(replica, job, start, now)
        if job is Job.FORWARD:
            replica.computed.add(microbatch)
            self._forward(replica, microbatch)
        else:
            replica.unmerged += 1
            source = replica.open.pop(microbatch, None)
            if source is None:
                self._land(replica, microbatch)
            else:
                replica.gradients[microbatch] = source
                self._backward(replica, microbatch)
        if replica.running is None:
            self._kick(replica)

    def _goes_on(self, microbatch: Microbatch) -> bool:
        return self._accepting and microbatch.round == self._number

    # -- forward --------------------------------------------------------------------------------------------------

    def _forward(self, replica: Replica, microbatch: Microbatch, *, avoid: Replica | None = None) -> None:
        """Push the activation to the planned hop, else to a sibling with room, else stand in line."""
        if not self._goes_on(microbatch) or not replica.alive or microbatch not in replica.open:
            return
        hop = self._free_hop(replica, microbatch, avoid)
        if hop is not None:
            self._offer(replica, hop, microbatch, in_line=False)
            return
        replica.line.append(microbatch)
        if len(replica.line) == 1:
            self._clock.at(min(replica.full.values()), self._advance, replica, self._number)

    def _free_hop(self, replica: Replica, microbatch: Microbatch, avoid: Replica | None) -> Replica | None:
        now, stage, head = self._clock.now, replica.stage + 1, microbatch.head.name
        names = hops(
            self._names[stage],
            seed=self._seed,
            stage=stage,
            head=self._names[0].index(head),
            heads=len(self._names[0]),
            index=microbatch.index,
            lane=self._setting.pipeline.lane,
        )
        if not replica.full and not replica.knows_down and avoid is None:
            return self._named[names[0]]
        second: Replica | None = None
        """Where to go if all others are full."""
        for name in names:
            hop = self._named[name]
            if replica.is_full(hop, now):
                continue
            if hop is not avoid and not replica.is_down(hop, now):
                return hop
            second = second or hop
        return second

    def _advance(self, replica: Replica, number: int) -> None:
        """Offer what is first in line."""
        if number != self._number or not self._accepting or not replica.alive:
            return
        line = replica.line
        while line and line[0] not in replica.open:
            line.popleft()
        if not line:
            return
        hop = self._free_hop(replica, line[0], None)
        if hop is None:
            self._clock.at(min(replica.full.values()), self._advance, replica, number)
        else:
            self._offer(replica, hop, line[0], in_line=True)

    def _offer(self, replica: Replica, hop: Replica, microbatch: Microbatch, *, in_line: bool) -> None:
        take = partial(self._take_forward, replica, hop, microbatch, in_line)
        again = partial(self._again, replica, microbatch, in_line)
        self._push(replica, hop, microbatch, self._setting.pipeline.forward_bytes, take=take, again=again)

    def _take_forward(
        self, replica: Replica, hop: Replica, microbatch: Microbatch, in_line: bool, start: float
    ) -> None:
        now, latency = self._clock.now, self._network.latency
        if microbatch in hop.forwarded:
            if microbatch in hop.gradients:
                self._backward(hop, microbatch)
        elif microbatch not in hop.open and microbatch not in hop.returned:
            if not hop.has_room(self._capacity):
                self._clock.at(now + latency, self._refused, replica, hop, microbatch, in_line)
                return
            hop.forwarded.add(microbatch)
            hop.open[microbatch] = replica
            self._submit(hop, Job.TAIL if hop.stage == self._last else Job.FORWARD, microbatch)
        self._clock.at(now + latency, self._delivered, replica, hop, microbatch, start, in_line)

    def _delivered(self, replica: Replica, hop: Replica, microbatch: Microbatch, start: float, in_line: bool) -> None:
        if not self._goes_on(microbatch) or not replica.alive:
            return
        now = self._clock.now
        replica.push_seconds.add(now - start)
        if microbatch not in replica.returned:
            replica.awaited[microbatch] = hop, now, replica.first.pop(microbatch, now)
            self._chase_later(replica)
        if in_line:
            replica.line.popleft()
            self._advance(replica, self._number)
        if replica.stage == 0:
            self._pump(replica)  # what a push takes is known better

    def _refused(self, replica: Replica, hop: Replica, microbatch: Microbatch, in_line: bool) -> None:
        if not self._goes_on(microbatch) or not replica.alive:
            return
        replica.full[hop] = self._clock.now + full_pause(hop.unit_seconds.value / 2)
        self._accounts.refused += 1
        self._again(replica, microbatch, in_line)

    def _again(self, replica: Replica, microbatch: Microbatch, in_line: bool) -> None:
        if in_line:
            self._advance(replica, self._number)
        else:
            self._forward(replica, microbatch)

    # -- backward -------------------------------------------------------------------------------------------------

    def _backward(self, replica: Replica, microbatch: Microbatch) -> None:
        """Push the input's gradient to where the input came from; if that one is gone, to an heir."""
        if not self._goes_on(microbatch) or not replica.alive or microbatch in replica.delivering:
            return
        replica.delivering.add(microbatch)
        self._return(replica, microbatch, 0)

    def _return(self, replica: Replica, microbatch: Microbatch, turn: int) -> None:
        if not self._goes_on(microbatch) or not replica.alive:
            return
        hop = replica.gradients[microbatch]
        now = self._clock.now
        if replica.is_down(hop, now) or turn:
            stage = replica.stage - 1
            names = heirs(self._names[stage], seed=self._seed, sample=microbatch.sample)
            order = [hop, *(heir for name in names if (heir := self._named[name]) is not hop)]
            hop = next((other for other in order if not replica.is_down(other, now)), order[turn % len(order)])
        take = partial(self._take_backward, replica, hop, microbatch, turn)
        again = partial(self._return_later, replica, microbatch, turn + 1)
        self._push(replica, hop, microbatch, self._setting.pipeline.backward_bytes, take=take, again=again)

    def _take_backward(self, replica: Replica, hop: Replica, microbatch: Microbatch, turn: int, start: float) -> None:
        now, latency = self._clock.now, self._network.latency
        if microbatch not in hop.returned:
            if microbatch not in hop.open and not self._take_over(hop, microbatch):
                self._clock.at(now + latency + RETRY_PAUSE, self._return, replica, microbatch, turn)
                return
            hop.returned.add(microbatch)
            hop.came_back(microbatch, now)
            self._submit(hop, Job.BACKWARD, microbatch)
        replica.push_seconds.add(now + latency - start)  # known when the answer is here, which nothing waits for
        replica.delivering.discard(microbatch)

    def _return_later(self, replica: Replica, microbatch: Microbatch, turn: int) -> None:
        self._clock.at(self._clock.now + RETRY_PAUSE, self._return, replica, microbatch, turn)

    # -- pushes ---------------------------------------------------------------------------------------------------

    def _push(
        self,
        replica: Replica,
        hop: Replica,
        microbatch: Microbatch,
        size: int,
        *,
        take: Callable[[float], None],
        again: Callable[[], None],
    ) -> None:
        """Send so many bytes. `take` is what the other side does, given when the push began; `again` what this side
        does if there is no answer."""
        arrived = partial(self._arrived, replica, hop, microbatch, self._clock.now, take, again)
        self._network.send(replica.port, hop.port, size, arrived)

    def _arrived(
        self,
        replica: Replica,
        hop: Replica,
        microbatch: Microbatch,
        start: float,
        take: Callable[[float], None],
        again: Callable[[], None],
    ) -> None:
        if not self._goes_on(microbatch) or not replica.alive:
            return
        if hop.alive:
            take(start)
            return
        silence = max(self._clock.now, start + push_deadline(replica.push_seconds.value))
        self._clock.at(silence, self._unanswered, replica, hop, microbatch, start, again)

    def _unanswered(
        self, replica: Replica, hop: Replica, microbatch: Microbatch, start: float, again: Callable[[], None]
    ) -> None:
        if not self._goes_on(microbatch) or not replica.alive:
            return
        now, number = self._clock.now, self._number
        replica.missed(hop, since=start, now=now)
        self._clock.at(now + OVERDUE_CHECK, self._chase, replica, number)
        if hop not in replica.looking:
            replica.looking.add(hop)
            self._clock.at(now + OVERDUE_CHECK, self._look, replica, hop, number)
        again()

    # -- repair ---------------------------------------------------------------------------------------------------

    def _look(self, replica: Replica, hop: Replica, number: int) -> None:
        """Ask one that is down whether it is back. The dead do not answer, so it goes on until the round closes."""
        if number == self._number and self._accepting and replica.alive:
            now = self._clock.now
            silence = now + push_deadline(replica.push_seconds.value)
            self._clock.at(silence, self._unseen, replica, hop, now, number)

    def _unseen(self, replica: Replica, hop: Replica, start: float, number: int) -> None:
        now = self._clock.now
        replica.missed(hop, since=start, now=now)
        self._clock.at(now + OVERDUE_CHECK, self._look, replica, hop, number)

    def _take_over(self, hop: Replica, microbatch: Microbatch) -> bool:
        """A gradient has come whose forward ran on a sibling: whether its input is here, else it is fetched."""
        if hop.stage == 0:
            hop.open[microbatch] = None
            return True
        if microbatch not in hop.adopting:
            stage, latency = self._stages[hop.stage - 1], self._network.latency
            holder = next((other for other in stage if other.alive and microbatch in other.computed), None)
            if holder is not None:
                hop.adopting.add(microbatch)
                self._clock.at(self._clock.now + latency, self._give_input, holder, hop, microbatch)
        return False

    def _give_input(self, holder: Replica, hop: Replica, microbatch: Microbatch) -> None:
        if self._goes_on(microbatch) and holder.alive:
            arrived = partial(self._input_arrived, holder, hop, microbatch)
            self._network.send(holder.port, hop.port, self._setting.pipeline.forward_bytes, arrived)
        else:
            hop.adopting.discard(microbatch)

    def _input_arrived(self, holder: Replica, hop: Replica, microbatch: Microbatch) -> None:
        if self._goes_on(microbatch) and hop.alive and microbatch not in hop.forwarded:
            hop.open[microbatch] = holder

    def _chase_later(self, replica: Replica) -> None:
        if not replica.chasing:
            replica.chasing = True
            _, since, _ = next(iter(replica.awaited.values()))
            due = max(since + replica.patience(), self._clock.now) + OVERDUE_CHECK
            self._clock.at(due, self._chase_on, replica, self._number)

    def _chase_on(self, replica: Replica, number: int) -> None:
        if number == self._number and replica.alive:
            replica.chasing = False
            self._chase(replica, number)
            if replica.awaited:
                self._chase_later(replica)

    def _chase(self, replica: Replica, number: int) -> None:
        """Offer outputs whose gradient is overdue to another replica; no longer count on flights that take too long."""
        if number != self._number or not self._accepting or not replica.alive:
            return
        now, patience = self._clock.now, replica.patience()
        overdue = [
            (microbatch, sink)
            for microbatch, (sink, since, _) in replica.awaited.items()
            if now - since > patience or replica.is_down(sink, now)
        ]
        for microbatch, sink in overdue:
            replica.first[microbatch] = replica.awaited.pop(microbatch)[2]
            self._accounts.chased += 1
            self._forward(replica, microbatch, avoid=sink)
        if replica.in_air:
            for microbatch in [one for one, left in replica.in_air.items() if now - left.time > replica.longest_flight]:
                del replica.in_air[microbatch]
            self._pump(replica)


def _factors(setting: Setting) -> Iterator[float]:
    """By which each unit takes longer than planned."""
    chance = np.random.default_rng([setting.seed, 1])
    while True:
        yield from (1 + setting.jitter * chance.uniform(-1, 1, DRAWS)).tolist()
