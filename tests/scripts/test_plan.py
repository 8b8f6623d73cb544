"""`orion plan`: what it predicts of the published run and of ours, what it prints, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from model.devices import device
from neurons.drive import in_flight
from scripts.cli import main
from scripts.plan.options import deal, fleet
from subnet.commandline import FAILURE, USAGE


def _facts(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    status = main(["plan", "--json", *flags])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    limits = [] if found["audit"] is None else found["audit"]["limits"]
    assert status == (0 if all(limit["fits"] for limit in limits) else 1)
    return found


def test_the_published_run_comes_out_as_it_was_published(capsys: pytest.CaptureFixture[str]) -> None:
    # Facts: 30.8 % on average, 38 % in the best window, which had no churn; 9,000 tokens/s and a microbatch every
    # 2.73 s while training; about 50 % of the hardware's FLOPs. No input is fitted to these.
    plan = _facts(capsys, "--as", "published")
    assert plan["mfu"] == pytest.approx(0.308, abs=0.03)
    assert plan["mfu_training"] == pytest.approx(0.38, abs=0.03)
    assert plan["tokens_per_second_training"] == pytest.approx(9_000, rel=0.05)
    assert plan["microbatch_seconds"] == pytest.approx(2.73, rel=0.05)
    assert plan["hardware_utilisation"] == pytest.approx(0.5, abs=0.05)
    assert plan["depth"] == 16
    assert not plan["merge_overlapped"]
    assert plan["binding"] == "queues"


def test_ours_reaches_45_percent_on_the_same_machines_and_links(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = _facts(capsys), _facts(capsys, "--as", "published")
    assert ours["mfu"] >= 0.45
    same = ("model", "stages", "replicas", "gpu", "up", "down", "rtt", "efficiency", "stay_hours")
    assert all(ours["options"][name] == theirs["options"][name] for name in same)
    assert ours["shares"]["kernels"] == theirs["shares"]["kernels"]
    assert ours["merge_overlapped"]
    assert all(stage["memory"]["free"] >= 0 for stage in ours["stages"])


def test_plan_and_nodes_keep_the_same_depth(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _facts(capsys)
    head = plan["stages"][0]
    # A push takes there and back, and the boundary through what evidence leaves of an uplink (9/10) and merges little.
    push = 0.06 + 8 * 8_192 * 144 * 2 / (0.9 * 856e6)
    unit = head["forward_seconds"] + head["backward_seconds"]
    assert plan["depth"] == plan["depth_of_nodes"] == in_flight(stages=16, unit_seconds=unit, push_seconds=push)


def test_lanes_are_worth_more_than_a_lottery_at_the_nodes_depth(capsys: pytest.CaptureFixture[str]) -> None:
    lanes, lottery = _facts(capsys), _facts(capsys, "--routing", "lottery")
    assert lanes["depth"] == lottery["depth"]
    assert lanes["mfu"] > 1.2 * lottery["mfu"]
    assert (lanes["binding"], lottery["binding"]) == ("recompute", "queues")


def test_muon_takes_time_at_each_step_and_spares_memory(capsys: pytest.CaptureFixture[str]) -> None:
    adamw, muon = _facts(capsys), _facts(capsys, "--optimizer", "muon", "--windows", "0.2")
    # 7 % of a block's FLOPs at 64 microbatches of 8,192 tokens; vocabularies take none; a third less to move and copy.
    assert 0.03 < 1 - muon["shares"]["steps"] / adamw["shares"]["steps"] < 0.07
    tables = 2 * 128_256 * 1_152
    for plan, moments, second in ((adamw, 2, 0), (muon, 1, tables)):
        memory = plan["stages"][8]["memory"]
        assert memory["optimizer"] == pytest.approx(moments * memory["weights"] + second, rel=1e-4)
    crowded = _facts(capsys, "--optimizer", "muon")
    assert [limit["name"] for limit in crowded["audit"]["limits"] if not limit["fits"]] == [
        "evidence on a miner's uplink"
    ], "a matrix of each window that is read"


def test_the_shares_multiply_to_mfu(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ((), ("--as", "published"), ("--gpu", "a100-80gb:40,h100:8"), ("--stages", "20", "--gpu", "h200")):
        plan = _facts(capsys, *flags)
        product = 1.0
        for share in plan["shares"].values():
            assert 0 < share <= 1 + 1e-9
            product *= share
        assert product == pytest.approx(plan["mfu"], rel=1e-6)


def test_json_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _facts(capsys)
    for name in ("parameters", "mfu", "tokens_per_second", "depth", "merge_seconds", "dollars_per_hour", "days"):
        assert plan[name] > 0
    assert plan["dollars_per_hour"] == pytest.approx(48 * 1.25)
    assert plan["dollars_per_million_tokens"] == pytest.approx(60e6 / 3600 / plan["tokens_per_second"])
    assert plan["mfu"] == pytest.approx(
        plan["tokens_per_second"] * sum(stage["flops"] for stage in plan["stages"]) / 8_192 / (48 * 312e12)
    )
    assert len(plan["stages"]) == 16
    for stage in plan["stages"]:
        memory = stage["memory"]
        parts = ("weights", "gradients", "optimizer", "in_flight", "workspace", "reserve")
        assert memory["total"] == sum(memory[part] for part in parts)
        assert memory["card"] - memory["total"] == memory["free"]
        assert 0 < stage["utilisation"] <= 1
    assert plan["audit"]["flops_share"] > 0
    assert [limit["fits"] for limit in plan["audit"]["limits"]] == [True] * 6


def test_many_unequal_stages_are_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--model", "1b", "--stages", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert sum("lines more: --json has all stages" in line for line in lines) == 1


@pytest.mark.parametrize(("flags", "billions"), [((), 102.0), (("--as", "published"), 99.7)])
def test_a_stranger_reads_it_in_forty_lines(
    flags: tuple[str, ...], billions: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"100b: {billions} billion parameters, 16 stages x 3 a100-80gb, as ")
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert any(line.startswith("what binds: ") for line in lines)


def test_what_does_not_fit_is_named_with_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--host-gb", "100"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "does not fit" in line)
    assert line.startswith("host memory, evidence and merges")
    assert "--slot-blocks" in line


def test_a_disk_that_is_too_small_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--disk-gb", "100"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "does not fit" in line)
    assert line.startswith("evidence on a miner's disk")
    assert "--windows" in line


def test_a_mixed_fleet_is_dealt_out_evenly() -> None:
    cards = fleet("a100-80gb:4,h100:2", 6)
    assert [sorted(card.name for card in hand) for hand in deal(cards, 2, 3)] == [
        ["a100-80gb", "a100-80gb", "h100"],
        ["a100-80gb", "a100-80gb", "h100"],
    ]
    assert fleet("h200", 3) == [device("h200")] * 3


def test_a_faster_card_makes_its_stage_faster(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--model", "8b", "--stages", "2", "--replicas", "2", "--rtt", "10ms")
    slow = _facts(capsys, *small)
    mixed = _facts(capsys, *small, "--gpu", "a100-80gb:2,h100:2")
    assert mixed["tokens_per_second"] > 1.3 * slow["tokens_per_second"]
    assert mixed["stages"][0]["gpus"] == ["h100", "a100-80gb"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "1000b"], "model preset '1000b' is unknown: did you mean"),
        (["--gpu", "a100-80"], "GPU 'a100-80' is unknown: did you mean 'a100-80gb'"),
        (["--gpu", "a100-80gb:40,h100:9"], "names 49 cards for 48 places"),
        (["--gpu", "a100-80gb:x"], "is not of the form a100-80gb:40"),
        (["--as", "others"], "--as 'others' is no way of running: choose from orion, published"),
        (["--up", "fast"], "'fast' is not of the form 200mbit"),
        (["--up", "0mbit"], "lets nothing pass"),
        (["--down", "0mbit"], "lets nothing pass"),
        (["--rtt", "soon"], "--rtt 'soon' is not of the form 60ms"),
        (["--tokens", "many"], "--tokens 'many' is not of the form 1t"),
        (["--tokens", "0t"], "--tokens is 0; it must be"),
        (["--price", "0"], "--price is 0; it must be a finite number above 0"),
        (["--stages", "91"], "--stages 91 is 1 more than the 90 layers of 100b: at most --stages 90"),
        (["--stages", "0"], "--stages is 0"),
        (["--replicas", "0"], "--replicas is 0"),
        (["--depth", "0"], "--depth is 0"),
        (["--validators", "0"], "--validators is 0"),
        (["--efficiency", "1.5"], "--efficiency is 1.5"),
        (["--sequence", "9000"], "--sequence 9000 is above the context of 100b: at most 8192"),
        (["--recompute", "some"], "--recompute 'some' is unknown: choose from keep, selective, full"),
        (["--routing", "random"], "--routing 'random' is unknown: choose from lanes, lottery"),
        (["--optimizer", "sgd"], "--optimizer 'sgd' is unknown: choose from adamw, nadam, muon"),
        (["--moments", "fp8"], "--moments 'fp8' is unknown: choose from bf16, fp32"),
    ],
)
def test_bad_numbers_are_named(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(flags, words, capsys) == USAGE


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stages", "8"], "GB more than the 80 GB of a a100-80gb; what would fit: --stages"),
        (["--gpu", "rtx4090"], "GB more than the 24 GB of a rtx4090; what would fit"),
        (["--moments", "fp32"], "what would fit: --moments bf16"),
        (["--recompute", "keep", "--gpu", "a100-80gb"], "with --recompute keep needs"),
        (["--round-minutes", "0.5"], "is over before a microbatch is back"),
        (["--codec", "bf16", "--up", "50mbit"], "it must fit behind the next round's training"),
        (["--codec", "bf16", "--up", "250mbit", "--round-minutes", "12"], "take 10"),
        (["--windows", "5"], "windows are picked in an hour"),
        (["--accumulation", "1000"], "lower the accumulation or lengthen the round"),
    ],
)
def test_what_is_not_possible_says_what_would_be(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(flags, words, capsys) == FAILURE


def refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> int:
    status = main(["plan", *flags])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert len(printed.err.splitlines()) == 1
    return status
