"""The asynchronous pipeline between real axons: work is done, receipted, replayable; refusals are typed."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from model.config import BoundaryConfig, BoundaryForm
from model.engine import StepReport
from model.split import split
from model.stage import assign_flat, build_stage, flatten
from neurons.archive import Archive
from neurons.flights import Flight
from neurons.training import OpenInput
from neurons.windows import root_of
from subnet.identity import verify
from subnet.messages import Accepted, Backward, Forward
from subnet.swarm.routing import sample_id
from subnet.transport.errors import (
    Busy,
    Dropped,
    NotFinite,
    Unavailable,
    UnknownHotkey,
    UnknownRun,
    Unreachable,
    WrongTensor,
)
from subnet.transport.synapse import tensor_bytes
from subnet.trust.audit import UnitTensors, comparable, replay
from subnet.trust.continuity import breaks
from subnet.trust.ledger import NO_DIGEST, Direction, Evidence, UnitKey, digest, receipt_message
from subnet.trust.settlement import Settlement, settle
from tests.neurons.swarm import SEED, Swarm, manifest, open_corpus, tiny, tokens_file

BOUNDARY = BoundaryConfig(form=BoundaryForm.A, width=8)


def swarm_of(tmp_path: Path, *, stages: int = 3, replicas: int = 2, wire: str = "bfloat16") -> Swarm:
    entry = tokens_file(tmp_path)
    loaded = manifest(tiny(boundary=BOUNDARY), entry, stages=stages, replicas=replicas, wire=wire).write(
        tmp_path / "manifest.toml"
    )
    return Swarm(loaded, open_corpus(tmp_path, loaded.manifest, entry), replicas=replicas)


async def close_all(swarm: Swarm) -> dict[str, Evidence]:
    return {hotkey: (await member.worker.close())[1] for hotkey, member in swarm.members.items()}


def kept(unit: UnitTensors | None) -> UnitTensors:
    assert unit is not None
    return unit


def assert_every_unit_replays(swarm: Swarm, evidence: dict[str, Evidence]) -> None:
    """With the weights of its window, as an auditor would."""
    config = swarm.loaded.manifest.model.config()
    plans = split(config, swarm.loaded.manifest.swarm.stages)
    for hotkey, table in evidence.items():
        parsed = Evidence.parse(table.tables())
        assert parsed.root == table.root
        parsed.check(stage=swarm.roster.stage_of(hotkey) or 0, samples=range(4096))
        assert_windows_follow(parsed)
        plan, held = plans[swarm.roster.stage_of(hotkey)], swarm.rounds[hotkey]
        stage = build_stage(config, plan, 0)
        for window in parsed.heads:
            assert root_of(held.windows[window.version].opening.weights.values) == window.weights
            assign_flat(stage, held.windows[window.version].opening.weights.values)
            for leaf in parsed.window(window.version):
                findings = replay(
                    stage,
                    leaf,
                    kept(held.unit(leaf.key)),
                    targets=swarm.corpus.sample(leaf.sample)[:, 1:] if plan.is_last else None,
                    accumulation=swarm.loaded.manifest.optimizer.accumulation,
                    tolerance=lambda _: 1e-4,
                    hotkey=hotkey,
                    number=0,
                )
                assert all(finding.passed for finding in findings), findings
                assert bool(findings) == comparable(plan, leaf)


def assert_windows_follow(evidence: Evidence) -> None:
    """Each window begins with what the one before left, but for weights that a merge changed in between."""
    for before, after in pairwise(evidence.heads):
        assert after.optimizer == before.next_optimizer
        assert (after.weights == before.next_weights) == (not after.merged)
        assert after.steps == before.steps + bool(before.backward)
        assert (before.next_weights != before.weights) == bool(before.backward)
    assert evidence.closing.weights == evidence.heads[-1].next_weights or evidence.heads[-1].backward


def paid_for(swarm: Swarm, evidence: dict[str, Evidence]) -> Settlement:
    """The settlement of round 0, every window acknowledged."""
    return settle(
        swarm.loaded.run_id,
        swarm.roster,
        evidence,
        verify,
        first_sample=0,
        seed=SEED,
        lane=swarm.loaded.manifest.swarm.lane,
        windows={hotkey: {head.version for head in table.heads} for hotkey, table in evidence.items()},
    )


async def test_everything_done_is_paid_and_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurons.door.room", lambda **_: 1 << 16)  # nobody full: nothing goes off the plan
    async with swarm_of(tmp_path) as swarm:
        heads = swarm.stage(0)
        await asyncio.gather(*(head.worker.drive(limit=12) for head in heads))
        evidence = await close_all(swarm)
        settlement = paid_for(swarm, evidence)
        assert len(settlement.pathways) == 24
        for hotkey, paid in settlement.paid.items():
            assert paid.forward + paid.backward == paid.claimed, hotkey
        assert len({path.hotkeys for path in settlement.pathways}) > 2

        assert_every_unit_replays(swarm, evidence)


async def test_weights_that_change_in_mid_round_change_between_steps(tmp_path: Path) -> None:
    """As a merge does while the next round trains: every unit still replays with the weights of its window."""
    async with swarm_of(tmp_path, stages=3, replicas=1) as swarm:
        drive = asyncio.create_task(swarm.stage(0)[0].worker.drive(limit=24))
        before = {hotkey: flatten(member.worker.engine.stage) for hotkey, member in swarm.members.items()}
        for factor in (0.99, 1.01):
            await asyncio.gather(
                *(member.worker.change_weights(lambda w, f=factor: w * f, held=1) for member in swarm.members.values())
            )
        await asyncio.wait_for(drive, 40)
        evidence = await close_all(swarm)
        for hotkey, member in swarm.members.items():
            waiting = asyncio.create_task(member.worker.change_weights(lambda _, w=before[hotkey]: w, held=2))
            await asyncio.wait_for(waiting, 10)
            assert torch.equal(flatten(member.worker.engine.stage), before[hotkey])
        assert_every_unit_replays(swarm, evidence)
        quota = swarm.loaded.manifest.data.samples_per_round
        for hotkey, table in evidence.items():
            table.check(stage=swarm.roster.stage_of(hotkey), samples=range(quota))


async def test_a_step_without_a_finite_gradient_still_ends_a_window(tmp_path: Path) -> None:
    """Its units are in the ledger, so a head has to bind them: else no reader would take the round's evidence."""
    async with swarm_of(tmp_path, stages=2, replicas=1) as swarm:
        head, tail = swarm.stage(0)[0], swarm.stage(1)[0]
        engine, steps = tail.worker.engine, 0
        step = engine.step

        def spoiled() -> StepReport:
            nonlocal steps
            steps += 1
            if steps == 2:
                next(p.grad for p in engine.stage.parameters() if p.grad is not None).fill_(float("nan"))
            return step()

        engine.step = spoiled  # type: ignore[method-assign]
        await head.worker.drive(limit=16)
        evidence = (await close_all(swarm))[tail.identity.hotkey]
        evidence.check(stage=1, samples=range(4096))
        assert list(breaks(evidence.heads)) == []
        lost = evidence.heads[1]
        assert (lost.weights, lost.optimizer) == (lost.next_weights, lost.next_optimizer)
        assert [entry.steps for entry in evidence.heads] == [0, 1, 1, 2]
        assert [entry.backward for entry in evidence.heads] == [4] * 4


