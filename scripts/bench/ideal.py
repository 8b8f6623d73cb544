"""What a step takes at least, by arithmetic: stages that compute and links that carry, without anything else. Pure.

Transfers cost nobody's computing time, links are full duplex and pass one tensor after the other, everything starts
when what it needs is there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """A pipeline of equal stages and links, and one step of it. Seconds."""

    stages: int
    microbatches: int
    forward: float
    backward: float
    transfer: float
    """Of a boundary tensor, and as long of its gradient."""
    latency: float
    """One way."""

    @property
    def round_trip(self) -> float:
        """T_loop: of one microbatch by itself, from the first stage back to it."""
        hop = 2 * (self.latency + self.transfer)
        return self.stages * (self.forward + self.backward) + (self.stages - 1) * hop

    @property
    def interval(self) -> float:
        """Between two microbatches when the pipeline is deep enough: the slower of a stage and a link."""
        return max(self.forward + self.backward, self.transfer)


def deep(line: Line) -> float:
    """Seconds of a step in which as many microbatches are in flight as hide the network: T_loop + (M - 1) intervals."""
    return line.round_trip + (line.microbatches - 1) * line.interval


def one_f_one_b(line: Line) -> float:
    """Seconds of a step of 1F1B: stage s starts with P - s forwards, then one backward and one forward in turn."""
    stages, count = line.stages, line.microbatches
    order = [_order(min(count, stages - stage), count) for stage in range(stages)]
    place, free = [0] * stages, [0.0] * stages
    up, down = [0.0] * stages, [0.0] * stages  # when a stage's link to the next, to the one before, is free again
    ready: dict[tuple[bool, int, int], float] = {(True, 0, index): 0.0 for index in range(count)}
    while any(at < len(order[stage]) for stage, at in enumerate(place)):
        for stage in range(stages):
            for forward, index in order[stage][place[stage] :]:
                came = ready.get((forward, stage, index))
                if came is None:
                    break
                end = max(free[stage], came) + (line.forward if forward else line.backward)
                free[stage] = end
                place[stage] += 1
                if forward and stage == stages - 1:
                    ready[False, stage, index] = end
                elif forward:
                    up[stage] = max(up[stage], end) + line.transfer
                    ready[True, stage + 1, index] = up[stage] + line.latency
                elif stage:
                    down[stage] = max(down[stage], end) + line.transfer
                    ready[False, stage - 1, index] = down[stage] + line.latency
    return free[0]


def _order(depth: int, count: int) -> list[tuple[bool, int]]:
    """(forward or not, microbatch) in the order in which a stage computes them."""
    order = [(True, index) for index in range(depth)]
    for index in range(count):
        order.append((False, index))
        if depth + index < count:
            order.append((True, depth + index))
    return order
