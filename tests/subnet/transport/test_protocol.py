"""Nodes of different versions of the protocol: who understands whom, in which version, and what the others are told."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import ClassVar

import pytest
import torch

from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import OtherVersion
from subnet.transport.protocol import common, mismatch, read_field, read_target, spoken, target
from subnet.transport.synapse import Received, Synapse, TensorSpec
from tests.subnet.transport.test_axon import ALICE, BOB_KEY

LARGE = {"x": TensorSpec(torch.float32, (512, 1024))}
"""Goes in line with others."""


class Ask(Synapse):
    route: ClassVar[str] = "ask"


class Give(Synapse):
    route: ClassVar[str] = "give"


class Said(Synapse):
    pass


@contextlib.asynccontextmanager
async def serving(version: int, *, asked: list[tuple[int, str]], port: int = 0) -> AsyncIterator[Axon]:
    """An axon of this version, which notes version and route of what it is asked."""

    class Seen(Admission):
        def admit(self, *args, path: str, **kwargs):  # noqa: ANN002, ANN003, ANN202
            asked.append(read_target(path))
            return super().admit(*args, path=path, **kwargs)

    async def answer(_caller: str, _message: Synapse, _received: Received) -> tuple[Said, dict[str, torch.Tensor]]:
        return Said(), {}

    axon = Axon(Seen(BOB_KEY, allow=lambda *_: None, now_ns=time.time_ns), port=port, version=version)
    axon.serve(Ask, answer, specs={})
    axon.serve(Give, answer, specs=LARGE)
    await axon.start()
    try:
        yield axon
    finally:
        await axon.stop()


def dendrite(version: int) -> Dendrite:
    return Dendrite(ALICE, now_ns=time.time_ns, version=version)


async def ask(caller: Dendrite, axon: Axon) -> None:
    await caller.call(axon.endpoint, BOB_KEY, Ask(), reply=Said, deadline=10)


async def give(caller: Dendrite, axon: Axon) -> None:
    x = {"x": torch.zeros(LARGE["x"].shape)}
    await caller.call(axon.endpoint, BOB_KEY, Give(), x, reply=Said, deadline=10)


def test_a_node_speaks_its_own_version_and_the_one_before() -> None:
    assert [list(spoken(mine=mine)) for mine in (1, 2, 3)] == [[1], [1, 2], [2, 3]]


@pytest.mark.parametrize("mine", range(1, 6))
@pytest.mark.parametrize("theirs", [0, *range(1, 6), 2**32 - 1])
def test_two_speak_the_older_ones_version_or_nothing(mine: int, theirs: int) -> None:
    both = set(spoken(mine=mine)) & set(spoken(mine=theirs))
    assert common(theirs, mine=mine) == (min(mine, theirs) if abs(mine - theirs) <= 1 and theirs else None)
    assert common(theirs, mine=mine) in (both or {None})
    assert common(theirs, mine=mine) == common(mine, mine=theirs)


def test_paths_and_headers() -> None:
    assert read_target(target("forward", 12)) == (12, "forward")
    for path in (
        "/forward",
        "/0/forward",
        "/01/forward",
        "/-1/forward",
        "/1/",
        "/1",
        "/1234567890/forward",
        "/\u0661/f",
    ):
        assert read_target(path) is None, path
    assert read_field({"Orion-Protocol": "3"}) == 3
    for text in ("", "0", "-1", "1.0", "x", "9" * 10):
        assert read_field({"Orion-Protocol": text}) is None
    assert read_field({}) is None


def test_a_mismatch_says_who_is_to_upgrade() -> None:
    assert mismatch(1, mine=3) == (
        "the request is in protocol 1, this node speaks 2 and 3",
        "upgrade Orion on the calling node",
    )
    assert mismatch(3, mine=1) == (
        "the request is in protocol 3, this node speaks 1",
        "upgrade Orion on the node that was called",
    )


@pytest.mark.parametrize("send", [ask, give])
@pytest.mark.parametrize(("caller", "called"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2)])
async def test_neighbouring_versions_talk(caller: int, called: int, send) -> None:  # noqa: ANN001
    asked: list[tuple[int, str]] = []
    async with serving(called, asked=asked) as axon, dendrite(caller) as alice:
        for _ in range(2):
            await asyncio.gather(*(send(alice, axon) for _ in range(3)))
    assert {version for version, _ in asked} == {min(caller, called)}
    assert len(asked) == 6


@pytest.mark.parametrize("send", [ask, give])
@pytest.mark.parametrize(
    ("caller", "called", "told"),
    [
        (1, 3, "is in protocol 1, this node speaks 2 and 3; upgrade Orion on the calling node"),
        (3, 1, "is in protocol 3, this node speaks 1; upgrade Orion on the node that was called"),
    ],
)
async def test_others_are_refused(caller: int, called: int, told: str, send) -> None:  # noqa: ANN001
    asked: list[tuple[int, str]] = []
    async with serving(called, asked=asked) as axon, dendrite(caller) as alice:
        with pytest.raises(OtherVersion, match=told) as refused:
            await send(alice, axon)
    assert refused.value.peer == axon.endpoint
    assert not asked


async def test_a_neighbour_that_is_upgraded_is_spoken_to_in_its_new_version() -> None:
    async with dendrite(2) as alice:
        asked: list[tuple[int, str]] = []
        port = 0
        for version in (1, 2, 3, 1):
            async with serving(version, asked=asked, port=port) as axon:
                port = axon.port
                await ask(alice, axon)
                await ask(alice, axon)
    assert [version for version, _ in asked] == [1, 1, 1, 2, 2, 2, 1, 1]