async def test_a_gradient_that_cannot_be_sent_on_is_in_the_step_and_in_the_ledger(tmp_path: Path) -> None:
    """Its units' weight gradients cannot be taken out of the step again, so an audit must know of them."""
    async with swarm_of(tmp_path, stages=2, replicas=1) as swarm:
        head, tail = swarm.stage(0)[0], swarm.stage(1)[0]
        engine, calls = tail.worker.engine, 0
        compute, loop, enough = engine.tail, asyncio.get_running_loop(), asyncio.Event()

        def spoiled(
            key: int, x: torch.Tensor, targets: torch.Tensor, tokens: torch.Tensor | None
        ) -> tuple[float, torch.Tensor | None]:
            nonlocal calls
            calls += 1
            if calls == 12:
                loop.call_soon_threadsafe(enough.set)
            loss, dx = compute(key, x, targets, tokens)
            assert dx is not None
            return loss, dx * (1e30 if calls == 2 else 1)

        engine.tail = spoiled  # type: ignore[assignment]
        driving = asyncio.create_task(head.worker.drive())
        await enough.wait()
        head.worker.stop()
        await driving
        evidence = (await close_all(swarm))[tail.identity.hotkey]
        evidence.check(stage=1, samples=range(4096))
        assert [leaf.output == NO_DIGEST for leaf in evidence.leaves].count(True) == 1
        assert all(entry.backward == 4 for entry in evidence.heads[:-1])
        assert all(entry.steps == index for index, entry in enumerate(evidence.heads))


