"""Simulated streams behave as TCP's do, under the real transport."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import ClassVar

import bittensor_core
import numpy as np
import pytest
import torch

from scripts.sim.chain import EPOCH_MS
from scripts.sim.clock import Life, SimLoop
from scripts.sim.repeater import LATER_SECONDS, Repeater
from scripts.sim.wire import SYN_SECONDS, Line, Network
from subnet.identity import SCHEME, Identity
from subnet.transport.admission import Admission, ReplayCache
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import PortTaken, ReplayedRequest, Silent, Unreachable
from subnet.transport.synapse import Received, Synapse, TensorSpec

HERE, THERE = "10.0.0.1", "10.0.0.2"
VALUES = 300_000


class Ask(Synapse):
    route: ClassVar[str] = "ask"
    number: int


class Answer(Synapse):
    number: int


class Net:
    """Two hosts with a node each: `there` serves, `here` asks."""

    def __init__(self, **line: float) -> None:
        self.loop = SimLoop(np.random.default_rng(0))
        self.network = Network(self.loop, np.random.default_rng(1))
        self.hosts = {name: self.network.host(name, Line(jitter=0.01, **line)) for name in (HERE, THERE)}
        self.life = Life("there")
        self.handled = 0

    def now_ns(self) -> int:
        return EPOCH_MS * 1_000_000 + int(self.loop.time() * 1e9)

    async def serve(self) -> None:
        me = Identity.from_uri("//there")
        axon = Axon(
            Admission(me.hotkey, allow=lambda *_: None, now_ns=self.now_ns),
            host=THERE,
            port=9,
            sockets=self.network.sockets(self.hosts[THERE]),
        )

        async def answer(_caller: str, ask: Ask, tensors: Received) -> tuple[Answer, dict[str, torch.Tensor]]:
            self.handled += 1
            assert torch.equal(tensors["x"], torch.arange(VALUES, dtype=torch.float32))
            return Answer(number=ask.number + 1), {}

        axon.serve(Ask, answer, specs={"x": TensorSpec(torch.float32, (VALUES,))})
        await axon.start()

    def play(self, scene: Callable[["Net", Callable[[int], Awaitable[int]]], Awaitable[None]]) -> None:
        SCHEME.set(bittensor_core.CRYPTO_ED25519)

        async def main() -> None:
            await self.loop.begin(self.life, self.serve())
            sockets = self.network.sockets(self.hosts[HERE])
            async with Dendrite(Identity.from_uri("//here"), now_ns=self.now_ns, sockets=sockets) as dendrite:

                async def ask(number: int) -> int:
                    tensors = {"x": torch.arange(VALUES, dtype=torch.float32)}
                    hotkey = Identity.from_uri("//there").hotkey
                    url = f"http://{THERE}:9"
                    reply, _ = await dendrite.call(url, hotkey, Ask(number=number), tensors, reply=Answer, deadline=30)
                    return reply.number

                await scene(self, ask)

        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(main())
        finally:
            asyncio.set_event_loop(None)
            SCHEME.set(bittensor_core.CRYPTO_SR25519)


Asking = Callable[[int], Awaitable[int]]


@pytest.mark.parametrize("loss", [0.0, 0.08])
def test_bodies_arrive_whole_and_loss_costs_time_only(loss: float) -> None:
    async def scene(net: Net, ask: Asking) -> None:
        assert [await ask(n) for n in range(3)] == [1, 2, 3]
        assert (net.network.counts.lost > 0) == (loss > 0)
        assert (net.loop.time() > 1.5) == (loss > 0)

    Net(loss=loss).play(scene)


def test_a_narrow_line_takes_as_long_as_its_bytes() -> None:
    async def scene(net: Net, ask: Asking) -> None:
        await ask(0)
        start = net.loop.time()
        await ask(1)
        seconds, crossings = 4 * VALUES / 1e6, 4 * Line().latency
        assert seconds + crossings < net.loop.time() - start < 1.2 * seconds + crossings

    Net(bandwidth=1e6).play(scene)


def test_a_parted_net_delivers_nothing_and_goes_on_afterwards() -> None:
    async def scene(net: Net, ask: Asking) -> None:
        await ask(0)
        net.network.between([(THERE, HERE)])  # the answer cannot come back
        asked = asyncio.create_task(ask(1))
        await asyncio.sleep(5)
        assert not asked.done()
        assert net.handled == 2
        net.network.between([])
        assert await asked == 2

    Net().play(scene)


def test_nobody_waits_longer_than_a_system_does() -> None:
    async def scene(net: Net, ask: Asking) -> None:
        net.network.between([(HERE, THERE), (THERE, HERE)])
        start = net.loop.time()
        with pytest.raises(Unreachable, match="no answer"):
            await ask(0)
        assert net.loop.time() - start == pytest.approx(SYN_SECONDS, abs=1)

    Net().play(scene)


def test_a_killed_process_resets_its_streams_and_its_port_refuses() -> None:
    async def scene(net: Net, ask: Asking) -> None:
        await ask(0)
        asked = asyncio.create_task(ask(1))
        await asyncio.sleep(0.05)
        net.loop.end(net.life)
        net.network.kill(net.hosts[THERE], net.life)
        with pytest.raises(Unreachable, match="reset"):
            await asked
        with pytest.raises(Unreachable, match="refused"):
            await ask(2)

    Net().play(scene)


def test_a_dark_machine_says_nothing() -> None:
    async def scene(net: Net, ask: Asking) -> None:
        await ask(0)
        net.hosts[THERE].dark = True
        net.loop.end(net.life)
        net.network.kill(net.hosts[THERE], net.life)
        with pytest.raises((Silent, Unreachable), match="no answer"):
            await ask(1)

    Net().play(scene)


def test_a_paused_process_answers_when_it_goes_on() -> None:
    async def scene(net: Net, ask: Asking) -> None:
        await ask(0)
        net.loop.pause(net.life)
        asked = asyncio.create_task(ask(1))
        await asyncio.sleep(6)
        assert not asked.done()
        net.loop.go_on(net.life)
        assert await asked == 2

    Net().play(scene)


def test_a_port_is_taken_once() -> None:
    async def scene(net: Net, ask: Asking) -> None:
        await ask(0)
        with pytest.raises(PortTaken):
            net.network.sockets(net.hosts[THERE]).listening(THERE, 9)

    Net().play(scene)


@pytest.mark.parametrize("remembers", [True, False])
def test_requests_that_somebody_repeats_are_taken_once(remembers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sooner or later, before or after the first; and where nonces are not remembered the repeater sees it."""
    if not remembers:
        monkeypatch.setattr(ReplayCache, "accept", lambda *_, **__: None)

    async def scene(net: Net, ask: Asking) -> None:
        repeater = Repeater(net.network, net.network.host("10.0.0.9", Line()), np.random.default_rng(3))
        net.network.tap, repeater.shares = repeater, {THERE: 1.0}
        answers = await asyncio.gather(*(ask(number) for number in range(20)), return_exceptions=True)
        await asyncio.sleep(2 * LATER_SECONDS[1])
        taken = [request.statuses.count(200) for request in repeater.repeated]
        assert 20 <= len(taken) < repeater.copies
        assert net.handled == sum(taken)
        assert any(request.held for request in repeater.repeated)
        assert all(isinstance(answer, int | ReplayedRequest) for answer in answers)
        if remembers:
            assert set(taken) == {1}
            assert sum(isinstance(answer, int) for answer in answers) > 15, "who came second asks again"
            assert {status for request in repeater.repeated for status in request.statuses} > {200}
        else:
            assert max(taken) > 1

    Net().play(scene)
