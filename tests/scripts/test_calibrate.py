"""Calibration measures what an audit measures, with profiles that leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.config import BoundaryConfig, BoundaryForm
from model.split import split
from model.stage import Stage, build_stage
from scripts.calibrate import ACCUMULATION, Computed, Profile, Unit, by_class, calibrate, compute, errors_of
from subnet.trust.audit import UnitTensors, replay
from subnet.trust.finding import Check
from subnet.trust.ledger import Direction, Leaf
from subnet.trust.tolerance import Device
from tests.neurons.swarm import tiny

CONFIG = tiny(boundary=BoundaryConfig(form=BoundaryForm.T, width=16, rank=8))
CPU = Profile("cpu", Device.CPU)
BF16 = Profile("bf16", Device.BF16, bf16=True)
PLACES = {"head": 0, "forward": 1, "backward": 1, "tail": 2}


def case(name: str) -> tuple[Stage, Unit]:
    plans = split(CONFIG, 3)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, CONFIG.vocab, (2, CONFIG.context), generator=generator)
    x = torch.randn(2, CONFIG.context, 16, generator=generator).bfloat16().float()
    g = torch.randn(2, CONFIG.context, 16, generator=generator).bfloat16().float()
    stage = build_stage(CONFIG, plans[PLACES[name]], 1)
    units = {
        "head": Unit(0, tokens, None, None, tokens),
        "forward": Unit(1, x, None, None, tokens),
        "backward": Unit(1, x, g, None, tokens),
        "tail": Unit(2, x, None, tokens, tokens),
    }
    return stage, units[name]


@pytest.mark.parametrize("name", PLACES)
def test_errors_are_those_an_audit_finds(name: str) -> None:
    stage, unit = case(name)
    claimed, replayed = compute(stage, unit, BF16), compute(stage, unit, CPU)
    direction = Direction.FORWARD if name in {"head", "forward"} else Direction.BACKWARD
    leaf = Leaf(direction=direction, stage=unit.stage, sample=0, version=0, loss=claimed.loss or 0.0)
    found = replay(
        stage,
        leaf,
        UnitTensors(unit.x, unit.gradient, claimed.output.bfloat16()),
        tokens=unit.tokens,
        targets=unit.targets,
        accumulation=ACCUMULATION,
        tolerance=lambda _: 0.0,
        hotkey="a",
        number=0,
    )
    measured = dict(errors_of(unit, claimed, replayed, carries=CONFIG.carries))
    assert measured == {finding.check: pytest.approx(finding.error, rel=1e-6) for finding in found}
    assert measured[Check.FORWARD if direction is Direction.FORWARD else Check.BACKWARD] > 0


@pytest.mark.parametrize("name", PLACES)
def test_one_profile_agrees_with_itself_and_nearly_with_fp64(name: str) -> None:
    stage, unit = case(name)
    once = compute(stage, unit, CPU)
    assert set(dict(errors_of(unit, once, compute(stage, unit, CPU), carries=CONFIG.carries)).values()) == {0.0}
    exact = compute(stage.double(), unit, Profile("exact", Device.CPU, fp64=True))
    assert max(dict(errors_of(unit, once, exact, carries=CONFIG.carries)).values()) < 0.02


@pytest.mark.parametrize("name", PLACES)
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    """So it is no profile of its own."""
    stage, unit = case(name)
    found = errors_of(
        unit,
        compute(stage, unit, CPU),
        compute(stage, unit, Profile("two", Device.CPU, threads=2)),
        carries=CONFIG.carries,
    )
    assert set(dict(found).values()) == {0.0}


def test_a_profile_leaves_nothing_behind() -> None:
    before = torch.get_num_threads()
    with Profile("two", Device.CPU, threads=2, onednn=False, bf16=True).active():
        assert torch.get_num_threads() == 2
        assert torch.is_autocast_enabled("cpu")
    assert torch.get_num_threads() == before
    assert not torch.is_autocast_enabled("cpu")
    assert torch.backends.mkldnn.enabled


def test_profiles_of_a_class_are_pooled() -> None:
    other = Profile("cpu-2", Device.CPU, threads=2)
    pooled = by_class(
        {(CPU, other, Check.LOSS): [1.0], (other, CPU, Check.LOSS): [2.0], (CPU, BF16, Check.LOSS): [3.0]}
    )
    assert pooled == {(Device.CPU, Device.CPU, Check.LOSS): [1.0, 2.0], (Device.CPU, Device.BF16, Check.LOSS): [3.0]}


def test_computed_values_are_as_the_wire_carries_them() -> None:
    stage, unit = case("forward")
    found: Computed = compute(stage, unit, CPU)
    assert torch.equal(found.output, found.output.bfloat16().float())


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "table.toml"
    broken.write_text("calibration = 3\n")
    assert calibrate(model="nano", stages=4, microbatches=4, seed=0, out=broken) == 1
    assert "no table of tolerances" in capsys.readouterr().err
    assert calibrate(model="nanno", stages=4, microbatches=4, seed=0, out=tmp_path / "new.toml") == 1
    assert "did you mean" in capsys.readouterr().err