async def test_a_unit_given_up_while_it_is_computed_stays_in_the_ledger(tmp_path: Path) -> None:
    """Its gradient is in the step, which an audit computes again from the leaves."""
    async with swarm_of(tmp_path, stages=2, replicas=1) as swarm:
        head = swarm.stage(0)[0]
        engine, backward = head.worker.engine, head.worker.engine.backward
        current = head.worker._current()

        def given_up(key: int, g: torch.Tensor) -> torch.Tensor | None:
            current.open.pop(key, None)
            return backward(key, g)

        engine.backward = given_up  # type: ignore[method-assign]
        await asyncio.wait_for(head.worker.drive(limit=4), 20)
        evidence = (await close_all(swarm))[head.identity.hotkey]
        assert sum(leaf.direction is Direction.BACKWARD for leaf in evidence.leaves) == 4
        assert_windows_follow(evidence)


async def test_wire_carries_the_boundary_and_a_bounded_header(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=2, replicas=1) as swarm:
        head, tail = swarm.stage(0)[0], swarm.stage(1)[0]
        await head.worker.drive(limit=6)
        data = swarm.loaded.manifest.data
        payload = data.batch * data.sequence * BOUNDARY.width * 2
        for member, route in ((head, "forward"), (tail, "backward")):
            traffic = member.dendrite.counters[route]
            assert traffic.calls == 6
            assert 6 * payload < traffic.sent <= 6 * (payload + 600)


async def test_a_dead_replica_is_routed_around(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=3, replicas=2) as swarm:
        dead = swarm.stage(1)[0]
        await dead.axon.stop()
        head = swarm.stage(0)[0]
        await asyncio.wait_for(head.worker.drive(limit=6), 20)
        current, _ = await head.worker.close()
        assert current.completed == 6
        assert current.rerouted > 0


