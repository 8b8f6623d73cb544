"""`--adversary`: who is started as a cheater, what the summary says of it, and whole swarms with one."""

import json
from pathlib import Path

import pytest

import scripts.adversaries
from neurons.telemetry import Convicted, Event, Intervention, MinerScored, NodeStarted, Stamped, WeightsSet
from scripts.adversaries import Adversary, AdversaryOptionError, Casting, lines, outcome
from scripts.tally import Tally
from tests.scripts.test_localnet import start


def casting(*texts: str, validators: int = 2, gathers: bool = False) -> dict[str, list[str]]:
    chosen = list(map(Adversary.parse, texts))
    return Casting.of(chosen, stages=2, replicas=2, validators=validators, gathers=gathers).arguments


def test_options_are_read_back() -> None:
    assert Adversary.parse("sign-flip:3") == Adversary("sign-flip", 3)
    assert [Adversary.parse(text).text for text in ("noise", "noise:12")] == ["noise", "noise:12"]


def test_a_uid_names_a_node_and_without_one_all_miners_are_ready_to_be_it() -> None:
    assert casting() == {}
    assert casting("noise:1", "replay:4") == {"miner-0": ["noise"], "miner-3": ["replay"]}
    assert casting("weight-copier") == {"validator-0": ["weight-copier"]}
    assert casting("weight-copier:6", "noise:2") == {"validator-1": ["weight-copier"], "miner-1": ["noise"]}
    assert casting("noise", "wrong-data") == {f"miner-{index}": ["noise,wrong-data", "--first"] for index in range(4)}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["signflip"], "--adversary: 'signflip' does not exist: did you mean 'sign-flip'"),
        (["wrong-data", "wrong-data", "wrong-data"], "none is left in 2 stages"),
        (["sybil:1"], "leave out the uid"),
        (["noise:0"], "uid 0 is no miner, they have 1 to 4"),
        (["noise:5"], "uid 5 is no miner"),
        (["weight-copier:4"], "uid 4 is no validator, they have 5 to 6"),
        (["noise:1", "replay:1"], "miner-0 is one already"),
        (["noise:1", "replay"], "give all a uid, or none"),
    ],
)
def test_who_cannot_be_started_is_named(texts: list[str], words: str) -> None:
    with pytest.raises(AdversaryOptionError, match=words):
        casting(*texts)


def test_a_holder_that_lies_needs_a_merge_with_holders() -> None:
    assert casting("lying-holder:1") == {"miner-0": ["lying-holder"]}
    with pytest.raises(AdversaryOptionError, match="give --codec int8"):
        casting("lying-holder:1", gathers=True)


def test_a_copier_needs_somebody_to_copy() -> None:
    with pytest.raises(AdversaryOptionError, match="raise --validators"):
        casting("weight-copier", validators=1)


@pytest.mark.parametrize("text", ["", ":3", "noise:x", "noise:1:2", "noise:-1"])
def test_a_form_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(AdversaryOptionError, match="is not of the form"):
        Adversary.parse(text)


def test_an_installation_without_tests_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.adversaries, "RULES", "no_tests_here.adversaries.places")
    with pytest.raises(AdversaryOptionError, match="run it from a checkout"):
        casting("noise")
    assert casting() == {}


def scored(hotkey: str, *, uid: int, stage: int) -> MinerScored:
    return MinerScored(
        round=1,
        uid=uid,
        hotkey=hotkey,
        stage=stage,
        root="",
        cut=0,
        claimed=0,
        units=0,
        forward=0,
        backward=0,
        unpaid={},
        forward_flops=0.0,
        flops=0.0,
        correctness=0.0,
        timeliness=0.0,
        missed=[],
        scarcity=1.0,
        score=0.0,
        mean=0.0,
        rounds=1,
        share=0.0,
        burn=0.0,
        weight=0.0,
    )


def test_the_summary_says_who_cheated_and_what_became_of_it() -> None:
    tally = Tally(1)
    story: list[tuple[str, Event]] = [
        ("miner-1", NodeStarted(hotkey="cheat", role="miner", endpoint="")),
        ("miner-1", Intervention("cheat", "miner-1", 0, "--adversary noise")),
        ("validator-1", Intervention("cheat", "validator-1", 0, "--adversary weight-copier")),
        ("validator-0", WeightsSet(round=0, block=9, weights={2: 0.25, 1: 0.75})),
        ("validator-2", WeightsSet(round=0, block=9, weights={2: 0.35, 1: 0.65})),
        ("validator-1", WeightsSet(round=0, block=9, weights={2: 1.0})),
        ("validator-2", Convicted(round=2, hotkey="cheat", until=5, reason="backward: later")),
        ("validator-0", Convicted(round=1, hotkey="cheat", until=4, reason="backward: off")),
        ("validator-0", scored("cheat", uid=2, stage=1)),
        ("validator-0", WeightsSet(round=1, block=19, weights={1: 1.0})),
    ]
    for second, (name, event) in enumerate(story):
        tally.add(name, Stamped(float(second), event))
    miner, validator = outcome(tally)
    assert miner == {
        "kind": "noise",
        "node": "miner-1",
        "hotkey": "cheat",
        "uid": 2,
        "stage": 1,
        "convicted_round": 1,
        "reason": "backward: off",
        "weights": {0: 0.3, 1: 0.0},
    }
    assert (validator["kind"], validator["uid"], validator["convicted_round"]) == ("weight-copier", None, None)
    assert lines([miner, validator]) == [
        "adversary noise (miner-1, uid 2, stage 1) convicted in round 1, backward: off; weight by round 0.3000, 0.0000",
        "adversary weight-copier (validator-1) not convicted",
    ]


