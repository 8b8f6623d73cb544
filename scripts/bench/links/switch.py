"""The switch: reads packets from every node's interface, holds them back as the links do, writes them to the others'.

    python -m scripts.bench.links.switch SPEC

`Network` starts it, with the interfaces' files inherited and a `Spec` as JSON. It ends when its standard input does and
then says on standard output, as JSON, what passed.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import select
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import Final

from scripts.bench.links.wire import VNET_HEADER, Wire, destination, wire_bytes

_LARGEST: Final = VNET_HEADER.size + 65_536
_SPARE: Final = 4096
"""Buffers kept for the next packets: memory given back to the system would have to be cleared again."""
_BURST: Final = 32
"""Packets read from one interface before the others have their turn."""
PRIORITY: Final = 1
"""Of real time: links do not slow down because the nodes, or others on this machine, have much to compute."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What is switched."""

    interfaces: dict[str, int]
    """IPv4 address to the file of its interface."""
    bandwidth_bps: float
    latency_s: float
    queue_s: float
    """See `Wire`. There is one of each for every ordered pair of nodes."""


@dataclass(frozen=True, slots=True)
class Passed:
    """What a switch has done."""

    carried: int
    """Bytes on all wires."""
    dropped: int
    """Packets that found a queue full, whole segments counted once."""
    cpu_seconds: float
    late_s: float
    """The most that a packet was written after its time."""


class Switch:
    """The state between two packets."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._files = {socket.inet_aton(address): fd for address, fd in spec.interfaces.items()}
        self._wires: dict[tuple[int, int], Wire] = {}
        self._due: list[tuple[float, int, int, bytearray, int]] = []
        self._spare: list[bytearray] = []
        self._order = itertools.count()
        self._late = 0.0

    def run(self, stop: int) -> Passed:
        """Switch until the file `stop` ends."""
        waiting = [stop, *self._files.values()]
        while True:
            timeout = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            readable, _, _ = select.select(waiting, (), (), timeout)  # unlike poll it counts in microseconds
            for fd in readable:
                if fd == stop:
                    return self._passed()
                self._read(fd)
            self._write()

    def _read(self, source: int) -> None:
        for _ in range(_BURST):
            packet = self._spare.pop() if self._spare else bytearray(_LARGEST)
            try:
                size = os.readv(source, (packet,))
            except BlockingIOError:
                self._spare.append(packet)
                return
            address = destination(packet, size)
            target = None if address is None else self._files.get(address)
            if target is None:
                self._spare.append(packet)
                continue  # what hosts say to everybody: nobody here listens
            wire = self._wires.get((source, target))
            if wire is None:
                wire = self._wires[source, target] = Wire(
                    bandwidth_bps=self._spec.bandwidth_bps,
                    latency_s=self._spec.latency_s,
                    queue_s=self._spec.queue_s,
                )
            arrives = wire.send(wire_bytes(packet, size), time.monotonic())
            if arrives is None:
                self._spare.append(packet)
            else:
                heapq.heappush(self._due, (arrives, next(self._order), target, packet, size))

    def _write(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            due, _, target, packet, size = heapq.heappop(self._due)
            self._late = max(self._late, now - due)
            os.write(target, memoryview(packet)[:size])
            if len(self._spare) < _SPARE:
                self._spare.append(packet)

    def _passed(self) -> Passed:
        wires = self._wires.values()
        return Passed(
            carried=sum(wire.carried for wire in wires),
            dropped=sum(wire.dropped for wire in wires),
            cpu_seconds=round(time.process_time(), 3),
            late_s=round(self._late, 6),
        )


def main() -> int:
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    print(json.dumps(asdict(Switch(Spec(**json.loads(sys.argv[1]))).run(sys.stdin.fileno()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
