"""Asking peers to call back: a tiny axon of our own, and signed requests to a few neurons found on chain."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from neurons import callback
from subnet.identity import Identity
from subnet.messages import CallBack, CalledBack
from subnet.metagraph import ChainState, Neuron
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import PortTaken, StaleRequest, TransportError, Unavailable, UnknownHotkey, UnknownRoute
from subnet.transport.knock import Outcome, knock

AT_A_TIME = 3
MOST = 9
"""Peers asked at all."""
DEADLINE = callback.DEADLINE + 5.0
"""Seconds for a peer's answer, its own call included."""
ROUND_TRIP = 3.0
"""Seconds for a connection to a peer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """Our own."""

    number: int
    problem: str = ""
    """Why it cannot be bound."""
    running: bool = False
    """It is taken by a node of the same hotkey, which answers in our place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Of one peer that was asked."""

    uid: int
    ip: str
    round_trip: float | None = None
    """Seconds; None if it could not be connected to."""
    called: CalledBack | None = None
    problem: str = ""
    """Why it did not call, in its own words or ours."""
    clock: bool = False
    """Because our signature's time is off by its clock."""
    unknown: bool = False
    """Because it does not know the hotkey (yet)."""


def peers(state: ChainState, hotkey: str) -> list[Neuron]:
    """Neurons with an axon, in an order of the asker's own, so that askers spread."""
    others = [neuron for neuron in state.neurons if neuron.endpoint is not None and neuron.hotkey != hotkey]
    return sorted(others, key=lambda neuron: hashlib.sha256(f"{hotkey}/{neuron.hotkey}".encode()).digest())


class Listener:
    """`async with Listener(...)`: our port, bound for as long as it takes; it answers nothing but who it is."""

    def __init__(self, hotkey: str, *, host: str, port: int, now_ns: Callable[[], int]) -> None:
        self._hotkey, self._host, self._wanted = hotkey, host, port
        self._axon = Axon(Admission(hotkey, allow=_nobody, now_ns=now_ns), host=host, port=port)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Port:
        try:
            await self._axon.start()
        except PortTaken as error:
            here = await knock(_inside(self._host), self._wanted, self._hotkey, deadline=ROUND_TRIP)
            return Port(number=self._wanted, problem=str(error), running=here.outcome is Outcome.ANSWERED)
        self._stack.push_async_callback(self._axon.stop)
        return Port(number=self._axon.port)

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()


async def ask(
    identity: Identity, candidates: Sequence[Neuron], port: int, *, now_ns: Callable[[], int]
) -> tuple[Answer, ...]:
    """Ask a few at a time until somebody has called; each once."""
    answers: list[Answer] = []
    async with Dendrite(identity, now_ns=now_ns) as dendrite:
        for start in range(0, min(MOST, len(candidates)), AT_A_TIME):
            asked = candidates[start : start + AT_A_TIME]
            answers += await asyncio.gather(*(_ask_one(dendrite, neuron, port) for neuron in asked))
            if any(answer.called is not None for answer in answers):
                break
    return tuple(answers)


async def look(candidates: Sequence[Neuron]) -> tuple[Answer, ...]:
    """How far a few peers are; nobody is asked for anything."""
    return tuple(await asyncio.gather(*(_look_at(neuron) for neuron in candidates[:AT_A_TIME])))


async def _look_at(neuron: Neuron) -> Answer:
    endpoint = neuron.endpoint
    if endpoint is None:
        raise ValueError(f"uid {neuron.uid} serves no axon")
    there = await knock(endpoint.ip, endpoint.port, neuron.hotkey, deadline=ROUND_TRIP)
    if there.outcome is not Outcome.ANSWERED:
        return Answer(uid=neuron.uid, ip=endpoint.ip, problem=f"its axon does not answer ({there.outcome})")
    return Answer(uid=neuron.uid, ip=endpoint.ip, round_trip=there.connect)


async def _ask_one(dendrite: Dendrite, neuron: Neuron, port: int) -> Answer:
    answer = await _look_at(neuron)
    if neuron.endpoint is None or answer.problem:
        return answer
    try:
        called, _ = await dendrite.call(
            neuron.endpoint.url, neuron.hotkey, CallBack(port=port), reply=CalledBack, deadline=DEADLINE
        )
    except TransportError as error:
        return replace(
            answer,
            problem="its version cannot call back" if isinstance(error, UnknownRoute) else str(error),
            clock=isinstance(error, StaleRequest),
            unknown=isinstance(error, UnknownHotkey),
        )
    return replace(answer, called=called)


def _inside(host: str) -> str:
    """Where this machine itself reaches what listens on `host`."""
    address = ipaddress.ip_address(host)
    return {4: "127.0.0.1", 6: "::1"}[address.version] if address.is_unspecified else host


def _nobody(_hotkey: str, _route: str) -> None:
    raise Unavailable("this is orion doctor, not a node", "ask again when the node runs")
