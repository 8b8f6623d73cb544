"""The stage worker: microbatches in from one side, out on the other, and the ledger of what was computed.

Every unit is a short coroutine: accept the push and sign its receipt, compute on the compute thread, enter the leaf,
hand the result to `Delivery`. Backward runs first; there is no flush. The head keeps W microbatches in flight, computed
from measured times. Pushes are idempotent: a repeated one gets the same receipt.

When a replica dies its microbatches live on. Whoever sent it an activation offers that to a sibling once the gradient
is overdue; whoever has a gradient for it hands that to a sibling, which takes the unit over: it fetches the input from
the stage before (a head makes it from the sample's tokens) and computes the backward only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import TypeVar

import torch

from model.data import Corpus
from model.engine import StageEngine
from neurons.archive import RoundArchive
from neurons.compute import ComputeThread, Lane
from neurons.delivery import RETRY_PAUSE, Delivery
from neurons.door import Door
from neurons.drive import Driver
from neurons.ferry import Departure, Landed, ferry_of, returnable
from neurons.filter import Filter, look
from neurons.heads import Heads
from neurons.kept import State
from neurons.shortage import Shortage
from neurons.telemetry import LocalStep, Telemetry, TrainingClosed
from neurons.training import OpenInput, TrainingRound
from neurons.windows import UNWITNESSED, Change, Changes, Opened, Stepped, Windows, Witness
from subnet.identity import Identity
from subnet.manifest import LoadedManifest
from subnet.messages import (
    WIRE_DTYPES,
    Accepted,
    Backward,
    Forward,
    Holder,
    HolderRequest,
    InputRequest,
    Noted,
    Notice,
    Push,
    Tensors,
)
from subnet.swarm.roster import Roster
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import Busy, Dropped
from subnet.transport.synapse import Received, tensor_bytes
from subnet.trust.audit import UnitTensors
from subnet.trust.ledger import NO_DIGEST, NO_ROOT, Closing, Direction, Evidence, Leaf, UnitKey, digest

log = logging.getLogger("orion.neurons.pipeline")

R = TypeVar("R")


class StageWorker:
    """One replica of one stage. `begin`, `drive` (heads), `stop` and `close` frame a round."""

    def __init__(
        self,
        *,
        identity: Identity,
        loaded: LoadedManifest,
        engine: StageEngine,
        corpus: Corpus,
        dendrite: Dendrite,
        endpoint_of: Callable[[str], str | None],
        telemetry: Telemetry,
        synchronous: bool = False,
        compute: Callable[..., ComputeThread] = ComputeThread,
    ) -> None:
        self.engine = engine
        self.plan = engine.plan
        self._identity = identity
        self._run = loaded.run_id
        self._manifest = loaded.manifest
        self._corpus = corpus
        self._telemetry = telemetry
        self._ferry = ferry_of(engine, WIRE_DTYPES[loaded.manifest.model.wire_dtype])
        self._delivery = Delivery(
            identity=identity,
            loaded=loaded,
            plan=engine.plan,
            dendrite=dendrite,
            endpoint_of=endpoint_of,
            crossing=lambda: self._driver.crossing,
        )
        self._synchronous = synchronous
        self._door = Door(identity, loaded, engine.plan, self._delivery)
        self._filter = Filter(stage=engine.plan.index, telemetry=telemetry, set_aside=self._delivery.set_aside)
        self._driver = Driver(
            identity=identity,
            loaded=loaded,
            engine=engine,
            corpus=corpus,
            delivery=self._delivery,
            heads=Heads(
                identity=identity,
                run=loaded.run_id,
                samples=loaded.manifest.data.samples_per_round,
                dendrite=dendrite,
                endpoint_of=endpoint_of,
            ),
            telemetry=telemetry,
            synchronous=synchronous,
            enter=self._enter,
            release=self._release,
            spawn=self._spawn,
        )
        self._compute = compute(name=f"stage-{self.plan.index}", ordered=synchronous, settle=self._ferry.settle)
        self.shortage = Shortage(engine, telemetry)
        self._round: TrainingRound | None = None
        self._windows: Windows | None = None
        self._changes = Changes()

    # -- the frame of a round -------------------------------------------------------------------------------------

    def begin(
        self, number: int, roster: Roster, seed: bytes, archive: RoundArchive, witness: Witness = UNWITNESSED
    ) -> TrainingRound:
        """Open round `number` for pushes. The engine's weights are what the round starts from."""
        self._compute.clear()
        self._round = TrainingRound(number, roster, seed, archive)
        first = Opened.of(self.engine, State.of(self.engine))
        self._windows = Windows(self._round.ledger, archive, first, witness)
        if self._changes:
            self._change_when_idle()
        if not self._synchronous:
            self._spawn(self._round.sends, self._delivery.chase(self._round, self._spawn))
        return self._round

    def closes(self, at: float) -> None:
        """When the round is expected to close, by the loop's clock: heads start nothing that would come later."""
        self._current().closing_at = at

    async def drive(self, *, limit: int | None = None) -> None:
        """At the head: keep the pipeline full until `stop`, or until `limit` microbatches were started and done."""
        await self._driver.drive(self._current(), limit=limit)

    def stop(self) -> None:
        """The head starts nothing more; what is in flight goes on."""
        current = self._current()
        current.stopping = True
        current.room.set()

    async def close(self) -> tuple[TrainingRound, Evidence]:
        """End training: refuse pushes, finish the running job, take the last step, close the ledger.

        What is still in flight at the head is lost and reported; gradients already computed count in the last step.
        """
        current = self._current()
        current.accepting = False
        self.stop()
        self._compute.clear()
        await self._compute.idle()
        await asyncio.gather(*current.work, return_exceptions=True)
        for task in list(current.sends):
            task.cancel()
        await asyncio.gather(*current.sends, return_exceptions=True)
        stepped, changed = await self._compute.submit(Lane.BACKWARD, 0, self._finish)
        if stepped is not None:
            self._enter_step(current, stepped)
        elif changed is not None:
            self._opened().changed(changed)
        self._compute.clear()
        if self._changes:  # one that came meanwhile
            self._change_when_idle()
        self._telemetry.emit(
            TrainingClosed(
                round=current.number,
                stage=self.plan.index,
                started=current.started,
                completed=current.completed,
                rerouted=current.rerouted,
                adopted=current.adopted,
                chased=current.chased,
                lost=current.started - current.completed,
                units=current.units,
                busy_seconds=round(self._compute.busy_seconds, 3),
            )
        )
        return current, current.ledger.close(Closing(await self._opened().finish(), NO_ROOT, NO_ROOT))

    async def change_weights(self, change: Change, *, held: int) -> None:
        """Replace the weights by `change(weights)` at the next step boundary, at once if nothing is accumulated.

        `held` rounds are merged into the public state that is taken over so.
        """
        done = self._changes.add(change, held)
        self._change_when_idle()
        await done

    def shut_down(self) -> None:
        """Stop at once, in mid-round too: nothing more is computed or sent."""
        if self._round is not None:
            self._round.accepting = False
            for task in (*self._round.work, *self._round.sends):
                task.cancel()
        self._compute.stop()

    # -- pushes in ------------------------------------------------------------------------------------------------

    async def on_forward(
        self, caller: str, push: Forward, tensors: Received
    ) -> tuple[Accepted, dict[str, torch.Tensor]]:
        """Accept an activation from the stage before: tensor `y` (B, T, b)."""
        x, x_digest = tensors["y"], tensors.payload
        seen = await look("y", x)  # whatever is asked below is then still true when it is acted on
        current = self._door.admit(self._round, push, caller, neighbour=self.plan.index - 1)
        key = UnitKey(push.sample, Direction.FORWARD)
        if key in current.receipts:
            return self._have(current, key, caller, push), {}
        if push.sample in current.open or UnitKey(push.sample, Direction.BACKWARD) in current.receipts:
            return Accepted(receipt=None), {}  # only its backward is computed here, in place of a sibling
        if not self._door.belongs(current, push):
            raise Dropped(
                f"sample {push.sample} is not number {push.index} of head {push.head[:12]}… in round {push.round}",
                "send samples that the roster gives to their head",
            )
        if self.plan.index == 1 and caller != push.head:
            self._door.require_gone(current, push, self._spawn)
        seconds = self._driver.unit_seconds.value / 2
        self._door.require_room(current, capacity=self.engine.capacity, unit_seconds=seconds)
        self._filter.require_usual(current, caller, push.sample, Direction.FORWARD, seen, x_digest)
        receipt = self._door.sign_receipt(current, key, caller, x_digest)
        source = current.roster.stages[self.plan.index - 1].index(caller)
        self._enter(current, push, OpenInput(caller, source, x, x_digest))
        return Accepted(receipt=receipt), {}

    async def on_backward(
        self, caller: str, push: Backward, tensors: Received
    ) -> tuple[Accepted, dict[str, torch.Tensor]]:
        """Accept the gradient of what this replica sent forward: tensor `g` (B, T, b)."""
        g, g_digest = tensors["g"], tensors.payload
        seen = await look("g", g)
        current = self._door.admit(self._round, push, caller, neighbour=self.plan.index + 1)
        key = UnitKey(push.sample, Direction.BACKWARD)
        if key in current.receipts:
            first, receipt = current.receipts[key]
            return Accepted(receipt=receipt if caller == first else None), {}
        if self.plan.is_first:
            self._driver.heads.require_awake(current)
        held = current.open.get(push.sample)
        if held is None:
            held = self._take_over(current, push)
        elif held.taken_over and self.plan.is_first:
            self._driver.require_heir(current, push, caller)
        if not held.taken_over:
            self._door.require_sink(current, push.sample, caller)
        self._filter.require_usual(current, caller, push.sample, Direction.BACKWARD, seen, g_digest)
        receipt = self._door.sign_receipt(current, key, caller, g_digest)
        source = current.roster.stages[self.plan.index + 1].index(caller)
        self._delivery.returned(current, push.sample)
        if self.plan.is_first and push.head != self._identity.hotkey:
            current.foreign.add(push.sample)
            current.taken.add(push.sample)
        taken = asyncio.get_running_loop().time()
        unit = self._backward_unit(current, push, g, g_digest, source, taken)
        self._spawn(current.work, self._guarded(current, push.sample, unit))
        return Accepted(receipt=receipt), {}

    async def on_holder(
        self, caller: str, request: HolderRequest, _tensors: Mapping[str, torch.Tensor]
    ) -> tuple[Holder, dict[str, torch.Tensor]]:
        """Say whether a sample is computed here, by whatever way it came."""
        current = self._door.admit(self._round, request, caller, neighbour=self.plan.index - 1)
        keys = (UnitKey(request.sample, direction) for direction in Direction)
        return Holder(holds=request.sample in current.open or any(key in current.receipts for key in keys)), {}

    async def on_input(
        self, caller: str, request: InputRequest, _tensors: Mapping[str, torch.Tensor]
    ) -> tuple[Tensors, dict[str, torch.Tensor]]:
        """Give a replica of the next stage the activation of a sample, so that it can take a sibling's unit over."""
        current = self._door.admit(self._round, request, caller, neighbour=self.plan.index + 1)
        output = current.output(request.sample)
        if output is None:
            raise Dropped(f"sample {request.sample} was not forwarded here", "ask another replica of this stage")
        current.claims.setdefault(request.sample, set()).add(caller)
        leaf = current.ledger.leaf(UnitKey(request.sample, Direction.FORWARD))
        self._spawn(current.sends, self._delivery.probe(current, current.pushes[request.sample], leaf, output))
        return Tensors(), {"y": output}

    async def on_notice(
        self, caller: str, notice: Notice, _tensors: Mapping[str, torch.Tensor]
    ) -> tuple[Noted, dict[str, torch.Tensor]]:
        """Hear from a sibling head how far it is."""
        current = self._door.admit(self._round, notice, caller, neighbour=0)
        if not self.plan.is_first:
            raise Dropped(f"stage {self.plan.index} starts no microbatches", "send notices to heads")
        return self._driver.heads.hear(current, caller, notice), {}

    def _have(self, current: TrainingRound, key: UnitKey, caller: str, push: Forward) -> Accepted:
        """Answer a forward that is here already. From another replica it means that the first one seems gone: the
        gradient, if there is one, is offered again, first to who had it and then to its siblings."""
        first, receipt = current.receipts[key]
        if caller == first:
            return Accepted(receipt=receipt)
        gradient = current.gradients.get(push.sample)
        if gradient is not None:
            leaf = current.ledger.leaf(UnitKey(push.sample, Direction.BACKWARD))
            backward = Backward.of(push, version=push.version, loss=leaf.loss)
            self._spawn(current.sends, self._delivery.backward(current, backward, leaf, gradient, first))
        return Accepted(receipt=None)

    def _take_over(self, current: TrainingRound, push: Backward) -> OpenInput:
        """A gradient for a sample that a sibling forwarded: get its input, then the backward can be computed here.

        Returns the open input; until it is there raises `Busy`, so that the sender keeps the gradient and tries again.
        """
        stray = Dropped(
            f"sample {push.sample} has no forward open at stage {self.plan.index}",
            "send gradients to the replica whose activation was received, or to a sibling once that one is gone",
        )
        if self.plan.is_first:
            held = self._driver.adopt(current, push) if self._door.belongs(current, push) else None
            if held is None:
                raise stray
            current.open[push.sample] = held
            return held
        if push.sample in current.orphans:
            raise stray
        if push.sample not in current.adopting:
            current.adopting.add(push.sample)
            self._spawn(current.sends, self._adopt(current, push))
        raise Busy(
            f"the input of sample {push.sample} is being fetched", "push again after the pause", retry_after=RETRY_PAUSE
        )

    async def _adopt(self, current: TrainingRound, push: Backward) -> None:
        found = await self._fetch_input(current, push)
        if UnitKey(push.sample, Direction.BACKWARD) in current.receipts:
            pass  # its forward has come meanwhile, and its gradient too
        elif found is not None and push.sample not in current.open:
            current.open[push.sample] = found
        elif found is None:
            current.orphans.add(push.sample)
        current.adopting.discard(push.sample)

    async def _fetch_input(self, current: TrainingRound, push: Backward) -> OpenInput | None:
        found = await self._delivery.fetch_input(current, push)
        if found is None:
            return None
        source, y = found
        y_digest = digest(tensor_bytes(y))
        if not await self._filter.takes(current, source, push.sample, y, y_digest):
            return None
        index = current.roster.stages[self.plan.index - 1].index(source)
        return OpenInput(source, index, y, y_digest, taken_over=True)

    # -- units ----------------------------------------------------------------------------------------------------

    def _enter(self, current: TrainingRound, push: Forward, held: OpenInput) -> None:
        """Open an input and compute its unit."""
        current.open[push.sample] = held
        unit = self._tail_unit(current, push, held) if self.plan.is_last else self._forward_unit(current, push, held)
        self._spawn(current.work, self._guarded(current, push.sample, unit))

    async def _forward_unit(self, current: TrainingRound, push: Forward, held: OpenInput) -> None:
        x, tokens = self._ferry.board(held.tensor), self._restored(push.sample)

        def job() -> tuple[int, Departure]:
            return self.engine.version, self._ferry.leave(self.engine.forward(push.sample, x(), tokens()))

        version, leaving = await self._timed(Lane.FORWARD, push.index, job)
        y, y_digest = leaving.landed()
        if push.sample not in current.open:  # released, or its gradient was faster
            await self._forget(current, push.sample)
            return
        leaf = Leaf(
            direction=Direction.FORWARD,
            stage=self.plan.index,
            sample=push.sample,
            version=version,
            source=held.source_index,
            input=held.digest,
            output=y_digest,
        )
        current.ledger.add(leaf)
        current.archive.add(version, leaf.key, UnitTensors(held.tensor, None, y))
        current.outputs[push.sample] = y
        forward = push.model_copy(update={"version": version})
        current.pushes[push.sample] = forward
        self._spawn(current.sends, self._delivery.forward(current, forward, leaf, y))

    async def _tail_unit(self, current: TrainingRound, push: Push, held: OpenInput) -> None:
        tokens = self._corpus.sample(push.sample)
        inputs = self._ferry.board(tokens[:, :-1] if self.plan.is_first else held.tensor)
        targets, restored = self._ferry.board(tokens[:, 1:]), self._restored(push.sample)

        def job() -> tuple[int, float, Departure | None, Stepped | None]:
            version = self.engine.version
            loss, dx = self.engine.tail(push.sample, inputs(), targets(), restored())
            return version, loss, None if dx is None else self._ferry.leave(dx), self._maybe_step()

        version, loss, leaving, stepped = await self._timed(Lane.FORWARD, push.index, job)
        dx = returnable(leaving, sample=push.sample, stage=self.plan.index)
        self._finish_backward(current, push, held, version, loss=loss, gradient=None, source=held.source_index, dx=dx)
        if stepped is not None:
            self._enter_step(current, stepped)

    async def _backward_unit(
        self, current: TrainingRound, push: Backward, g: torch.Tensor, g_digest: bytes, source: int, taken: float
    ) -> None:
        """`taken` is when its receipt was signed, by the loop's clock."""
        gradient, restored = self._ferry.board(g), self._restored(push.sample)
        held = current.open[push.sample]
        loop = asyncio.get_running_loop()

        def job() -> tuple[bool, int, Departure | None, Stepped | None] | None:
            if self.plan.is_first and not self._driver.may_count(current, push.sample, taken=taken, now=loop.time()):
                return None
            version = self.engine.version
            adopted = push.sample not in self.engine.pending()
            if adopted:
                self.engine.forward(push.sample, self._ferry.board(held.tensor)(), restored())
            dx = self.engine.backward(push.sample, gradient())
            return adopted, version, None if dx is None else self._ferry.leave(dx), self._maybe_step()

        while (done := await self._timed(Lane.BACKWARD, push.index, job)) is None:
            if not await self._driver.still_due(current, push.sample, taken=taken):
                return
        adopted, version, leaving, stepped = done
        dx = returnable(leaving, sample=push.sample, stage=self.plan.index)
        current.adopted += adopted or held.taken_over
        self._finish_backward(
            current, push, held, version, loss=push.loss, gradient=(g, g_digest), source=source, dx=dx
        )
        if stepped is not None:
            self._enter_step(current, stepped)

    def _restored(self, sample: int) -> Callable[[], torch.Tensor | None]:
        """A unit's tokens on their way in, where this stage restores them."""
        if not self.engine.stage.restores:
            return lambda: None
        return self._ferry.board(self._corpus.sample(sample)[:, :-1].contiguous())

    def _finish_backward(
        self,
        current: TrainingRound,
        push: Push,
        held: OpenInput,
        version: int,
        *,
        loss: float,
        gradient: tuple[torch.Tensor, bytes] | None,
        source: int,
        dx: Landed | None,
    ) -> None:
        """Enter the backward leaf, then pass the input's gradient on or, at the head, count the microbatch."""
        current.open.pop(push.sample, None)  # given up meanwhile or not: its gradient is in the step
        leaf = Leaf(
            direction=Direction.BACKWARD,
            stage=self.plan.index,
            sample=push.sample,
            version=version,
            source=source,
            loss=loss,
            input=held.digest,
            gradient=NO_DIGEST if gradient is None else gradient[1],
            output=NO_DIGEST if dx is None else dx.digest,
        )
        current.ledger.add(leaf)
        current.units += 1
        output = None if dx is None else dx.tensor
        came = None if gradient is None else gradient[0]
        current.archive.add(version, leaf.key, UnitTensors(held.tensor, came, output))
        current.outputs.pop(push.sample, None)
        if self.plan.is_first:
            self._driver.complete(current, push, loss)
        if output is None:
            return
        current.pass_on(push.sample, output)
        backward = Backward.of(push, version=version, loss=loss)
        self._spawn(current.sends, self._delivery.backward(current, backward, leaf, output, held.source))

    # -- steps ----------------------------------------------------------------------------------------------------

    def _maybe_step(self) -> Stepped | None:
        return self._step() if self.engine.units_accumulated >= self._manifest.optimizer.accumulation else None

    def _step(self) -> Stepped:
        units = self.engine.units_accumulated
        report = self.engine.step()
        after = State.of(self.engine)
        return Stepped(report, units, after, self._changes.take_over(self.engine, after))

    def _finish(self) -> tuple[Stepped | None, Opened | None]:
        """On the compute thread, at the end of a round: forget what is open and take the last step, if there is one."""
        for key in self.engine.pending():
            self.engine.drop(key)
        if self.engine.units_accumulated:
            return self._step(), None
        return None, self._changes.take_over(self.engine, None) if self._changes else None

    def _change_when_idle(self) -> None:
        """Without gradients in the making the weights may change now; else the next step will do it."""

        def job() -> Opened | None:
            idle = self._changes and not self.engine.units_accumulated
            return self._changes.take_over(self.engine, None) if idle else None

        answer = self._compute.submit(Lane.BACKWARD, 0, job)
        answer.add_done_callback(lambda job: None if job.cancelled() else self._enter_change(job.result()))

    def _enter_change(self, changed: Opened | None) -> None:
        if changed is not None and self._round is not None and self._round.accepting:
            self._opened().changed(changed)

    def _enter_step(self, current: TrainingRound, stepped: Stepped) -> None:
        self._opened().stepped(stepped)
        report = stepped.report
        self._telemetry.emit(
            LocalStep(
                round=current.number,
                stage=self.plan.index,
                version=stepped.opened.version,
                units=stepped.units,
                grad_norm=round(report.grad_norm, 6),
                lr=report.lr,
                finite=report.finite,
            )
        )

    def _opened(self) -> Windows:
        if self._windows is None:
            raise RuntimeError("no round has begun: call begin first")
        return self._windows

    # -- helpers --------------------------------------------------------------------------------------------------

    async def _guarded(self, current: TrainingRound, sample: int, unit: Coroutine[object, object, None]) -> None:
        """A unit that fails is lost, but neither its slot here nor its flight stays taken."""
        try:
            await unit
        except Exception:
            current.open.pop(sample, None)
            self._driver.land(current, sample)
            if current.accepting and sample in self.engine.pending():
                await self._compute.submit(Lane.BACKWARD, 0, lambda: self.engine.drop(sample))
            raise

    def _release(self, current: TrainingRound, sample: int) -> None:
        """Forget an open input whose gradient nobody waits for here any more."""
        current.open.pop(sample, None)
        current.awaited.pop(sample, None)
        current.outputs.pop(sample, None)
        self._spawn(current.sends, self._forget(current, sample))

    async def _forget(self, current: TrainingRound, sample: int) -> None:
        def job() -> None:
            if sample in self.engine.pending() and sample not in current.open:
                self.engine.drop(sample)

        if current.accepting:
            await self._compute.submit(Lane.BACKWARD, 0, job)

    def _current(self) -> TrainingRound:
        if self._round is None:
            raise RuntimeError("no round has begun: call begin first")
        return self._round

    async def _timed(self, lane: Lane, index: int, job: Callable[[], R]) -> R:
        loop = asyncio.get_running_loop()

        def measured() -> R:
            start = loop.time()
            result = job()
            self._ferry.keep_pace()
            if result is not None:  # put off otherwise
                # F + B of a unit is the sum of both means; one mean over both lanes is half of it.
                self._driver.unit_seconds.add(2 * (loop.time() - start))
            return result

        return await self._compute.submit(lane, index, measured)

    def _spawn(self, tasks: set[asyncio.Task[None]], coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(lambda done: self._collect(tasks, done))

    def _collect(self, tasks: set[asyncio.Task[None]], done: asyncio.Task[None]) -> None:
        tasks.discard(done)
        error = None if done.cancelled() else done.exception()
        if error is not None and not self.shortage.ends(error):
            log.error("a unit at stage %d was lost: %s", self.plan.index, error, exc_info=error)