# -- whole swarms --------------------------------------------------------------------------------------------------


def run(out: Path, *flags: str) -> dict[str, object]:
    process = start(out, "--plain", "--validators", "1", *flags)
    output, _ = process.communicate()
    logs = "\n".join(path.read_text()[-2000:] for path in sorted((out / "logs").glob("*.log")))
    assert process.returncode == 0, output + logs
    result = json.loads((out / "summary.json").read_text())
    assert isinstance(result, dict)
    return result


def weights_at_end(result: dict[str, object]) -> dict[int, float]:
    """By uid, what the only validator has on chain."""
    chain = result["chain"]
    assert isinstance(chain, dict)
    (row,) = chain["weights"].values()
    return {int(uid): float(weight) for uid, weight in row.items()}


@pytest.mark.alone
@pytest.mark.timeout(240)
def test_a_swarm_convicts_who_flips_signs_and_pays_the_others(tmp_path: Path) -> None:
    result = run(
        tmp_path / "run",
        *("--stages", "2", "--replicas", "2", "--rounds", "2", "--round-seconds", "16"),
        *("--model", "pico", "--adversary", "sign-flip"),
    )
    adversaries, audits, miners = result["adversaries"], result["audits"], result["miners"]
    assert isinstance(adversaries, list)
    assert isinstance(audits, dict)
    assert isinstance(miners, list)
    (cheat,) = adversaries
    assert cheat["kind"] == "sign-flip"
    assert cheat["convicted_round"] in {0, 1}
    assert "backward increment is off" in cheat["reason"]
    assert {conviction["hotkey"] for conviction in audits["convictions"]} == {cheat["hotkey"]}
    last = max(cheat["weights"], key=int)
    assert cheat["weights"][last] == 0.0
    on_chain = weights_at_end(result)
    assert cheat["uid"] not in on_chain
    assert set(on_chain) == {miner["uid"] for miner in miners if miner["hotkey"] != cheat["hotkey"]}


LONG = ("--model", "pico", "--stages", "2", "--replicas", "2", "--rounds", "6", "--round-seconds", "14")
"""Weights are means of three rounds, and a cheater holds no stage from round 2 on."""
MAIN = {
    "noise": "increment is off",
    "scaled-gradient": "backward increment is off",
    "low-precision": "of 0.02",
    "replay": "of 0.02",
    "no-backward": "backward increment is off",
    "poisoned-loss": "replayed",
    "wrong-data": "forward increment is off",
    "withheld-evidence": "withheld",
}
"""What a conviction's reason must say. Each plays at the last stage that fits it."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The same swarm without a cheater."""
    return run(tmp_path_factory.mktemp("clean") / "run", *LONG)


def pay_by_stage(result: dict[str, object], *, without: str = "") -> dict[int, float]:
    """What a stage's miners earn together, as a share of what all do."""
    miners, on_chain = result["miners"], weights_at_end(result)
    assert isinstance(miners, list)
    earned: dict[int, float] = {}
    for miner in miners:
        if miner["hotkey"] != without:
            earned[miner["stage"]] = earned.get(miner["stage"], 0.0) + on_chain.get(miner["uid"], 0.0)
    return {stage: found / sum(earned.values()) for stage, found in earned.items()}


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", MAIN)
def test_each_main_kind_is_convicted_and_its_neighbours_are_paid_as_without_it(
    tmp_path: Path, clean: dict[str, object], kind: str
) -> None:
    result = run(tmp_path / "run", *LONG, "--adversary", kind)
    adversaries, audits = result["adversaries"], result["audits"]
    assert isinstance(adversaries, list)
    assert isinstance(audits, dict)
    (cheat,) = adversaries
    assert {conviction["hotkey"] for conviction in audits["convictions"]} == {cheat["hotkey"]}
    assert MAIN[kind] in cheat["reason"]
    churn = result["churn"]
    assert isinstance(churn, dict)
    assert churn["benched"] == 1
    late = {int(number): weight for number, weight in cheat["weights"].items() if int(number) >= 1}
    assert late
    assert set(late.values()) == {0.0}, "0 by the second round after the first, which was audited"
    assert cheat["uid"] not in weights_at_end(result)
    expected, found = pay_by_stage(clean), pay_by_stage(result, without=cheat["hotkey"])
    assert found == pytest.approx(expected, rel=0.05)
