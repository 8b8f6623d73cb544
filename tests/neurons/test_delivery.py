"""What is known of who has an activation may change while they are asked."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from neurons.delivery import Delivery
from neurons.training import TrainingRound
from subnet.messages import Forward
from subnet.trust.ledger import Leaf


async def test_who_signs_meanwhile_does_not_end_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    current = SimpleNamespace(sinks={7: {"a", "b"}})
    asked = []

    async def push(_self: Delivery, _current: TrainingRound, hop: str, *_rest: object) -> None:
        asked.append(hop)
        current.sinks[7].add(f"{hop} again")

    monkeypatch.setattr(Delivery, "_push", push)
    delivery = Delivery.__new__(Delivery)
    forward, leaf = cast("Forward", SimpleNamespace(sample=7)), cast("Leaf", SimpleNamespace())
    await delivery.probe(cast("TrainingRound", current), forward, leaf, torch.zeros(1))
    assert asked == ["a", "b"]
