"""The emulated link: shares, turns, latency and loss in virtual time; and what real calls over it take at least."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from bittensor.sp_core import Keypair

from subnet.quantities import QuantityError, parse_bandwidth
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon, Reply
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import Unreachable
from subnet.transport.shaping import (
    REPEATS,
    SEGMENT,
    TURN,
    Link,
    Pipe,
    Shaper,
    parse_latency,
    parse_loss,
)
from subnet.transport.synapse import Synapse, TensorSpec
from tests.virtual import run

MBIT = 1e6


def shaper(link: Link, *, seed: int = 1) -> Shaper:
    return Shaper(link, np.random.default_rng(seed))


def test_texts_become_a_link() -> None:
    assert Link.parse(latency="50ms", bandwidth="200mbit", loss="0.5%") == Link(0.05, 200e6, 200e6, 0.005)
    assert Link.parse(latency="1.5s") == Link(latency_s=1.5)
    assert Link.parse(bandwidth="1gbit") == Link(up_bps=1e9, down_bps=1e9)
    assert parse_latency("250us") == pytest.approx(250e-6)
    assert parse_bandwidth("bandwidth", "56.6kbit") == pytest.approx(56_600)
    assert parse_loss("100%") == 1
    assert Link.parse() is None


@pytest.mark.parametrize(
    ("parse", "text", "form"),
    [
        (parse_latency, "50", "50ms"),
        (parse_latency, "-1ms", "50ms"),
        (parse_latency, "nanms", "50ms"),
        (parse_latency, "50 ms", "50ms"),
        (parse_latency, "\u0665ms", "50ms"),
        (partial(parse_bandwidth, "bandwidth"), "fast", "200mbit"),
        (partial(parse_bandwidth, "bandwidth"), "0mbit", "200mbit"),
        (partial(parse_bandwidth, "bandwidth"), "1e3mbit", "200mbit"),
        (parse_loss, "0.5", "0.5%"),
        (parse_loss, "101%", "0.5%"),
    ],
)
def test_what_is_no_link_is_named_with_the_form(parse: Callable[[str], float], text: str, form: str) -> None:
    with pytest.raises(QuantityError) as caught:
        parse(text)
    assert repr(text) in str(caught.value)
    assert form in str(caught.value)
    assert "\n" not in str(caught.value)


def test_concurrent_transfers_share_the_bandwidth() -> None:
    async def main() -> list[float]:
        loop, link = asyncio.get_running_loop(), shaper(Link(up_bps=80 * MBIT, down_bps=80 * MBIT))

        async def transfer(size: int) -> float:
            await link.up.stream().carry(size)
            return loop.time()

        return await asyncio.gather(*(transfer(10_000_000) for _ in range(4)))

    ends = run(main())
    assert max(ends) == pytest.approx(4.0)  # 4 x 10 MB at 10 MB/s
    assert min(ends) == pytest.approx(4.0, rel=0.02)  # nobody is served before the others


def test_directions_do_not_disturb_each_other() -> None:
    async def main() -> list[float]:
        loop, link = asyncio.get_running_loop(), shaper(Link(up_bps=40 * MBIT, down_bps=80 * MBIT))

        async def transfer(pipe: Pipe) -> float:
            await pipe.stream().carry(10_000_000)
            return loop.time()

        return await asyncio.gather(transfer(link.up), transfer(link.down))

    assert run(main()) == pytest.approx([2.0, 1.0])


def test_a_loss_near_the_end_counts_by_the_flight_of_its_own_direction() -> None:
    """A direction of low bandwidth has few segments under way, and so a shorter end."""
    link = Link(latency_s=0.05, up_bps=800 * MBIT, down_bps=8 * MBIT)
    assert link.flight(link.up_bps) == pytest.approx(100 * link.flight(link.down_bps), rel=0.02)


@pytest.mark.parametrize("large", [1, 5])
def test_a_push_passes_through_payloads(large: int) -> None:
    """It waits for one turn of each stream that is open, not for their ends."""

    async def main() -> tuple[float, float]:
        loop, link = asyncio.get_running_loop(), shaper(Link(up_bps=80 * MBIT, down_bps=80 * MBIT))
        payloads = [asyncio.create_task(link.up.stream().carry(100_000_000)) for _ in range(large)]
        await asyncio.sleep(1.0)
        start = loop.time()
        await link.up.stream().carry(30_000)
        passed = loop.time() - start
        await asyncio.gather(*payloads)
        return passed, loop.time()

    passed, end = run(main())
    turn = TURN / 10e6
    assert 0.003 <= passed <= large * turn + 0.003 + 1e-9
    assert end == pytest.approx(10.0 * large + 0.003)  # nothing of the bandwidth is lost by taking turns


def test_a_line_to_everybody_is_the_same_for_all() -> None:
    line = shaper(Link(up_bps=80 * MBIT))
    assert line.towards("alice") is line.towards("bob") is line


def test_a_line_to_each_neighbour_is_shared_with_nobody_else_and_paced_where_it_begins() -> None:
    async def main() -> dict[str, float]:
        loop, node = asyncio.get_running_loop(), shaper(Link(up_bps=80 * MBIT, down_bps=80 * MBIT, per_neighbour=True))
        ends: dict[str, float] = {}

        async def transfer(neighbour: str, size: int) -> None:
            await node.towards(neighbour).up.stream().carry(size)
            ends[neighbour] = loop.time()

        await node.towards("alice").down.stream().carry(10_000_000)
        assert loop.time() == 0.0
        await asyncio.gather(transfer("alice", 10_000_000), transfer("alice", 10_000_000), transfer("bob", 5_000_000))
        return ends

    assert run(main()) == pytest.approx({"alice": 2.0, "bob": 0.5})


def test_a_cancelled_transfer_lets_the_others_go_on() -> None:
    async def main() -> float:
        loop, link = asyncio.get_running_loop(), shaper(Link(up_bps=80 * MBIT, down_bps=80 * MBIT))
        doomed = asyncio.create_task(link.up.stream().carry(100_000_000))
        other = asyncio.create_task(link.up.stream().carry(10_000_000))
        await asyncio.sleep(0.5)
        doomed.cancel()
        await other
        assert doomed.cancelled()
        return loop.time()

    assert run(main()) == pytest.approx(1.25, rel=0.02)  # half a second shared, then alone


def test_a_stream_that_pauses_has_no_credit() -> None:
    async def main() -> float:
        loop, link = asyncio.get_running_loop(), shaper(Link(up_bps=8 * MBIT, down_bps=8 * MBIT))
        stream = link.up.stream()
        await stream.carry(100_000)
        await asyncio.sleep(10.0)
        start = loop.time()
        await stream.carry(1_000_000)
        return loop.time() - start

    assert run(main()) == pytest.approx(1.0, abs=0.021)


def test_latency_is_paid_once_in_each_direction_whatever_the_size() -> None:
    async def main(size: int) -> float:
        loop, link = asyncio.get_running_loop(), shaper(Link(latency_s=0.05))
        await link.depart(size)
        assert loop.time() == pytest.approx(0.05)
        await link.up.stream().carry(size)
        await link.down.stream().carry(size)
        await link.arrive(size)
        return loop.time()

    assert run(main(100)) == run(main(100_000_000)) == pytest.approx(0.1)


def test_the_mean_cost_of_a_lost_segment_is_what_the_model_says() -> None:
    link, messages = Link(latency_s=0.05, loss=0.1), 20_000
    # After j lost repeats a message is late by RTO·(2^(j+1) - 1).
    expected = sum(0.1 ** (j + 1) * 0.9 * link.timeout_s * (2 ** (j + 1) - 1) for j in range(REPEATS))

    async def main(seed: int) -> float:
        loop, line = asyncio.get_running_loop(), shaper(link, seed=seed)
        for _ in range(messages):
            await line.depart(100)
        return loop.time() / messages - link.latency_s

    assert run(main(1)) == pytest.approx(expected, rel=0.05)
    assert run(main(1)) == run(main(1))
    assert run(main(1)) != run(main(2))


def test_a_large_message_pays_for_repeats_and_for_a_loss_near_its_end() -> None:
    link = Link(latency_s=0.05, up_bps=80 * MBIT, down_bps=80 * MBIT, loss=0.01)
    size = 20_000 * SEGMENT

    async def main() -> float:
        loop, line = asyncio.get_running_loop(), shaper(link)
        for _ in range(50):
            await line.depart(size)
        return loop.time() / 50

    mean = run(main())
    repeats = 0.01 * size * 8 / link.up_bps
    # One of the last flight's 685 segments is nearly always lost; one of the last three rarely.
    assert mean == pytest.approx(0.05 + repeats + link.round_trip_s, rel=0.1)


def test_a_link_that_loses_everything_gives_up() -> None:
    async def main() -> None:
        with pytest.raises(Unreachable, match="--loss"):
            await shaper(Link(loss=1.0)).depart(100)

    run(main())


class Fetch(Synapse):
    route: ClassVar[str] = "fetch"
    count: int


class Store(Synapse):
    route: ClassVar[str] = "store"


class Done(Synapse):
    pass


@pytest.mark.parametrize("shaped", ["caller", "server", "both"])
async def test_real_calls_take_what_the_link_needs(shaped: str) -> None:
    link = Link(latency_s=0.03, up_bps=80 * MBIT, down_bps=80 * MBIT)
    size = 2_000_000
    bob, alice = Keypair.create_from_uri("//Bob"), Keypair.create_from_uri("//Alice")
    axon = Axon(
        Admission(bob.ss58_address, allow=lambda _hotkey, _route: None, now_ns=time.time_ns),
        shaper=None if shaped == "caller" else shaper(link),
    )
    spec = {"x": TensorSpec(torch.uint8, (size,))}

    async def fetch(_caller: str, request: Fetch, _tensors: dict[str, torch.Tensor]) -> Reply:
        return Done(), {"x": torch.arange(request.count, dtype=torch.int32).to(torch.uint8)}

    async def store(_caller: str, _request: Store, _tensors: dict[str, torch.Tensor]) -> Reply:
        return Done(), {}

    axon.serve(Fetch, fetch, specs={})
    axon.serve(Store, store, specs=spec)
    await axon.start()
    loop = asyncio.get_running_loop()
    sender = None if shaped == "server" else shaper(link)
    try:
        async with Dendrite(alice, now_ns=time.time_ns, shaper=sender) as dendrite:

            async def down() -> torch.Tensor:
                _, tensors = await dendrite.call(
                    axon.endpoint,
                    bob.ss58_address,
                    Fetch(count=size),
                    reply=Done,
                    reply_specs=spec,
                    deadline=30,
                )
                return tensors["x"]

            async def up() -> None:
                tensors = {"x": torch.zeros(size, dtype=torch.uint8)}
                await dendrite.call(axon.endpoint, bob.ss58_address, Store(), tensors, reply=Done, deadline=30)

            latency = 0.0 if shaped == "server" else 2 * link.latency_s
            for transfers, volume in (((down,), size), ((up,), size), ((down, down), 2 * size)):
                start = loop.time()
                await asyncio.gather(*(transfer() for transfer in transfers))
                assert loop.time() - start >= latency + volume * 8 / link.up_bps - 0.03
            assert torch.equal(await down(), torch.arange(size, dtype=torch.int32).to(torch.uint8))
            assert dendrite.counters["fetch"].received > 4 * size
            assert dendrite.counters["store"].sent > size
    finally:
        await axon.stop()


async def test_bodies_leave_for_one_neighbour_in_turn_and_for_two_side_by_side() -> None:
    size, link = 1_000_000, Link(latency_s=0.01, up_bps=16 * MBIT, per_neighbour=True)  # half a second each
    alice = Keypair.create_from_uri("//Alice")
    others = [Keypair.create_from_uri(f"//{name}") for name in ("Bob", "Carol")]
    spec = {"x": TensorSpec(torch.uint8, (size,))}
    arrivals: dict[int, list[float]] = {0: [], 1: []}

    async def store(number: int, _caller: str, _request: Store, _tensors: dict[str, torch.Tensor]) -> Reply:
        arrivals[number].append(asyncio.get_running_loop().time())
        return Done(), {}

    axons = [
        Axon(
            Admission(key.ss58_address, allow=lambda _hotkey, _route: None, now_ns=time.time_ns),
            shaper=shaper(link),
        )
        for key in others
    ]
    for number, axon in enumerate(axons):
        axon.serve(Store, partial(store, number), specs=spec)
        await axon.start()
    try:
        async with Dendrite(alice, now_ns=time.time_ns, shaper=shaper(link)) as dendrite:

            async def push(number: int) -> None:
                tensors = {"x": torch.zeros(size, dtype=torch.uint8)}
                endpoint, receiver = axons[number].endpoint, others[number].ss58_address
                await dendrite.call(endpoint, receiver, Store(), tensors, reply=Done, deadline=30)

            await asyncio.gather(push(0), push(0), push(0), push(1))
    finally:
        for axon in axons:
            await axon.stop()
    first, second, third = arrivals[0]
    assert min(second - first, third - second) > 0.4  # side by side the three would all arrive at the end
    assert arrivals[1][0] < third - 0.2


async def test_a_deadline_covers_the_link() -> None:
    alice = Keypair.create_from_uri("//Alice")
    async with Dendrite(alice, now_ns=time.time_ns, shaper=shaper(Link(latency_s=60.0))) as dendrite:
        with pytest.raises(Unreachable, match="deadline"):
            await dendrite.call("http://127.0.0.1:9", "5" + "B" * 47, Fetch(count=1), reply=Done, deadline=0.05)
        assert dendrite.counters["fetch"].failed == 1


def test_no_bandwidth_is_no_wait() -> None:
    async def main() -> float:
        line = shaper(Link())
        await asyncio.gather(line.depart(10**9), line.up.stream().carry(10**9), line.arrive(10**9))
        return asyncio.get_running_loop().time()

    assert run(main()) == 0.0
    assert Link().flight(math.inf) > math.ceil(1e9 / SEGMENT)
