"""Tolerances: tails are extrapolated on the safe side, pairs are looked up, nothing is above the manifest's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from model.config import preset
from subnet.manifest import Manifest
from subnet.swarm.record import DEVICE_SHIFT, Flags, Phase, Record
from subnet.trust.decision import GROSS, HONEST_FAILURES
from subnet.trust.finding import Check
from subnet.trust.tolerance import (
    STEPS,
    Calibration,
    CalibrationError,
    Device,
    Pair,
    Table,
    fit_tail,
    parse_table,
    shipped,
    tolerance_between,
    too_wide,
)
from tests.neurons.swarm import manifest, tokens_file

WIDEST = 0.02


def grid(count: int) -> list[float]:
    """Probabilities of not being exceeded, evenly."""
    return [(index + 0.5) / count for index in range(count)]


def pair(miner: Device, auditor: Device, tolerance: float, check: Check = Check.FORWARD) -> Pair:
    names = (miner.name.lower(), auditor.name.lower())
    return Pair(
        devices=names,
        check=check,
        tolerance=tolerance,
        units=1000,
        p50=0.0,
        p99=0.0,
        largest=tolerance / 2,
        shape=0.0,
        fit_q0=0.0,
        fit_gross=0.0,
    )


def calibration(*pairs: Pair, stages: int = 4) -> Calibration:
    return Calibration(
        model="nano",
        stages=stages,
        wire_dtype="bfloat16",
        torch="2",
        processor="x",
        profiles=["a"],
        steps=[0],
        seed=0,
        q0=HONEST_FAILURES,
        gross=GROSS,
        pairs=list(pairs),
    )


@pytest.fixture
def nano(tmp_path: Path) -> Manifest:
    entry = tokens_file(tmp_path)
    loaded = manifest(preset("nano"), entry, stages=4, wire="bfloat16")
    return loaded.model_copy(update={"audit": loaded.audit.model_copy(update={"tolerance": WIDEST})})


# -- tails ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.0, 0.1, 0.3])
def test_a_tail_is_found_again(shape: float) -> None:
    def at(exceeded: float) -> float:
        return -math.log(exceeded) if shape == 0 else (exceeded**-shape - 1) / shape

    tail = fit_tail([at(1 - p) for p in grid(20_000)])
    assert tail.shape == pytest.approx(shape, abs=0.03)
    assert tail.quantile(HONEST_FAILURES) == pytest.approx(at(HONEST_FAILURES), rel=0.05)
    assert tail.quantile(HONEST_FAILURES**2) == pytest.approx(at(HONEST_FAILURES**2), rel=0.3)


def test_a_tail_that_seems_to_end_is_not_believed() -> None:
    tail = fit_tail(grid(5000))
    assert tail.shape == 0.0
    assert tail.quantile(HONEST_FAILURES) > 1.0


def test_quantiles_fall_with_the_share_that_exceeds_them() -> None:
    tail = fit_tail([p**2 for p in grid(1000)])
    found = [tail.quantile(share) for share in (0.5, 0.1, 1e-2, 1e-4, 1e-8)]
    assert found == sorted(found)


@pytest.mark.parametrize("errors", [[], [0.1] * 149, [*grid(1000), math.inf]], ids=["none", "few", "infinite"])
def test_what_gives_no_tail_is_refused(errors: list[float]) -> None:
    with pytest.raises(CalibrationError):
        fit_tail(errors)


def test_devices_that_agree_to_the_bit_still_have_a_tolerance() -> None:
    found = Pair.of(Device.CPU, Device.CPU, Check.FORWARD, [0.0] * 1000, floor=STEPS["bfloat16"])
    assert STEPS["bfloat16"] <= found.tolerance < 1.1 * STEPS["bfloat16"]


def test_a_tolerance_is_the_largest_of_what_could_be_needed() -> None:
    errors = [-0.001 * math.log(1 - p) for p in grid(1000)]
    found = Pair.of(Device.CPU, Device.BF16, Check.BACKWARD, errors, floor=0.0)
    needed = max(2 * max(errors), found.fit_q0, found.fit_gross / GROSS)
    assert needed <= found.tolerance * 1.001 <= needed * 1.11
    assert found.devices == ("cpu", "bf16")


# -- lookup -----------------------------------------------------------------------------------------------------------


def test_a_named_pair_has_its_own_tolerance_and_none_is_above_the_manifests(nano: Manifest) -> None:
    table = Table(
        calibration=[calibration(pair(Device.CPU, Device.CPU, 0.005), pair(Device.BF16, Device.CPU, 0.5))],
    )

    def of(miner: Device, check: Check) -> float:
        return tolerance_between(nano, table, miner=miner, auditor=Device.CPU)(check)

    assert of(Device.CPU, Check.FORWARD) == 0.005
    assert of(Device.BF16, Check.FORWARD) == WIDEST
    assert of(Device.UNNAMED, Check.FORWARD) == WIDEST
    assert of(Device.CPU, Check.BACKWARD) == WIDEST
    assert of(Device.CPU, Check.GRADIENT) == WIDEST
    assert [found.devices for found in too_wide(table.calibration[0], WIDEST)] == [("bf16", "cpu")]


def test_a_table_is_good_for_its_own_model_and_split_only(nano: Manifest) -> None:
    table = Table(calibration=[calibration(pair(Device.CPU, Device.CPU, 0.005), stages=2)])
    assert tolerance_between(nano, table, miner=Device.CPU, auditor=Device.CPU)(Check.FORWARD) == WIDEST


def test_a_newer_entry_takes_an_older_ones_place() -> None:
    table = Table(calibration=[calibration(pair(Device.CPU, Device.CPU, 0.005)), calibration(stages=2)])
    newer = calibration(pair(Device.CPU, Device.CPU, 0.006))
    assert table.having(newer).calibration == [calibration(stages=2), newer]


def test_the_shipped_table_says_where_it_is_from(nano: Manifest) -> None:
    entry = shipped().of(nano)
    assert entry is not None
    assert entry.q0 == HONEST_FAILURES
    assert entry.gross == GROSS
    assert entry.torch
    assert entry.processor
    for found in entry.pairs:
        assert found.tolerance >= max(2 * found.largest, found.fit_q0, found.fit_gross / GROSS) * 0.999
    own = entry.find(Device.CPU, Device.CPU, Check.BACKWARD)
    assert own is not None
    assert own.tolerance <= WIDEST


@pytest.mark.parametrize("text", ["", "calibration = 3", "[[calibration]]\nmodel = 'nano'", "{"], ids=str)
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError):
        parse_table(text)


# -- what a record says -----------------------------------------------------------------------------------------------


def test_a_record_names_a_device_class_beside_its_flags() -> None:
    said = Record(run=b"run-0001", round=0, phase=Phase.CUT, flags=Flags.LEAVING | Device.BF16 << DEVICE_SHIFT)
    back = Record.decode(said.encode())
    assert back is not None
    assert Device.numbered(back.device) is Device.BF16
    assert back.stageless
    assert not replace(back, flags=Device.BF16 << DEVICE_SHIFT).stageless
    assert Device.numbered(15) is Device.UNNAMED
    assert Device.numbered(Record(run=b"run-0001", round=0, phase=Phase.CUT).device) is Device.UNNAMED
