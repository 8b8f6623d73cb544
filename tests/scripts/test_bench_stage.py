"""The stage benchmark: every policy, memory as planned, and figures that hang together; no times."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from model.config import preset
from scripts.bench import stage


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("bench")
    flags = ["--scale", "1/64", "--repeats", "1", "--out", str(out)]
    assert stage.main(flags) == 0
    read: dict[str, object] = json.loads((out / "stage.json").read_text())
    return read


def _policies(result: dict[str, object]) -> dict[str, dict[str, object]]:
    policies = result["policies"]
    assert isinstance(policies, dict)
    return policies


@pytest.mark.parametrize("recompute", ["keep", "selective", "full"])
def test_memory_is_what_the_plan_says(result: dict[str, object], recompute: str) -> None:
    memory = _policies(result)[recompute]["memory"]
    assert isinstance(memory, dict)
    for part in ("weights", "gradients", "optimizer", "total"):
        assert memory[part]["ratio"] == pytest.approx(1, abs=0.1), part
    in_flight = memory["in_flight"]
    assert in_flight["bytes"] == pytest.approx(in_flight["planned"], rel=0.1)
    assert memory["workspace"]["bytes"] > 0


def test_only_a_full_recompute_executes_more_than_is_useful(result: dict[str, object]) -> None:
    for name, policy in _policies(result).items():
        executed, useful = policy["hfu"], policy["mfu"]
        assert isinstance(executed, float)
        assert isinstance(useful, float)
        assert executed / useful == pytest.approx(4 / 3 if name == "full" else 1, rel=0.01)


def test_every_leg_of_the_boundary_is_there(result: dict[str, object]) -> None:
    legs = result["boundary_seconds"]
    assert isinstance(legs, dict)
    assert {"encode", "send_signed_and_receive_verified", "decode"} < legs.keys()
    assert all(taken > 0 for taken in legs.values())
    assert result["boundary_bytes"] == 128 * 2 * 2


def test_without_a_card_the_result_says_so(result: dict[str, object]) -> None:
    assert (result["gpu"] == "not measured yet") == (result["dtype"] == "float32")


@pytest.mark.parametrize("scale", [Fraction(1, 16), Fraction(1, 32), Fraction(1, 2)])
def test_a_scaled_model_is_a_model(scale: Fraction) -> None:
    whole, small = preset("100b"), stage.scaled(preset("100b"), scale)
    assert small.layers == whole.layers
    assert small.hidden == whole.hidden * scale
    assert small.hidden / small.boundary.width == pytest.approx(64, rel=0.2)


def test_a_stage_needs_two_neighbours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        stage.main(["--model", "nano", "--stages", "2", "--out", str(tmp_path)])
    assert "give at least 3" in capsys.readouterr().err