@pytest.mark.parametrize(("stage", "ring"), [(0, math.inf), (1, math.inf), (2, math.inf), (1, 0)])
async def test_a_replica_that_dies_in_mid_round_loses_no_microbatch(tmp_path: Path, stage: int, ring: float) -> None:
    """Killed with units accepted, computed and awaited; siblings take over, the microbatches of living heads return.
    Also where no closed window is kept as evidence."""
    swarm = swarm_of(tmp_path, stages=3, replicas=2)
    for member in swarm.members.values():
        member.archive = Archive(limit=ring)
    async with swarm:
        victim, survivor = swarm.stage(stage)
        heads = [head for head in swarm.stage(0) if head is not victim]
        drives = [asyncio.create_task(head.worker.drive(limit=16)) for head in swarm.stage(0)]
        inside = victim.worker._current()
        while inside.units < 2 or not (inside.open if stage else inside.awaited):  # noqa: ASYNC110 - has no event
            await asyncio.sleep(0)
        del swarm.endpoints[victim.identity.hotkey]  # dead at once; stopping a server in order takes a moment
        await victim.dendrite.stop()
        await victim.axon.stop()
        victim.worker.shut_down()
        await asyncio.wait_for(asyncio.gather(*(drives[swarm.stage(0).index(head)] for head in heads)), 40)
        for drive in drives:
            drive.cancel()
        async with asyncio.timeout(20):
            rounds = [member.worker._current() for member in swarm.members.values()]
            while not any(r.adopted + r.chased for r in rounds):  # noqa: ASYNC110 - counted by the workers
                await asyncio.sleep(0.01)
        closed = {
            member.identity.hotkey: await member.worker.close()
            for member in swarm.members.values()
            if member is not victim
        }
        for head in heads:
            current, _ = closed[head.identity.hotkey]
            assert current.completed == current.started == 16
        rounds = [current for current, _ in closed.values()]
        assert sum(current.adopted + current.chased for current in rounds) > 0
        evidence = {hotkey: table for hotkey, (_, table) in closed.items()}
        settlement = paid_for(swarm, evidence)
        assert settlement.paid[survivor.identity.hotkey].backward > 16 // 2
        samples = [path.sample for path in settlement.pathways]
        assert len(samples) == len(set(samples))


async def test_what_is_in_flight_at_close_is_lost_and_counted(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=2, replicas=1) as swarm:
        head, tail = swarm.stage(0)[0], swarm.stage(1)[0]
        await tail.axon.stop()
        drive = asyncio.create_task(head.worker.drive())
        while not any(swarm.units(head)):  # noqa: ASYNC110 - filled by the worker, which has no event
            await asyncio.sleep(0)
        current, evidence = await head.worker.close()
        await drive
        assert current.started > 0
        assert current.completed == 0
        assert head.events[-1].event.lost == current.started
        settlement = paid_for(swarm, {head.identity.hotkey: evidence})
        assert settlement.paid[head.identity.hotkey].forward == 0


def push(swarm: Swarm, kind: type[Forward] | type[Backward], **changes: object) -> Forward | Backward:
    fields = {
        "run": swarm.loaded.run_id.hex(),
        "round": 0,
        "sample": sample_id(base=0, heads=1, head=0, index=0),
        "head": swarm.roster.stages[0][0],
        "index": 0,
        "version": 0,
    }
    extra = {"loss": 0.0} if kind is Backward else {}
    return kind(**{**fields, **extra, **changes})


@pytest.mark.parametrize(
    ("changes", "sender", "fill", "error", "message"),
    [
        ({}, 0, float("nan"), NotFinite, "NaN"),
        ({"run": "00" * 8}, 0, 0.0, UnknownRun, "manifest"),
        ({"round": 7}, 0, 0.0, Unavailable, "has not begun"),
        ({}, 1, 0.0, UnknownHotkey, "does not hold stage 0"),
        ({"head": "5" + "X" * 47}, 0, 0.0, UnknownHotkey, "does not hold"),
    ],
)
async def test_bad_pushes_are_refused(
    tmp_path: Path, changes: dict[str, object], sender: int, fill: float, error: type[Exception], message: str
) -> None:
    async with swarm_of(tmp_path, stages=3, replicas=1) as swarm:
        source = swarm.stage(sender)[0] if sender == 0 else swarm.stage(2)[0]
        target = swarm.stage(1)[0]
        y = torch.full((4, 32, 8), fill, dtype=torch.bfloat16)
        with pytest.raises(error, match=message):
            await source.dendrite.call(
                target.axon.endpoint,
                target.identity.hotkey,
                push(swarm, Forward, **changes),
                {"y": y},
                reply=Accepted,
                deadline=5,
            )
        assert not target.worker._current().receipts


