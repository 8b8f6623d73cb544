"""Tensors between host and device, so that the compute thread waits for no copy.

A unit's input is on its way to the device while the unit before it computes; a result is copied out while the next unit
computes, and a thread of its own waits for it, looks at it and hashes it. On a CPU nothing is copied that is not cast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import torch

from model.engine import StageEngine
from subnet.messages import WIRE_LIMIT
from subnet.transport.errors import NotFinite
from subnet.transport.synapse import OFF_LOOP, require_finite, tensor_bytes
from subnet.trust.ledger import digest

log = logging.getLogger("orion.neurons.ferry")

T = TypeVar("T")
Boarded = Callable[[], torch.Tensor]
"""Called on the compute thread: the tensor, on the device, in the stage's dtype."""


class Landed(NamedTuple):
    """A result in host memory, in the wire's dtype."""

    tensor: torch.Tensor
    digest: bytes
    """Of its bytes, as leaves name it."""


class Departure:
    """A result on its way to host memory, until its job is answered."""

    def __init__(self, wired: torch.Tensor) -> None:
        """`wired` is in host memory and the wire's dtype; what is in it may still be to come."""
        self.wired = wired
        self._found: Landed | NotFinite | None = None

    def check(self) -> None:
        """Look at it once it is there: the other side refuses what is not finite."""
        try:
            require_finite({"output": self.wired}, limit=WIRE_LIMIT)
        except NotFinite as error:
            self._found = error
        else:
            self._found = Landed(self.wired, digest(tensor_bytes(self.wired)))

    def landed(self) -> Landed:
        """The result, once its job is answered. Raises `NotFinite`."""
        if self._found is None:
            raise RuntimeError("a result is looked at before its job is answered")
        if isinstance(self._found, NotFinite):
            raise self._found
        return self._found


class Ferry(Protocol):
    """One stage's way in and out."""

    def board(self, tensor: torch.Tensor) -> Boarded:
        """Any thread: set a host tensor on its way in. Tokens keep their dtype."""
        ...

    def leave(self, tensor: torch.Tensor) -> Departure:
        """Compute thread: set a result on its way out."""
        ...

    def settle(self, answer: Callable[[], object]) -> None:
        """Compute thread, once per job: call `answer` when all that has left is there, in the order of the jobs."""
        ...

    def keep_pace(self) -> None:
        """Compute thread, at the end of a job: wait until the device has done the job before. So one job is queued
        behind the one that computes, priorities count for all others, and a job takes as long as the device does."""
        ...


def ferry_of(engine: StageEngine, wire: torch.dtype) -> Ferry:
    """For where the engine's stage is."""
    dtype = engine.stage.dtype
    if engine.device.type == "cuda":
        return CudaFerry(engine.device, dtype, wire, with_room=engine.with_room)
    return HostFerry(dtype, wire)


class WithRoom(Protocol):
    """`StageEngine.with_room`."""

    def __call__(self, work: Callable[[], T]) -> T: ...


class HostFerry:
    """Where the device is the host: a cast at most. Large results are looked at and hashed beside the next unit."""

    def __init__(self, dtype: torch.dtype, wire: torch.dtype) -> None:
        self._dtype = dtype
        self._wire = wire
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="ferry")
        self._waits = False
        """Whether something has ever gone through the waiter: from then on all answers do, to keep their order."""

    def board(self, tensor: torch.Tensor) -> Boarded:
        return lambda: tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def leave(self, tensor: torch.Tensor) -> Departure:
        departure = Departure(tensor.to(self._wire))
        if departure.wired.nbytes < OFF_LOOP:
            departure.check()
        else:
            self._waits = True
            self._waiter.submit(departure.check)
        return departure

    def settle(self, answer: Callable[[], object]) -> None:
        if self._waits:
            self._waiter.submit(answer)
        else:
            answer()

    def keep_pace(self) -> None:
        return


class CudaFerry:
    """Pinned host memory, a stream each way, events in between; the compute thread uses its current stream.

    A block freed on one stream may be given away while another still reads it: hence each `record_stream`. Pinned
    memory needs none, since the host allocator keeps a block until the copies that use it are over.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        wire: torch.dtype,
        *,
        with_room: WithRoom = lambda work: work(),
    ) -> None:
        """`with_room`, called on the compute thread, makes room on the device for what finds none."""
        self._with_room = with_room
        self._device = device
        self._dtype = dtype
        self._wire = wire
        self._inward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._outward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._before: torch.cuda.Event | None = None
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="ferry")

    def board(self, tensor: torch.Tensor) -> Boarded:
        pinned = tensor.pin_memory()
        try:
            coming = self._send(pinned)
        except torch.OutOfMemoryError:
            coming = None  # room is made by who computes

        def take() -> torch.Tensor:
            there, arrived = self._with_room(lambda: self._send(pinned)) if coming is None else coming
            compute = torch.cuda.current_stream(self._device)
            compute.wait_event(arrived)
            there.record_stream(compute)
            return there

        return take

    def _send(self, pinned: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._inward):
            there = pinned.to(self._device, non_blocking=True)
            if there.is_floating_point():
                there = there.to(self._dtype)
            return there, self._inward.record_event()

    def leave(self, tensor: torch.Tensor) -> Departure:
        return self._with_room(lambda: self._leave(tensor))

    def _leave(self, tensor: torch.Tensor) -> Departure:
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            wired = torch.empty(tensor.shape, dtype=self._wire, pin_memory=True)
            wired.copy_(tensor.to(self._wire), non_blocking=True)
            tensor.record_stream(self._outward)
            left = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            left.record(self._outward)
        departure = Departure(wired)
        self._waiter.submit(self._land, departure, left)
        return departure

    def settle(self, answer: Callable[[], object]) -> None:
        self._waiter.submit(answer)

    def keep_pace(self) -> None:
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        if self._before is not None:
            self._before.synchronize()
        self._before = done

    @staticmethod
    def _land(departure: Departure, left: torch.cuda.Event) -> None:
        left.synchronize()
        departure.wired = departure.wired.clone()  # evidence of it is kept for long, and pinned memory is scarce
        departure.check()


def returnable(leaving: Departure | None, *, sample: int, stage: int) -> Landed | None:
    """What goes back, if anything can. The weight gradients count in any case, so there is a leaf in any case."""
    try:
        return None if leaving is None else leaving.landed()
    except NotFinite as error:
        log.error("sample %d ends at stage %d: %s", sample, stage, error)  # noqa: TRY400 - for a person
        return None
