"""MFU, cost and what is left, from a recorded run whose every figure can be computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.accounting import mfu, training_flops_per_token
from model.config import preset
from neurons.telemetry import Intervention, NodeStarted, RoundStarted
from scripts.cli import main
from scripts.dashboard.errors import DashboardError
from scripts.dashboard.facts import read_facts
from scripts.dashboard.feed import Teller
from scripts.dashboard.meter import Meter
from scripts.dashboard.state import Totals
from scripts.dashboard.yardstick import Yardstick, flops_per_token
from subnet.manifest import ModelSection
from tests.scripts.dashboard.recording import BEGIN, TOKENS, small, write

MINER_SECONDS = 3 * 37.0 + 15.5
"""Three miners until their end, one until it was killed."""
TRAINED = 3 * (30.0 - 3.5) + (15.5 - 3.5)


def with_model(run: Path) -> int:
    """Give the run's manifest nano's model; its FLOPs per token."""
    section = ModelSection.of(preset("nano"), wire_dtype="bfloat16").model_dump(mode="json")
    lines = [f"{name} = {json.dumps(value)}" for name, value in section.items()]
    with (run / "manifest.toml").open("a") as manifest:
        manifest.write("\n".join(["[swarm]", "stages = 2", "[model]", *lines, ""]))
    return training_flops_per_token(preset("nano"), stages=2, tokens=128)


def totals(run: Path, until: float | None = None, **named: object) -> Totals:
    options = {"gpu": None, "price": None, "target": None} | named
    teller = Teller(run, Yardstick.of(**options))
    teller.tell(until)
    return teller.frame().state.totals


def test_mfu_is_of_the_card_that_is_named(recorded: Path) -> None:
    per_token = with_model(recorded)
    facts = read_facts(recorded)
    assert facts is not None
    assert flops_per_token(facts) == per_token
    unnamed = totals(recorded)
    assert (unnamed.mfu, unnamed.card, unnamed.dollars) == (None, "", None)
    rate = 20 * TOKENS / 26.5
    assert unnamed.flops_per_second == pytest.approx(rate * per_token)
    named = totals(recorded, gpu="a100-80gb")
    assert named.miners == pytest.approx(TRAINED / 26.5)
    assert named.mfu == pytest.approx(mfu(rate, per_token, peak_flops=TRAINED / 26.5 * 312e12))


def test_without_a_model_or_a_miners_log_nothing_is_made_up(recorded: Path) -> None:
    assert totals(recorded, gpu="h100").flops_per_second is None
    with_model(recorded)
    (recorded / "events" / "miner-3.jsonl").unlink()
    partial = totals(recorded, gpu="h100", price=2.0)
    assert partial.flops_per_second is not None
    assert (partial.mfu, partial.miner_hours, partial.dollars) == (None, None, None)


def test_dollars_are_for_the_hours_of_processes(recorded: Path) -> None:
    cost = totals(recorded, price=1.25)
    assert cost.miner_hours == pytest.approx(MINER_SECONDS / 3600)
    assert cost.dollars == pytest.approx(1.25 * MINER_SECONDS / 3600)
    assert cost.dollars_per_million == pytest.approx(cost.dollars / (20 * TOKENS) * 1e6)


def test_time_in_which_the_whole_run_was_dead_costs_nothing() -> None:
    meter = Meter()
    started, resumed = NodeStarted("5a", "miner", ""), Intervention("resume", "", 0, "")
    for seconds, event in ((0.0, started), (10.0, RoundStarted(0, 1, 0, [1], "")), (1000.0, resumed), (1005.0, started),
                           (1007.0, RoundStarted(1, 2, 0, [1], ""))):  # fmt: skip
        meter.add("miner-0", _at(seconds, event))
    assert meter.seconds == 12.0


def _at(seconds: float, event: object) -> object:
    from neurons.telemetry import Stamped

    return Stamped(BEGIN + seconds, event)


def test_what_is_left_is_of_the_target_or_of_the_rounds(recorded: Path) -> None:
    until = BEGIN + 13.5
    begun = totals(recorded, until)
    assert (begun.progress, begun.seconds_left) == (0.0, None)  # one round is no rate of rounds
    done = totals(recorded)
    assert (done.target, done.progress, done.seconds_left) == (None, 1.0, 0.0)
    half = totals(recorded, until, target="0.02m")
    assert half.progress == pytest.approx(half.tokens / 20_000)
    assert half.seconds_left == pytest.approx((20_000 - half.tokens) / half.tokens_per_second)
    assert totals(recorded, target="20k").seconds_left == 0
    assert totals(recorded, target="1m").seconds_left is None  # it has ended before


def test_rounds_take_what_they_took(tmp_path: Path) -> None:
    run = tmp_path / "run"
    events = [event for event in small() if event[0] < 25]
    events += [(60.0 * number, "validator-0", RoundStarted(number, 10, None, [2, 2], "a")) for number in (1, 2)]
    write(run, sorted(events, key=lambda event: event[0]))
    manifest = run / "manifest.toml"
    manifest.write_text(manifest.read_text().replace("count = 1", "count = 4"))
    found = totals(run)
    length = (120.0 - 2.0) / 2
    assert found.progress == pytest.approx(2 / 4)
    assert found.seconds_left == pytest.approx(2 * length)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpu", "h10"], "did you mean 'h100'"),
        (["--price", "0"], "--price 0 is not above 0"),
        (["--price", "nan"], "--price nan is not above 0"),
        (["--target", "many"], "--target 'many' is not of the form 1t"),
        (["--target", "0b"], "above 0"),
    ],
)
def test_what_cannot_be_measured_against_is_one_line(
    recorded: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dashboard", "--run", str(recorded), *flags]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


def test_a_manifest_with_another_model_says_so(recorded: Path) -> None:
    with (recorded / "manifest.toml").open("a") as manifest:
        manifest.write("[swarm]\nstages = 2\n[model]\nvocab = 7\n")
    with pytest.raises(DashboardError, match=r"\[model\]"):
        totals(recorded)
