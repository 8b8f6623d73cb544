"""Who asks is called back, at the address it asks from and nowhere else, seldom, and only if it is registered."""

import asyncio
import dataclasses
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import ClassVar

import pytest

from neurons import callback
from neurons.callback import CallbackDesk, is_public, plain
from neurons.node import Neighbourhood
from subnet.identity import Identity
from subnet.messages import CallBack, CalledBack
from subnet.swarm.roster import Roster
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import Busy, MalformedRequest, UnknownHotkey
from subnet.transport.knock import Outcome
from subnet.transport.synapse import Received, Synapse
from tests.subnet.swarm.histories import neuron, state

ALICE, BOB, PEER = (Identity.from_uri(f"//{name}") for name in ("Alice", "Bob", "Peer"))
HERE = "127.0.0.1"


def anybody(_hotkey: str, _route: str) -> None:
    return


class Place:
    """A peer that calls back, callers, and their own axons."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    async def ask(self, caller: Identity, message: Synapse) -> CalledBack:
        async with Dendrite(caller, now_ns=time.time_ns) as dendrite:
            reply, _ = await dendrite.call(self._endpoint, PEER.hotkey, message, reply=CalledBack, deadline=20)
            return reply


@asynccontextmanager
async def peer(announced: str = HERE, allow: Callable[[str, str], None] = anybody) -> AsyncIterator[Place]:
    axon = Axon(Admission(PEER.hotkey, allow=allow, now_ns=time.time_ns))
    CallbackDesk(announced).open(axon)
    await axon.start()
    try:
        yield Place(axon.endpoint)
    finally:
        await axon.stop()


@asynccontextmanager
async def listening(caller: Identity) -> AsyncIterator[Axon]:
    axon = Axon(Admission(caller.hotkey, allow=anybody, now_ns=time.time_ns))
    await axon.start()
    try:
        yield axon
    finally:
        await axon.stop()


async def test_a_caller_whose_axon_listens_is_reached() -> None:
    async with peer() as place, listening(ALICE) as own:
        reply = await place.ask(ALICE, CallBack(port=own.port))
    assert (reply.source, reply.outcome) == (HERE, Outcome.ANSWERED)
    assert 0 < reply.seconds < 5


async def test_a_closed_port_and_another_ones_axon_are_told_apart() -> None:
    async with peer() as place, listening(BOB) as others:
        with socket.socket() as free:
            free.bind((HERE, 0))
            closed = await place.ask(ALICE, CallBack(port=free.getsockname()[1]))
        taken = await place.ask(BOB, CallBack(port=others.port))
    async with peer() as place, listening(BOB) as others:
        foreign = await place.ask(ALICE, CallBack(port=others.port))
    assert closed.outcome is Outcome.REFUSED
    assert taken.outcome is Outcome.ANSWERED
    assert foreign.outcome is Outcome.OTHER


class Aimed(Synapse):
    """A request that names a third party's address."""

    route: ClassVar[str] = "callback"
    port: int
    ip: str


async def test_no_request_can_name_a_third_party() -> None:
    async with peer() as place, listening(ALICE) as own:
        with pytest.raises(MalformedRequest, match="ip"):
            await place.ask(ALICE, Aimed(port=own.port, ip="127.0.0.2"))


async def test_only_the_address_of_the_connection_is_called() -> None:
    """Whatever is announced: the desk is told nothing else than where the request came from."""
    loop = asyncio.get_running_loop()
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.2", 0))
        elsewhere.listen()
        elsewhere.setblocking(False)
        port = elsewhere.getsockname()[1]
        reply, _ = await CallbackDesk(HERE).call_back(
            ALICE.hotkey, CallBack(port=port), Received({}, payload=b"", source=HERE)
        )
        with pytest.raises(TimeoutError):  # nobody came to the other address
            async with asyncio.timeout(0.1):
                await loop.sock_accept(elsewhere)
    assert isinstance(reply, CalledBack)
    assert (reply.source, reply.outcome) == (HERE, Outcome.REFUSED)


async def test_a_public_node_does_not_look_around_in_its_own_network() -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as inside:
        inside.bind((HERE, 0))
        inside.listen()
        inside.setblocking(False)
        async with peer(announced="8.8.8.8") as place:
            reply = await place.ask(ALICE, CallBack(port=inside.getsockname()[1]))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await loop.sock_accept(inside)
    assert reply.outcome is None


async def test_a_caller_is_called_seldom_and_others_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    async with peer() as place, listening(ALICE) as own, listening(BOB) as others:
        await place.ask(ALICE, CallBack(port=own.port))
        with pytest.raises(Busy, match="less than 10 s ago") as caught:
            await place.ask(ALICE, CallBack(port=own.port))
        assert caught.value.retry_after is not None
        assert 0 < caught.value.retry_after <= callback.PAUSE
        assert (await place.ask(BOB, CallBack(port=others.port))).outcome is Outcome.ANSWERED
        monkeypatch.setattr(callback, "PAUSE", 0.0)
        assert (await place.ask(ALICE, CallBack(port=own.port))).outcome is Outcome.ANSWERED


async def test_few_are_called_at_a_time() -> None:
    callers = [Identity.from_uri(f"//caller-{number}") for number in range(callback.AT_ONCE + 1)]
    async with AsyncExitStack() as stack:
        mute = stack.enter_context(socket.socket())
        mute.bind((HERE, 0))
        mute.listen()
        port = mute.getsockname()[1]
        place = await stack.enter_async_context(peer())
        asked = [asyncio.create_task(place.ask(caller, CallBack(port=port))) for caller in callers]
        done, going = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        for task in going:
            task.cancel()
        await asyncio.gather(*going, return_exceptions=True)
    (refused,) = done
    assert isinstance(refused.exception(), Busy)


async def test_a_hotkey_that_is_not_registered_is_refused() -> None:
    around = Neighbourhood()
    registered = state([dataclasses.replace(neuron(0), hotkey=ALICE.hotkey)])
    around.relocate(registered)
    async with peer(allow=around.allow) as place, listening(ALICE) as own:
        assert (await place.ask(ALICE, CallBack(port=own.port))).outcome is Outcome.ANSWERED  # before the first roster
        with pytest.raises(Busy, match="roster is not known"):
            await place.ask(BOB, CallBack(port=own.port))
        around.update(Roster.of([[ALICE.hotkey]]), registered)
        with pytest.raises(UnknownHotkey, match="may not use callback"):
            await place.ask(BOB, CallBack(port=own.port))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.1.2.3", False),
        ("172.17.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("127.0.0.1", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),  # noqa: S104
        ("::1", False),
        ("fe80::1", False),
        ("example.com", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_ipv4_that_came_over_ipv6_is_ipv4() -> None:
    assert plain("::ffff:127.0.0.1") == "127.0.0.1"
    assert plain("fe80::1%eth0") == "fe80::1"
    assert not is_public(plain("::ffff:10.0.0.1"))
