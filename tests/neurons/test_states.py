"""How far a download of a public state is, as the event log has it."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from neurons import states
from neurons.download import Download
from neurons.node import Node
from neurons.states import Claim, take
from neurons.telemetry import Downloading, Event
from tests.virtual import run


def test_a_download_is_told_in_bytes_while_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []

    async def slow(*_arguments: object, progress: Callable[[int, int], None], **_named: object) -> Download | None:
        for here in (2, 4, 10):  # pieces; two were on disk
            progress(here, 10)
            await asyncio.sleep(15.0)
        return None

    monkeypatch.setattr(states, "download", slow)
    manifest = SimpleNamespace(merge=SimpleNamespace(codec="int8"))
    node = SimpleNamespace(
        dendrite=None,
        neighbours=SimpleNamespace(endpoint=None),
        loaded=SimpleNamespace(run_id=b"run", manifest=manifest),
        parameters=[500],
        telemetry=SimpleNamespace(emit=events.append),
    )
    run(take(cast("Node", node), 0, Claim(held=3, weights=b"", holders=())))
    assert events == [
        Downloading(held=3, stage=0, bytes=800, total=4000, rate=0.0),
        Downloading(held=3, stage=0, bytes=1600, total=4000, rate=40.0),
    ]
