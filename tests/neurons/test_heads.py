"""Replicas of every stage die or freeze at once, heads among them: every microbatch comes back, and counts once."""

import asyncio
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from neurons.compute import Lane
from neurons.telemetry import MicrobatchDone, MicrobatchStarted
from subnet.messages import Backward, Noted, Notice, Push
from subnet.swarm.routing import heirs
from subnet.transport.errors import Busy, Dropped, Full, UnknownHotkey
from subnet.trust.ledger import Direction, Evidence
from tests.neurons.swarm import Member, Swarm, manifest, open_corpus, tiny, tokens_file


def swarm_of(tmp_path: Path, *, stages: int, replicas: int = 2) -> Swarm:
    entry = tokens_file(tmp_path)
    loaded = manifest(tiny(), entry, stages=stages, replicas=replicas, accumulation=2).write(tmp_path / "manifest.toml")
    return Swarm(loaded, open_corpus(tmp_path, loaded.manifest, entry), replicas=replicas)


async def until(condition: Callable[[], bool], seconds: float = 40) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - counted by workers, which have no event for it
            await asyncio.sleep(0.005)


pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine 'StageWorker:RuntimeWarning"),  # units of who was killed
    pytest.mark.alone,  # who is patient for seconds here takes a busy machine for a dead one
]


async def kill(swarm: Swarm, victims: list[Member], drives: dict[Member, asyncio.Task[None]]) -> None:
    """All at the same instant and without a word: nothing that they were doing goes on."""
    for victim in victims:
        del swarm.endpoints[victim.identity.hotkey]
        current = victim.worker._current()
        current.accepting = False
        for task in (*current.work, *current.sends, *([drives[victim]] if victim in drives else [])):
            task.cancel()
        victim.worker.shut_down()
    for victim in victims:
        await victim.dendrite.stop()
        await victim.axon.stop()


def samples(members: list[Member], kind: type[MicrobatchStarted] | type[MicrobatchDone]) -> set[int]:
    return {e.event.sample for member in members for e in member.events if isinstance(e.event, kind)}


def announced(head: Member, others: list[Member]) -> set[int]:
    """What `head` must take over from the others if they are gone: all that they may have started."""
    current, heads = head.worker._current(), head.worker._driver.heads
    links = {other.identity.hotkey: current.siblings[other.identity.hotkey] for other in others}
    return {heads.sample(current, owner, index) for owner, link in links.items() for index in link.open}


async def close(members: list[Member]) -> dict[str, Evidence]:
    closed = {}
    for member in members:
        _, closed[member.identity.hotkey] = await member.worker.close()
        event = member.events[-1].event
        assert event.started == event.completed + event.lost
        assert event.lost == 0
    return closed


def assert_counted_once(swarm: Swarm, evidence: dict[str, Evidence], completed: set[int]) -> None:
    """Sound evidence, and no sample in the gradients of two living replicas of a stage."""
    backward: Counter[tuple[int, int]] = Counter()
    for hotkey, table in evidence.items():
        table.check(stage=swarm.roster.stage_of(hotkey), samples=range(swarm.loaded.manifest.data.samples_per_round))
        backward.update((leaf.stage, leaf.sample) for leaf in table.leaves if leaf.direction is Direction.BACKWARD)
    assert max(backward.values()) == 1
    assert {sample for _, sample in backward} <= completed


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR and r.name.startswith("orion.neurons")]


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 9))])
async def test_one_replica_of_every_stage_dies_at_once(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(seed)  # noqa: S311 - picks victims
    async with swarm_of(tmp_path, stages=4) as swarm:
        victims = [draw.choice(swarm.stage(stage)) for stage in range(4)]
        living = [member for member in swarm.members.values() if member not in victims]
        dead = victims[0]
        heir = next(head for head in swarm.stage(0) if head is not dead)
        drives = {head: asyncio.create_task(head.worker.drive(limit=40)) for head in (dead, heir)}
        moment = draw.randrange(1, 30)
        await until(lambda: sum(victim.worker._current().units for victim in victims) >= moment)
        before = len(caplog.records)
        await kill(swarm, victims, drives)
        del caplog.records[before:]  # what the dying said
        started = samples([dead], MicrobatchStarted)
        told = announced(heir, [dead])
        assert started <= told | samples([dead], MicrobatchDone), "one was started that no sibling knew of"
        await asyncio.wait_for(drives[heir], 40)
        known = started | told | samples([heir], MicrobatchStarted)
        await until(lambda: known <= samples([dead, heir], MicrobatchDone))
        evidence = await close(living)
        assert_counted_once(swarm, evidence, known)
        assert not errors(caplog)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 6))])