async def test_a_finite_but_huge_tensor_is_refused(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=2, replicas=1) as swarm:
        head, tail = swarm.stage(0)[0], swarm.stage(1)[0]
        with pytest.raises(NotFinite, match="limit 10000"):
            await head.dendrite.call(
                tail.axon.endpoint,
                tail.identity.hotkey,
                push(swarm, Forward),
                {"y": torch.full((4, 32, 8), 3.3e38, dtype=torch.bfloat16)},
                reply=Accepted,
                deadline=5,
            )
        assert not tail.worker._current().open


@pytest.mark.parametrize("changes", [{"sample": 1}, {"sample": 2**62, "index": 3}, {"index": 5000, "sample": 10_000}])
async def test_a_head_may_only_send_its_own_samples(tmp_path: Path, changes: dict[str, int]) -> None:
    async with swarm_of(tmp_path, stages=2, replicas=2) as swarm:
        (one, two), tail = swarm.stage(0), swarm.stage(1)[0]
        y = {"y": torch.zeros(4, 32, 8, dtype=torch.bfloat16)}
        # and nobody sends another head's sample while that one is there
        for sender, fields, refusal in ((one, changes, Dropped), (two, {}, Busy), (two, {}, Busy)):
            with pytest.raises(refusal, match=r"roster gives|may be there"):
                await sender.dendrite.call(
                    tail.axon.endpoint,
                    tail.identity.hotkey,
                    push(swarm, Forward, **fields),
                    y,
                    reply=Accepted,
                    deadline=5,
                )


async def test_a_gradient_is_taken_from_whoever_signed_for_the_activation_only(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=2, replicas=2) as swarm:
        head, tails = swarm.stage(0)[0], swarm.stage(1)
        await head.worker.drive(limit=1)
        number, signed = next(iter(head.worker._current().sinks.items()))
        thief = next(tail for tail in tails if tail.identity.hotkey not in signed)
        head.worker._current().receipts.clear()  # as if the gradient had not come yet
        head.worker._current().open[number] = OpenInput("", 0, torch.zeros(1), b"")
        with pytest.raises(Dropped, match="was not sent to"):
            await thief.dendrite.call(
                head.axon.endpoint,
                head.identity.hotkey,
                push(swarm, Backward, sample=number),
                {"g": torch.zeros(4, 32, 8, dtype=torch.bfloat16)},
                reply=Accepted,
                deadline=5,
            )
        head.worker._current().open.clear()


@pytest.mark.parametrize("loss", [1e308, float("nan"), float("inf"), -1.0])
def test_a_loss_that_no_tail_reports_is_no_message(loss: float) -> None:
    fields = {"run": "00" * 8, "round": 0, "sample": 0, "head": "5" + "C" * 47, "index": 0, "version": 0}
    with pytest.raises(ValidationError):
        Backward(**fields, loss=loss)


async def test_siblings_are_tried_before_a_microbatch_is_given_up(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=2, replicas=2) as swarm:
        head, refusing = swarm.stage(0)[0], swarm.stage(1)[0]
        await refusing.worker.close()  # answers every push with DROP from now on
        await asyncio.wait_for(head.worker.drive(limit=6), 20)
        current, _ = await head.worker.close()
        assert current.completed == 6
        assert current.rerouted > 0


async def until_decided(call: Callable[[], Awaitable[object]]) -> None:
    """Repeat a push that is answered BUSY, as its sender would."""
    while True:
        try:
            await call()
        except Busy as busy:
            await asyncio.sleep(busy.retry_after or 0.01)
        else:
            return


