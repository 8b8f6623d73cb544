"""The stage worker: microbatches in from one side, out on the other, and the ledger of what was computed.

Every unit is a short coroutine: accept the push and sign its receipt, compute on the compute thread, enter the leaf,
hand the result to the next hop. Backward runs first; there is no flush. The head keeps W microbatches in flight,
computed from measured times. A forward that its planned hop refuses or cannot be reached for goes to a sibling; a
gradient goes back to whoever sent the input. Pushes are idempotent: a repeated one gets the same receipt.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from model.data import Corpus
from model.engine import StageEngine, StepReport
from model.stage import flatten
from neurons.archive import RoundArchive
from neurons.compute import ComputeThread, Lane
from neurons.telemetry import LocalStep, MicrobatchDone, Telemetry, TrainingClosed
from subnet.identity import Identity, verify
from subnet.manifest import LoadedManifest
from subnet.messages import WIRE_DTYPES, Accepted, Backward, Forward, Push
from subnet.swarm.roster import Roster
from subnet.swarm.routing import depth, hops, sample_id
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import (
    BadReply,
    Busy,
    Dropped,
    Refused,
    Unavailable,
    UnknownHotkey,
    UnknownRun,
    Unreachable,
)
from subnet.transport.synapse import require_finite, tensor_bytes
from subnet.trust.audit import UnitTensors
from subnet.trust.ledger import (
    NO_DIGEST,
    NO_PEER,
    Direction,
    Evidence,
    Leaf,
    Ledger,
    UnitKey,
    digest,
    receipt_message,
)

log = logging.getLogger("orion.neurons.pipeline")

R = TypeVar("R")
StepResult = tuple[StepReport, int, torch.Tensor]
"""What a step leaves: its report, how many units it took, the weights after it (flat fp32)."""

PUSH_DEADLINE = 10.0
RETRY_PAUSE = 0.05
RECENT_FLIGHTS = 8
DRAIN_MARGIN = 1.5
"""A microbatch is started only if this many times the slowest recent flight fits before the round closes."""
DEPTH_LIMIT_PER_STAGE = 4
"""At most this many microbatches in flight per head and stage: bounds input caches and staleness."""


class _Mean:
    """Exponential mean of a measured duration in seconds."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, sample: float) -> None:
        self.value = sample if self.value == 0.0 else 0.9 * self.value + 0.1 * sample


@dataclass
class _Input:
    """A forward unit whose gradient is awaited: where its input came from and what it was."""

    source: str
    source_index: int
    tensor: torch.Tensor
    digest: bytes