async def test_two_heads_of_three_die_and_each_sample_has_one_heir(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(seed)  # noqa: S311 - picks victims
    async with swarm_of(tmp_path, stages=2, replicas=3) as swarm:
        heads = swarm.stage(0)
        drives = {head: asyncio.create_task(head.worker.drive(limit=24)) for head in heads}
        victims = [*draw.sample(heads, 2), draw.choice(swarm.stage(1))]
        left = [member for member in swarm.members.values() if member not in victims]
        heir = next(head for head in heads if head not in victims)
        moment = draw.randrange(4, 20)
        await until(lambda: sum(victim.worker._current().units for victim in victims) >= moment)
        await kill(swarm, victims, drives)
        known = samples(heads, MicrobatchStarted) | announced(heir, [head for head in heads if head is not heir])
        await asyncio.wait_for(drives[heir], 40)
        await until(lambda: known <= samples(heads, MicrobatchDone))
        assert_counted_once(swarm, await close(left), samples(heads, MicrobatchDone))


async def test_of_two_living_siblings_one_takes_a_sample_over(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=3, replicas=3) as swarm:
        heads = swarm.stage(0)
        drives = {head: asyncio.create_task(head.worker.drive(limit=30)) for head in heads}
        victims = [swarm.stage(stage)[stage] for stage in range(3)]
        dead, left = victims[0], [member for member in swarm.members.values() if member not in victims]
        await until(lambda: dead.worker._current().units >= 6)
        await kill(swarm, victims, drives)
        await asyncio.wait_for(asyncio.gather(*(drives[head] for head in heads[1:])), 40)
        known = samples(heads, MicrobatchStarted) | announced(heads[1], [dead]) | announced(heads[2], [dead])
        await until(lambda: known <= samples(heads, MicrobatchDone))
        took = [head.worker._current().taken for head in heads[1:]]
        assert took[0].isdisjoint(took[1])
        assert_counted_once(swarm, await close(left), samples(heads, MicrobatchDone))


async def test_what_went_past_a_full_replica_is_not_computed_again_by_it_once_its_way_back_is_gone(
    tmp_path: Path,
) -> None:
    async with swarm_of(tmp_path, stages=3) as swarm:
        head, tails = swarm.stage(0)[0], swarm.stage(2)
        drive = asyncio.create_task(head.worker.drive(limit=1))
        full: dict[Member, bool] = dict.fromkeys(tails, False)
        back, stuck = asyncio.Event(), asyncio.Event()

        def room(member: Member) -> Callable[..., None]:
            def require_room(*_: object, **__: object) -> None:
                if not any(full.values()):
                    full[member] = True  # who is asked first, as planned
                if full[member]:
                    raise Full("no room", "push elsewhere", retry_after=0.01)

            return require_room

        def slow(call: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
            async def held_back(
                endpoint: str, hotkey: str, message: object, *args: object, **options: object
            ) -> object:
                if isinstance(message, Backward):
                    stuck.set()
                    await back.wait()
                return await call(endpoint, hotkey, message, *args, **options)

            return held_back

        for tail in tails:
            tail.worker._door.require_room = room(tail)
            tail.dendrite.call = slow(tail.dendrite.call)
        await asyncio.wait_for(stuck.wait(), 20)
        (between,) = [member for member in swarm.stage(1) if member.worker._current().pushes]
        await kill(swarm, [between], {})
        for tail in tails:
            tail.worker._door.require_room = lambda *_, **__: None  # free now
        (sibling,) = [member for member in swarm.stage(1) if member is not between]
        await until(lambda: bool(sibling.worker._current().awaited))
        back.set()
        await asyncio.wait_for(drive, 40)
        assert sum(member.worker._current().units for member in tails) == 1
        living = [member for member in swarm.members.values() if member is not between]
        assert_counted_once(swarm, await close(living), samples([head], MicrobatchDone))


async def test_a_stray_gradient_is_taken_by_the_first_living_heir_only(tmp_path: Path) -> None:
    """Who cannot reach that one offers it to the next, while the first may be at work on the same sample."""
    async with swarm_of(tmp_path, stages=2, replicas=3) as swarm:
        dead, *living = swarm.stage(0)
        drives = {head: asyncio.create_task(head.worker.drive(limit=2)) for head in swarm.stage(0)}
        await asyncio.gather(*drives.values())
        await kill(swarm, [dead], drives)
        owner, index = dead.identity.hotkey, 20  # nobody knows of this one
        sample = living[0].worker._driver.heads.sample(living[0].worker._current(), owner, index)
        order = heirs(swarm.roster.stages[0], seed=living[0].worker._current().seed, sample=sample)
        first, second = sorted(living, key=lambda head: order.index(head.identity.hotkey))
        push = Push(run=swarm.loaded.run_id.hex(), round=0, sample=sample, head=owner, index=index, version=0)

        def takes(head: Member) -> bool:
            try:
                return head.worker._driver.adopt(head.worker._current(), push) is not None
            except Busy:
                return False

        await until(lambda: takes(first))
        heads = second.worker._driver.heads
        await until(lambda: not heads.in_touch(second.worker._current(), owner))
        assert not takes(second)
        await kill(swarm, [first], drives)
        await until(lambda: takes(second))


async def test_a_head_that_dies_before_its_first_notice_leaves_nothing_behind(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=2) as swarm:
        dead, other = swarm.stage(0)
        await kill(swarm, [dead], {})
        await asyncio.wait_for(other.worker.drive(limit=8), 20)
        await close([other, *swarm.stage(1)])
        assert len(samples([other], MicrobatchDone)) == 8


class Freezer:
    """Stops a head as SIGSTOP does: what is sent to it waits in its sockets, what it sends waits too. What it was just
    answering still goes out."""

    def __init__(self, swarm: Swarm, member: Member) -> None:
        self._swarm, self._member = swarm, member
        self._awake = asyncio.Event()
        self._awake.set()
        self._call, self._driver = member.dendrite.call, member.worker._driver
        self._depth, self._overdue = self._driver.depth, member.worker._delivery.overdue
        self._since = 0.0
        self._port = member.axon.port

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, wait: bool) -> None:
        """Requests wait, answers do not."""
        while data := await reader.read(65536):
            if wait:
                await self._awake.wait()
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._awake.wait()
        up, down = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(
            self._pipe(reader, down, wait=True), self._pipe(up, writer, wait=False), return_exceptions=True
        )

    @asynccontextmanager
    async def between(self) -> AsyncIterator[None]:
        """Everything to the member goes through here."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._swarm.endpoints[self._member.identity.hotkey] = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

        async def call(*args: object, **options: object) -> object:
            await self._awake.wait()
            return await self._call(*args, **options)

        self._member.dendrite.call = call
        try:
            yield
        finally:
            self._awake.set()
            server.close()

    def freeze(self) -> None:
        self._since = asyncio.get_running_loop().time()
        self._awake.clear()
        self._driver.depth = lambda: 0
        self._member.worker._delivery.overdue = lambda _current: []

    def thaw(self) -> None:
        """What the two timers of the process find when it goes on."""
        delivery, current = self._member.worker._delivery, self._member.worker._current()
        self._driver.depth, delivery.overdue = self._depth, self._overdue
        delivery.overslept(current, asyncio.get_running_loop().time() - self._since)
        self._driver.heads.overslept(current)
        self._awake.set()


async def test_a_head_that_freezes_and_comes_back_counts_nothing_twice(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=3) as swarm, AsyncExitStack() as stack:
        frozen, heir = swarm.stage(0)
        freezer = Freezer(swarm, frozen)
        await stack.enter_async_context(freezer.between())
        drives = [asyncio.create_task(head.worker.drive(limit=30)) for head in (frozen, heir)]
        await until(lambda: frozen.worker._current().units >= 4)
        freezer.freeze()
        await until(lambda: bool(heir.worker._current().taken))
        freezer.thaw()
        await asyncio.wait_for(asyncio.gather(*drives), 40)
        heads = [frozen, heir]
        known = samples(heads, MicrobatchStarted)
        await until(lambda: known <= samples(heads, MicrobatchDone))
        done = [e.event.sample for head in heads for e in head.events if isinstance(e.event, MicrobatchDone)]
        assert len(done) == len(set(done))
        assert_counted_once(swarm, await close(list(swarm.members.values())), known)


async def test_a_head_knows_that_it_was_stopped_and_takes_no_gradient_before_it_has_asked(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=2) as swarm:
        heads = swarm.stage(0)
        drives = [asyncio.create_task(head.worker.drive(limit=20)) for head in heads]
        await until(lambda: all(head.worker._current().units >= 2 for head in heads))
        time.sleep(1.5)  # noqa: ASYNC251 - the whole process stands still
        await asyncio.wait_for(asyncio.gather(*drives), 40)
        assert all(head.worker._current().woke > 0 for head in heads)
        assert_counted_once(swarm, await close(list(swarm.members.values())), samples(heads, MicrobatchDone))


@pytest.mark.parametrize("counted_there", [False, True])
async def test_a_gradient_taken_before_a_stop_counts_only_if_no_sibling_has_it(
    tmp_path: Path, *, counted_there: bool
) -> None:
    async with swarm_of(tmp_path, stages=2) as swarm:
        head, sibling = swarm.stage(0)
        opened, submit = threading.Event(), head.worker._compute.submit

        def gated(lane: Lane, index: int, job: Callable[[], object]) -> asyncio.Future[object]:
            return submit(lane, index, lambda: (lane is Lane.FORWARD or opened.wait(60), job())[1])

        head.worker._compute.submit = gated
        drives = [asyncio.create_task(each.worker.drive(limit=6)) for each in (head, sibling)]
        current = head.worker._current()
        await until(lambda: any(key.direction is Direction.BACKWARD for key in current.receipts))
        held = next(key.sample for key in current.receipts if key.direction is Direction.BACKWARD)
        if counted_there:
            sibling.worker._current().taken.add(held)
        head.worker._driver.heads.overslept(current)
        opened.set()
        await asyncio.wait_for(asyncio.gather(*drives), 40)
        assert (held in samples([head], MicrobatchDone)) is not counted_there
        assert not current.flights
        assert not current.out


@pytest.mark.parametrize(
    ("fields", "sender", "error", "words"),
    [
        ({"started": 2049}, 0, Dropped, "of 2048"),
        ({"started": 3, "open": [3]}, 0, Dropped, "roster gives"),
        ({}, 1, UnknownHotkey, "does not hold stage 0"),
    ],
)
async def test_a_notice_concerns_the_sender_s_own_samples_only(
    tmp_path: Path, fields: dict[str, object], sender: int, error: type[Exception], words: str
) -> None:
    async with swarm_of(tmp_path, stages=2) as swarm:
        source, target = swarm.stage(sender)[0], swarm.stage(0)[1]
        notice = Notice(
            **{"run": swarm.loaded.run_id.hex(), "round": 0, "started": 2, "open": [], "taken": [], **fields}
        )
        with pytest.raises(error, match=words):
            await source.dendrite.call(target.axon.endpoint, target.identity.hotkey, notice, reply=Noted, deadline=5)


async def test_what_a_head_claims_of_a_living_one_s_microbatches_changes_nothing(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=2) as swarm:
        liar, other = swarm.stage(0)
        claims = list(range(40))
        await liar.dendrite.call(
            other.axon.endpoint,
            other.identity.hotkey,
            Notice(run=swarm.loaded.run_id.hex(), round=0, started=0, open=[], taken=claims),
            reply=Noted,
            deadline=5,
        )
        await asyncio.wait_for(other.worker.drive(limit=12), 20)
        assert len(samples([other], MicrobatchDone)) == 12
        await close([other])


def test_heirs_are_drawn_for_each_sample() -> None:
    heads = tuple(f"head-{i}" for i in range(4))
    first = Counter(heirs(heads, seed=b"s", sample=sample)[0] for sample in range(400))
    assert min(first.values()) > 60
    assert heirs(heads, seed=b"s", sample=7) == heirs(heads[::-1], seed=b"s", sample=7)