async def test_wrong_shape_and_unasked_gradient_are_refused(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=3, replicas=1) as swarm:
        head, body, tail = (swarm.stage(index)[0] for index in range(3))
        with pytest.raises(WrongTensor, match="plan says"):
            await head.dendrite.call(
                body.axon.endpoint,
                body.identity.hotkey,
                push(swarm, Forward),
                {"y": torch.zeros(4, 32, 9, dtype=torch.bfloat16)},
                reply=Accepted,
                deadline=5,
            )
        for receiver, sender, words in ((body, tail, "no forward open"), (head, body, "no forward open")):
            with pytest.raises(Dropped, match=words):
                await until_decided(
                    lambda sender=sender, receiver=receiver: sender.dendrite.call(
                        receiver.axon.endpoint,
                        receiver.identity.hotkey,
                        push(swarm, Backward),
                        {"g": torch.zeros(4, 32, 8, dtype=torch.bfloat16)},
                        reply=Accepted,
                        deadline=5,
                    )
                )


async def test_a_repeated_push_gets_the_same_receipt_and_is_computed_once(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=2, replicas=1) as swarm:
        head, tail = swarm.stage(0)[0], swarm.stage(1)[0]
        message = push(swarm, Forward)
        y = torch.zeros(4, 32, 8, dtype=torch.bfloat16)
        receipts = set()
        for _ in range(3):
            reply, _ = await head.dendrite.call(
                tail.axon.endpoint, tail.identity.hotkey, message, {"y": y}, reply=Accepted, deadline=5
            )
            receipts.add(reply.receipt)
        assert len(receipts) == 1
        signed = receipt_message(
            swarm.loaded.run_id,
            0,
            producer=head.identity.hotkey,
            key=UnitKey(0, Direction.FORWARD),
            stage=0,
            output=digest(tensor_bytes(y)),
        )
        assert verify(tail.identity.hotkey, signed, bytes.fromhex(receipts.pop()))
        _, evidence = await tail.worker.close()
        assert len(evidence.leaves) <= 1


async def test_a_repeated_gradient_gets_the_same_receipt_and_counts_once(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=2, replicas=1) as swarm:
        head, tail = swarm.stage(0)[0], swarm.stage(1)[0]
        await head.worker.drive(limit=1)
        key = UnitKey(next(iter(head.worker._current().sinks)), Direction.BACKWARD)
        signed = head.worker._current().receipts[key]
        for _ in range(3):
            reply, _ = await tail.dendrite.call(
                head.axon.endpoint,
                head.identity.hotkey,
                push(swarm, Backward, sample=key.sample),
                {"g": torch.zeros(4, 32, 8, dtype=torch.bfloat16)},
                reply=Accepted,
                deadline=5,
            )
            assert (tail.identity.hotkey, reply.receipt) == signed
        _, evidence = await head.worker.close()
        assert [leaf.key for leaf in evidence.leaves].count(key) == 1


async def test_closed_round_drops_pushes(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, stages=2, replicas=1) as swarm:
        head, tail = swarm.stage(0)[0], swarm.stage(1)[0]
        await tail.worker.close()
        with pytest.raises(Dropped, match="closed"):
            await head.dendrite.call(
                tail.axon.endpoint,
                tail.identity.hotkey,
                push(swarm, Forward),
                {"y": torch.zeros(4, 32, 8, dtype=torch.bfloat16)},
                reply=Accepted,
                deadline=5,
            )
        await tail.axon.stop()
        with pytest.raises(Unreachable):
            await head.dendrite.call(
                tail.axon.endpoint, tail.identity.hotkey, push(swarm, Forward), {}, reply=Accepted, deadline=5
            )


async def test_one_slow_flight_keeps_no_head_out_of_a_round(tmp_path: Path) -> None:
    entry = tokens_file(tmp_path)
    loaded = manifest(tiny(), entry, stages=2).write(tmp_path / "manifest.toml")
    async with Swarm(loaded, open_corpus(tmp_path, loaded.manifest, entry)) as swarm:
        (head,) = swarm.stage(0)
        head.worker._driver._flights.land(1000.0, Flight(0.0, 1))
        head.worker.closes(asyncio.get_running_loop().time() + 4.0)
        await head.worker.drive()
        assert head.worker._current().started > 1  # the first one shows that flights are fast again