@dataclass
class TrainingRound:
    """One round's training at one replica, from the first push to the closed ledger."""

    number: int
    roster: Roster
    seed: bytes
    archive: RoundArchive
    ledger: Ledger = field(default_factory=Ledger)
    accepting: bool = True
    receipts: dict[UnitKey, str] = field(default_factory=dict)
    open: dict[int, _Input] = field(default_factory=dict)
    flights: dict[int, float] = field(default_factory=dict)
    """At the head: samples in flight and when they left."""
    started: int = 0
    completed: int = 0
    rerouted: int = 0
    units: int = 0
    losses: list[float] = field(default_factory=list)
    work: set[asyncio.Task[None]] = field(default_factory=set)
    sends: set[asyncio.Task[None]] = field(default_factory=set)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    stopping: bool = False


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
    ) -> None:
        self.engine = engine
        self.plan = engine.plan
        self._identity = identity
        self._run = loaded.run_id
        self._manifest = loaded.manifest
        self._corpus = corpus
        self._dendrite = dendrite
        self._endpoint_of = endpoint_of
        self._telemetry = telemetry
        self._wire = WIRE_DTYPES[loaded.manifest.model.wire_dtype]
        self._synchronous = synchronous
        self._compute = ComputeThread(name=f"stage-{self.plan.index}", ordered=synchronous)
        self._round: TrainingRound | None = None
        self._unit_seconds = _Mean()
        self._push_seconds = _Mean()
        self._flight_seconds: deque[float] = deque(maxlen=RECENT_FLIGHTS)

    # -- the frame of a round -------------------------------------------------------------------------------------

    def begin(self, number: int, roster: Roster, seed: bytes, archive: RoundArchive) -> TrainingRound:
        """Open round `number` for pushes. The engine's weights are what the round starts from."""
        self._compute.clear()
        self._round = TrainingRound(number, roster, seed, archive)
        self._open_window(self._round, self.engine.version, flatten(self.engine.stage))
        return self._round

    async def drive(self, *, closing_at: float = math.inf, limit: int | None = None) -> None:
        """At the head: keep the pipeline full until `stop`, or until `limit` microbatches were started and done.

        `closing_at` is when the round closes, by the loop's clock: nothing is started that would not be back by then,
        judged by how long the slowest of the last microbatches took.
        """
        current = self._current()
        quota = self._manifest.data.samples_per_round // len(current.roster.stages[0])
        ends = quota if limit is None else min(quota, limit)
        loop = asyncio.get_running_loop()
        while not current.stopping and current.started < ends:
            if loop.time() + DRAIN_MARGIN * max(self._flight_seconds, default=0.0) > closing_at:
                return
            if not self._has_room(current):
                current.room.clear()
                await current.room.wait()
                continue
            self._start_sample(current)
        while limit is not None and current.flights:
            current.room.clear()
            await current.room.wait()

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
        for key in self.engine.pending():
            self.engine.drop(key)
        if self.engine.units_accumulated:
            self._enter_step(current, *await self._compute.submit(Lane.BACKWARD, 0, self._step))
            self._compute.clear()
        self._telemetry.emit(
            TrainingClosed(
                round=current.number,
                stage=self.plan.index,
                started=current.started,
                completed=current.completed,
                rerouted=current.rerouted,
                lost=current.started - current.completed,
                units=current.units,
                busy_seconds=round(self._compute.busy_seconds, 3),
            )
        )
        return current, current.ledger.close()

    def shut_down(self) -> None:
        self._compute.stop()

    # -- pushes in ------------------------------------------------------------------------------------------------

    async def on_forward(
        self, caller: str, push: Forward, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[Accepted, dict[str, torch.Tensor]]:
        """Accept an activation from the stage before: tensor `y` (B, T, b)."""
        current = self._admit(push, caller, neighbour=self.plan.index - 1)
        key = UnitKey(push.sample, Direction.FORWARD)
        if key in current.receipts:
            return Accepted(receipt=current.receipts[key]), {}
        if len(current.open) >= self.engine.capacity:
            raise Busy(
                f"stage {self.plan.index} holds {len(current.open)} inputs of {self.engine.capacity}",
                "push again after the pause or to a sibling replica",
                retry_after=RETRY_PAUSE,
            )
        require_finite(tensors)
        x = tensors["y"]
        x_digest = digest(tensor_bytes(x))
        receipt = self._sign_receipt(current, key, caller, x_digest)
        source = current.roster.stages[self.plan.index - 1].index(caller)
        held = _Input(caller, source, x, x_digest)
        current.open[push.sample] = held
        unit = self._tail_unit(current, push, held) if self.plan.is_last else self._forward_unit(current, push, held)
        self._spawn(current.work, unit)
        return Accepted(receipt=receipt), {}

    async def on_backward(
        self, caller: str, push: Backward, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[Accepted, dict[str, torch.Tensor]]:
        """Accept the gradient of what this replica sent forward: tensor `g` (B, T, b)."""
        current = self._admit(push, caller, neighbour=self.plan.index + 1)
        key = UnitKey(push.sample, Direction.BACKWARD)
        if key in current.receipts:
            return Accepted(receipt=current.receipts[key]), {}
        if push.sample not in current.open:
            raise Dropped(
                f"sample {push.sample} has no forward open at stage {self.plan.index}",
                "send gradients only to the replica whose activation was received",
            )
        require_finite(tensors)
        g = tensors["g"]
        g_digest = digest(tensor_bytes(g))
        receipt = self._sign_receipt(current, key, caller, g_digest)
        source = current.roster.stages[self.plan.index + 1].index(caller)
        self._spawn(current.work, self._backward_unit(current, push, g, g_digest, source))
        return Accepted(receipt=receipt), {}

    def _admit(self, push: Push, caller: str, *, neighbour: int) -> TrainingRound:
        current = self._round
        if push.run != self._run.hex():
            raise UnknownRun(f"run {push.run} is not {self._run.hex()}", "start with the manifest that is on chain")
        if current is None or push.round > current.number:
            raise Busy(f"round {push.round} has not begun here", "push again after the pause", retry_after=RETRY_PAUSE)
        if push.round < current.number or not current.accepting:
            raise Dropped(f"round {push.round} is closed here", "drop what belongs to it")
        if current.roster.stage_of(caller) != neighbour or push.head not in current.roster.stages[0]:
            raise UnknownHotkey(
                f"{caller} does not hold stage {neighbour} in round {push.round}",
                "check the roster: `orion roster` prints it",
            )
        return current

    def _sign_receipt(self, current: TrainingRound, key: UnitKey, producer: str, output: bytes) -> str:
        stage = self.plan.index + (-1 if key.direction is Direction.FORWARD else 1)
        message = receipt_message(self._run, current.number, producer=producer, key=key, stage=stage, output=output)
        receipt = self._identity.sign(message).hex()
        current.receipts[key] = receipt
        return receipt

    # -- units ----------------------------------------------------------------------------------------------------

    async def _forward_unit(self, current: TrainingRound, push: Push, held: _Input) -> None:
        x = held.tensor if self.plan.is_first else held.tensor.to(torch.float32)
        version, y = await self._timed(
            Lane.FORWARD, push.index, lambda: (self.engine.version, self.engine.forward(push.sample, x).to(self._wire))
        )
        y_digest = digest(tensor_bytes(y))
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
        current.archive.units[leaf.key] = UnitTensors(held.tensor, None, y)
        forward = Forward(
            run=push.run, round=push.round, sample=push.sample, head=push.head, index=push.index, version=version
        )
        self._spawn(current.sends, self._send_forward(current, forward, leaf, y))

    async def _tail_unit(self, current: TrainingRound, push: Push, held: _Input) -> None:
        tokens = self._corpus.sample(push.sample)
        inputs = tokens[:, :-1] if self.plan.is_first else held.tensor.to(torch.float32)
        targets = tokens[:, 1:]

        def job() -> tuple[int, float, torch.Tensor | None, StepResult | None]:
            version = self.engine.version
            loss, dx = self.engine.tail(push.sample, inputs, targets)
            return version, loss, None if dx is None else dx.to(self._wire), self._maybe_step()

        version, loss, dx, stepped = await self._timed(Lane.FORWARD, push.index, job)
        self._finish_backward(current, push, held, version, loss=loss, gradient=None, source=held.source_index, dx=dx)
        if stepped is not None:
            self._enter_step(current, *stepped)

    async def _backward_unit(
        self, current: TrainingRound, push: Backward, g: torch.Tensor, g_digest: bytes, source: int
    ) -> None:
        gradient = g.to(torch.float32)

        def job() -> tuple[int, torch.Tensor | None, StepResult | None]:
            version = self.engine.version
            dx = self.engine.backward(push.sample, gradient)
            return version, None if dx is None else dx.to(self._wire), self._maybe_step()

        version, dx, stepped = await self._timed(Lane.BACKWARD, push.index, job)
        held = current.open[push.sample]
        self._finish_backward(
            current, push, held, version, loss=push.loss, gradient=(g, g_digest), source=source, dx=dx
        )
        if stepped is not None:
            self._enter_step(current, *stepped)

    def _finish_backward(
        self,
        current: TrainingRound,
        push: Push,
        held: _Input,
        version: int,
        *,
        loss: float,
        gradient: tuple[torch.Tensor, bytes] | None,
        source: int,
        dx: torch.Tensor | None,
    ) -> None:
        """Enter the backward leaf, then pass the input's gradient on or, at the head, count the microbatch."""
        del current.open[push.sample]
        leaf = Leaf(
            direction=Direction.BACKWARD,
            stage=self.plan.index,
            sample=push.sample,
            version=version,
            source=source,
            loss=loss,
            input=held.digest,
            gradient=NO_DIGEST if gradient is None else gradient[1],
            output=NO_DIGEST if dx is None else digest(tensor_bytes(dx)),
        )
        current.ledger.add(leaf)
        current.units += 1
        current.archive.units[leaf.key] = UnitTensors(held.tensor, None if gradient is None else gradient[0], dx)
        if dx is None:
            self._complete(current, push.sample, loss)
            return
        backward = Backward(
            run=push.run,
            round=push.round,
            sample=push.sample,
            head=push.head,
            index=push.index,
            version=version,
            loss=loss,
        )
        self._spawn(current.sends, self._send_backward(current, backward, leaf, dx, held))

    # -- steps ----------------------------------------------------------------------------------------------------

    def _maybe_step(self) -> StepResult | None:
        return self._step() if self.engine.units_accumulated >= self._manifest.optimizer.accumulation else None

    def _step(self) -> StepResult:
        units = self.engine.units_accumulated
        report = self.engine.step()
        return report, units, flatten(self.engine.stage)

    def _enter_step(self, current: TrainingRound, report: StepReport, units: int, weights: torch.Tensor) -> None:
        self._open_window(current, report.version, weights)
        self._telemetry.emit(
            LocalStep(
                round=current.number,
                stage=self.plan.index,
                version=report.version,
                units=units,
                grad_norm=round(report.grad_norm, 6),
                lr=report.lr,
                finite=report.finite,
            )
        )

    def _open_window(self, current: TrainingRound, version: int, weights: torch.Tensor) -> None:
        current.archive.windows[version] = weights
        current.ledger.open_window(version, digest(tensor_bytes(weights)))

    # -- pushes out -----------------------------------------------------------------------------------------------

    async def _send_forward(self, current: TrainingRound, push: Forward, leaf: Leaf, y: torch.Tensor) -> None:
        """Push to the planned hop, else to its siblings, until one accepts or the round closes."""
        replicas = current.roster.stages[self.plan.index + 1]
        order = hops(replicas, seed=current.seed, head=push.head, stage=self.plan.index + 1, index=push.index)
        turn = 0
        while current.accepting:
            hop = order[turn % len(order)]
            try:
                receipt = await self._push(current, hop, push, {"y": y}, leaf)
            except (Busy, Unavailable, Unreachable, BadReply) as refusal:
                pause = getattr(refusal, "retry_after", None) or RETRY_PAUSE
                log.debug("forward of sample %d to %s: %s", push.sample, hop, refusal)
                turn += 1
                await asyncio.sleep(pause)
                continue
            except Refused as refusal:
                log.warning("forward of sample %d was refused by %s: %s", push.sample, hop, refusal)
                return
            current.ledger.receipt(leaf.key, sink=replicas.index(hop), signature=receipt)
            current.rerouted += hop != order[0]
            return

    async def _send_backward(
        self, current: TrainingRound, push: Backward, leaf: Leaf, dx: torch.Tensor, held: _Input
    ) -> None:
        """Push the input's gradient to the replica the input came from, until it accepts or the round closes."""
        while current.accepting:
            try:
                receipt = await self._push(current, held.source, push, {"g": dx}, leaf)
            except (Busy, Unavailable, Unreachable, BadReply) as refusal:
                log.debug("gradient of sample %d to %s: %s", push.sample, held.source, refusal)
                await asyncio.sleep(RETRY_PAUSE)
                continue
            except Refused as refusal:
                log.warning("gradient of sample %d was refused by %s: %s", push.sample, held.source, refusal)
                return
            current.ledger.receipt(leaf.key, sink=held.source_index, signature=receipt)
            return

    async def _push(
        self, current: TrainingRound, hop: str, push: Push, tensors: Mapping[str, torch.Tensor], leaf: Leaf
    ) -> bytes:
        """One push; the receipt it returns is checked before it is believed."""
        endpoint = self._endpoint_of(hop)
        if endpoint is None:
            raise Unreachable(f"{hop} serves no axon at the last finalized block; a sibling is tried")
        loop = asyncio.get_running_loop()
        start = loop.time()
        accepted, _ = await self._dendrite.call(endpoint, hop, push, tensors, reply=Accepted, deadline=PUSH_DEADLINE)
        self._push_seconds.add(loop.time() - start)
        receipt = bytes.fromhex(accepted.receipt)
        message = receipt_message(
            self._run,
            current.number,
            producer=self._identity.hotkey,
            key=leaf.key,
            stage=self.plan.index,
            output=leaf.output,
        )
        if not verify(hop, message, receipt):
            raise BadReply(f"{hop} signed a receipt over something else than it was sent; a sibling is tried")
        return receipt

    # -- the head -------------------------------------------------------------------------------------------------

    def depth(self) -> int:
        """Microbatches this head keeps in flight now."""
        if self._synchronous:
            return self._manifest.optimizer.accumulation
        return depth(
            stages=self.plan.count,
            compute=self._unit_seconds.value,
            latency=0.0,
            transfer=2 * self._push_seconds.value,
            limit=DEPTH_LIMIT_PER_STAGE * self.plan.count,
        )

    def _has_room(self, current: TrainingRound) -> bool:
        if self._synchronous and current.started % self._manifest.optimizer.accumulation == 0:
            return not current.flights
        return len(current.flights) < self.depth() and len(current.open) < self.engine.capacity

    def _start_sample(self, current: TrainingRound) -> None:
        heads = current.roster.stages[0]
        index = current.started
        sample = sample_id(
            base=current.number * self._manifest.data.samples_per_round,
            heads=len(heads),
            head=heads.index(self._identity.hotkey),
            index=index,
        )
        current.started += 1
        current.flights[sample] = asyncio.get_running_loop().time()
        tokens = self._corpus.sample(sample)[:, :-1].contiguous()
        push = Push(
            run=self._run.hex(),
            round=current.number,
            sample=sample,
            head=self._identity.hotkey,
            index=index,
            version=self.engine.version,
        )
        held = _Input(self._identity.hotkey, NO_PEER, tokens, digest(tensor_bytes(tokens)))
        current.open[sample] = held
        unit = self._tail_unit(current, push, held) if self.plan.is_last else self._forward_unit(current, push, held)
        self._spawn(current.work, unit)

    def _complete(self, current: TrainingRound, sample: int, loss: float) -> None:
        seconds = asyncio.get_running_loop().time() - current.flights.pop(sample)
        self._flight_seconds.append(seconds)
        current.completed += 1
        current.losses.append(loss)
        current.room.set()
        self._telemetry.emit(
            MicrobatchDone(
                round=current.number, sample=sample, loss=round(loss, 5), seconds=round(seconds, 4), depth=self.depth()
            )
        )

    # -- helpers --------------------------------------------------------------------------------------------------

    def _current(self) -> TrainingRound:
        if self._round is None:
            raise RuntimeError("no round has begun: call begin first")
        return self._round

    async def _timed(self, lane: Lane, index: int, job: Callable[[], R]) -> R:
        loop = asyncio.get_running_loop()

        def measured() -> R:
            start = loop.time()
            result = job()
            # F + B of a unit is the sum of both means; one mean over both lanes is half of it.
            self._unit_seconds.add(2 * (loop.time() - start))
            return result

        return await self._compute.submit(lane, index, measured)

    def _spawn(self, tasks: set[asyncio.Task[None]], coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(lambda done: self._collect(tasks, done))

    def _collect(self, tasks: set[asyncio.Task[None]], done: asyncio.Task[None]) -> None:
        tasks.discard(done)
        if not done.cancelled() and done.exception() is not None:
            log.error("a unit at stage %d was lost: %s", self.plan.index, done.exception(), exc_info=done.exception())
