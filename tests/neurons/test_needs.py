"""What a stage needs of its machine: it grows with the stage, and what is missing is named with its remedy."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import preset
from model.layout import Layout
from model.split import split
from neurons.machine import Card, DeviceError, Room, device_of, existing, free_memory, held_bytes, room
from neurons.needs import (
    PROCESS,
    Needs,
    fitted,
    least_files,
    miner_needs,
    shortfall,
    smaller_batch,
    stage_on,
    validator_host,
)
from subnet.manifest import Manifest
from tests.neurons.swarm import manifest, tiny, tokens_file

CARD = Card(name="test card", capability=(9, 0), memory=160 * 10**9, free=160 * 10**9)
PLENTY = Room(memory=10**13, disk=10**14, files=10**6)


def needs_of(content: Manifest, stage: int = 0, card: Card | None = None) -> Needs:
    config = content.model.config()
    plan = split(config, content.swarm.stages)[stage]
    return miner_needs(content, plan, Layout.planned(config, plan, content.optimizer.kind), card)


@pytest.fixture
def small(tmp_path: Path) -> Manifest:
    return manifest(tiny(), tokens_file(tmp_path), stages=2)


def large(tmp_path: Path, *, batch: int = 1) -> Manifest:
    content = manifest(preset("8b"), tokens_file(tmp_path), stages=2)
    return content.model_copy(update={"data": content.data.model_copy(update={"batch": batch})})


def test_nothing_is_missing_where_there_is_plenty(small: Manifest) -> None:
    assert shortfall(needs_of(small), PLENTY, out="runs", checkpoints_here=True) is None
    needs = needs_of(small)
    assert needs.host < 2 * 10**9  # what a small stage needs, any machine has


def test_what_is_missing_is_named_in_one_line(small: Manifest) -> None:
    needs = needs_of(small)
    cases: list[tuple[Room, tuple[str, ...]]] = [
        (replace(PLENTY, memory=needs.host - 1), ("host memory", "--ring", "stop other programs")),
        (replace(PLENTY, disk=needs.disk - 1), ("disk", "runs/x", "--out", "--checkpoints")),
    ]
    for found, words in cases:
        line = shortfall(needs, found, out="runs/x", checkpoints_here=True)
        assert line is not None
        assert "\n" not in line
        assert all(word in line for word in words), line
    assert shortfall(needs, replace(PLENTY, disk=needs.evidence), out="", checkpoints_here=False) is None


def test_a_stage_that_its_card_cannot_hold_is_refused(tmp_path: Path) -> None:
    content = large(tmp_path)
    fits = needs_of(content, 0, CARD)
    assert fits.card is not None
    assert fits.card.free >= 0
    assert fits.weights == 0  # it lies on the card
    less = needs_of(content, 0, replace(CARD, free=16 * 10**9))
    line = shortfall(less, PLENTY, out="", checkpoints_here=True)
    assert line is not None
    assert "with full recompute" in line
    assert "16gb are free" in line


def test_a_smaller_batch_is_named_only_if_it_fits(tmp_path: Path) -> None:
    content = large(tmp_path, batch=8)
    plan = split(content.model.config(), 2)[0]
    assert stage_on(content, plan, CARD).free < 0
    assert smaller_batch(content, plan, CARD) == 2
    assert stage_on(large(tmp_path, batch=2), plan, CARD).free >= 0
    assert stage_on(large(tmp_path, batch=4), plan, CARD).free < 0
    assert smaller_batch(content, plan, replace(CARD, free=10**9)) is None


def test_needs_grow_with_the_run(small: Manifest, tmp_path: Path) -> None:
    plans = split(small.model.config(), 2)
    assert validator_host(small, plans) < validator_host(large(tmp_path), split(preset("8b"), 2))
    crowd = small.model_copy(update={"swarm": small.swarm.model_copy(update={"replicas": 30})})
    assert least_files(crowd) > least_files(small)
    assert least_files(small) < 1024  # the usual limit does for few


def test_a_machine_tells_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "evidence" / "miner").mkdir(parents=True)
    (tmp_path / "evidence" / "miner" / "window").write_bytes(bytes(1000))
    (tmp_path / "else").write_bytes(bytes(5000))
    assert held_bytes(tmp_path) == 1000
    assert existing(tmp_path / "not" / "yet") == tmp_path
    found = room(tmp_path / "not" / "yet", torch.device("cpu"))
    assert found.card is None
    assert found.memory > 0
    assert found.disk > 0
    assert found.files > 0
    assert free_memory() < 10**15


def test_as_much_is_held_as_there_is_room_for(tmp_path: Path) -> None:
    content = large(tmp_path)
    plan = split(content.model.config(), 2)[0]
    layout = Layout.planned(content.model.config(), plan, content.optimizer.kind)
    ring = needs_of(content).ring

    def held(free: int, card: Card | None = None) -> tuple[str, int]:
        found = fitted(content, plan, layout, memory=free, card=card)
        assert found.total <= found.card
        return found.recompute.value, found.graphs

    whole = held(10**13)
    assert whole == held(0, replace(CARD, free=10**13))  # on a card host memory does not matter
    assert whole[0] == "keep"
    assert 0 < whole[1] <= content.optimizer.accumulation
    full = PROCESS + ring + needs_of(content).weights
    assert held(full) == ("full", 0)
    some = held(full + 40 * 10**9)
    assert some[0] == "selective"
    assert 0 < some[1] < whole[1]
    assert fitted(content, plan, layout, memory=full - 1, card=None).free < 0


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match=r"--device cuda: torch sees no GPU here.*--device cpu"):
        device_of("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="--device cuda:2: torch sees 2 here, cuda:0 to cuda:1"):
        device_of("cuda:2")


def test_a_device_that_does_not_compute_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(*_: object, **__: object) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040)")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", old)
    with pytest.raises(DeviceError, match=r"cuda:0 does not compute .*too old.*: update the driver") as caught:
        device_of("cuda")
    assert "\n" not in str(caught.value)
    with pytest.raises(DeviceError):  # nobody trains on a CPU unasked beside a card that could be mended
        device_of("auto")
