"""Some or all nodes of a stand-in swarm in one process.

    python -m scripts.bench.standin SPEC.json --nodes 0,1,2

Prints one line of JSON when all of them listen, waits for one line on standard input, runs, prints one line of JSON
with what it measured (`Measured`), and serves on until standard input ends, so that nobody's last measurement is
disturbed. What SPEC holds says `scripts.bench.standin.spec`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import re
import resource
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from scripts.bench.standin.measured import Counts, Measured, Node
from scripts.bench.standin.node import StandIn, Swarm
from scripts.bench.standin.spec import Kill, Spec, SpecError
from subnet.transport.errors import PortTaken


class Process:
    """The nodes of this process, from `go` on."""

    def __init__(self, spec: Spec, nodes: dict[int, StandIn], *, ended: asyncio.Event) -> None:
        """`ended` is set when standard input has ended."""
        self._spec = spec
        self._nodes = nodes
        self._ended = ended
        self._start = time.time()
        self._first = self._last = self._snapshot()

    async def run(self) -> Measured:
        heads = {number: node for number, node in self._nodes.items() if node.stage == 0}
        steps: dict[int, tuple[float, list[float]]] = {}
        if self._spec.steps is not None:
            runs = [node.steps(self._spec.steps) for node in heads.values()]
            steps = dict(zip(heads, await asyncio.gather(*runs), strict=True))
            if not heads:
                await self._ended.wait()
            self._last = self._snapshot()
        elif self._spec.steady is not None:
            await self._steady(self._spec.steady.warm_up, self._spec.steady.seconds)
        return self._measured(steps)

    async def _steady(self, warm_up: float, seconds: float) -> None:
        for node in self._nodes.values():
            node.drive()
        kills = [asyncio.create_task(self._kill(kill)) for kill in self._spec.kills if kill.node in self._nodes]
        await self._until(warm_up)
        self._first = self._snapshot()
        await self._until(warm_up + seconds)
        self._last = self._snapshot()
        for node in self._nodes.values():
            node.stop()
        for task in kills:
            task.cancel()
        for failure in await asyncio.gather(*kills, return_exceptions=True):
            if isinstance(failure, Exception):
                raise failure

    async def _kill(self, kill: Kill) -> None:
        node = self._nodes[kill.node]
        await self._until(kill.at)
        await node.kill()
        await self._until(kill.at + kill.back_after)
        await node.start()
        node.drive()

    async def _until(self, at: float) -> None:
        await asyncio.sleep(self._start + at - time.time())

    def _snapshot(self) -> tuple[float, float, dict[int, Counts]]:
        """Seconds after the start, processor seconds, and every node's counts."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        counts = {number: node.counted() for number, node in self._nodes.items()}
        return time.time() - self._start, usage.ru_utime + usage.ru_stime, counts

    def _measured(self, steps: dict[int, tuple[float, list[float]]]) -> Measured:
        begin, cpu_before, before = self._first
        end, cpu_after, after = self._last
        found = {}
        for number, node in self._nodes.items():
            done = list(node.done())
            warm_up, step_seconds = steps.get(number, (0.0, []))
            found[number] = Node(
                stage=node.stage,
                lives=node.lives,
                counts=after[number].since(before[number]),
                routes=node.routes(),
                depth=done[-1].depth if done else 0,
                done=[(each.sample, round(each.at - self._start, 4)) for each in done],
                warm_up_seconds=warm_up,
                step_seconds=step_seconds,
            )
        return Measured(window=(begin, end), cpu_seconds=cpu_after - cpu_before, nodes=found)


async def serve(spec: Spec, numbers: list[int]) -> None:
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async with AsyncExitStack() as stack:
        swarm = Swarm.of(spec)
        nodes = {number: StandIn(swarm, number) for number in numbers}
        for node in nodes.values():
            await node.start()
            stack.push_async_callback(node.kill)
        gc.freeze()  # what torch has made while it was imported takes a fifth of a busy node's time to look through
        say({"ready": True})
        if not await commands.readline():
            return
        ended = asyncio.Event()
        ending = asyncio.create_task(commands.read())
        ending.add_done_callback(lambda _: ended.set())
        say(asdict(await Process(spec, nodes, ended=ended).run()))
        await ended.wait()


def say(line: dict[str, object]) -> None:
    print(json.dumps(line, separators=(",", ":")), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.standin", description=__doc__.splitlines()[0])
    parser.add_argument("spec", type=Path, metavar="SPEC", help="JSON file that describes the swarm")
    parser.add_argument("--nodes", metavar="0,1,2", help="numbers of the nodes to run here (default: all)")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    torch.set_num_threads(1)
    try:
        spec = Spec.load(options.spec)
        asyncio.run(serve(spec, _numbers(parser, options.nodes, len(spec.nodes))))
    except (SpecError, PortTaken) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _numbers(parser: argparse.ArgumentParser, text: str | None, count: int) -> list[int]:
    if text is None:
        return list(range(count))
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text, re.ASCII) or max(map(int, text.split(","))) >= count:
        parser.error(f"--nodes {text!r} are no nodes of this swarm: give numbers from 0 to {count - 1}, as in 0,1,2")
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
