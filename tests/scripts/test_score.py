"""`orion score explain` prints every term of a miner's score, with what it rests on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from neurons.telemetry import AuditBroken, Checked, Convicted, Event, MinerScored, NodeStarted, Telemetry, WeightsSet
from scripts.cli import main
from scripts.score import WIDTH, Explained, RoundExplained, text

MINER = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
OTHER = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
ALICE = "5FLSigC9HGRKVhB9FiEo4Y3koPsNmBmLJbpXg2mp1hXcS59Y"
BOB = "5DAAnrj7VHTznn2AWBemMuyBwZWs6FNFjdyVXUeYum3PTXFy"

SCORED = MinerScored(
    round=4,
    uid=7,
    hotkey=MINER,
    stage=2,
    root="3f2a91c0de" + "0" * 54,
    cut=412,
    claimed=96,
    units=90,
    forward=45,
    backward=45,
    unpaid={"no receipt": 2, "window not acknowledged": 4},
    forward_flops=9.14e9,
    flops=135 * 9.14e9,
    correctness=1.0,
    timeliness=2 / 3,
    missed=["bitmap"],
    scarcity=1.05,
    score=135 * 9.14e9 * 2 / 3 * 1.05,
    mean=9.01e11,
    rounds=3,
    share=0.125,
    burn=0.1,
    weight=0.1125,
)
FORWARD = Checked(
    round=4,
    hotkey=MINER,
    stage=2,
    check="forward",
    grade="measurement",
    passed=True,
    error=0.0021,
    tolerance=0.02,
    version=6,
    sample=812,
    piece=None,
    reason="",
    accuser="",
)
FAILED = replace(
    FORWARD, round=5, passed=False, error=0.31, sample=901, reason="y is not what x and the window's weights give"
)
ADOPTED = replace(
    FORWARD,
    round=5,
    check="step",
    grade="proof",
    passed=False,
    error=-1.0,
    tolerance=0.0,
    sample=None,
    piece=3,
    reason="the piece does not hash to the root",
    accuser=BOB,
)

GOLDEN = """\
uid 7, hotkey 5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty
score = FLOPs of paid units x correctness x timeliness x scarcity
weight = share of all miners' mean scores over the last closed rounds x (1 - burn)

validator-0 5FLSigC9HGRKVhB9FiEo4Y3koPsNmBmLJbpXg2mp1hXcS59Y
  round 4, stage 2
    evidence     root 3f2a91c0de000000 on chain at block 412; 96 units
    paid         90 of 96 units: 45 forward, 45 backward
    not paid     2 no receipt, 4 window not acknowledged
    FLOPs        1.234e+12 = (45 + 2 x 45) x 9.14e+09
    correctness  1; 2 checks, 2 passed; largest error 0.0121, tolerance 0.02 (backward, sample
                 813, window 6)
    timeliness   0.667; missed: bitmap
    scarcity     1.05
    score        8.637e+11
    mean         9.01e+11 over 3 rounds
    share        0.125000
    burn         0.1
    weight       0.112500; 0.112500 on chain at block 431
    event        events/validator-0.jsonl:4
  round 5, stage 2
    evidence     no root on chain at block 512
    paid         0 of 0 units: 0 forward, 0 backward
    FLOPs        0 = (0 + 2 x 0) x 9.14e+09
    correctness  0; 1 checks, 0 passed, 1 of another's report replayed; largest error 0.31,
                 tolerance 0.02 (forward, sample 901, window 6)
    finding      measurement: forward, sample 901, window 6: error 0.31, tolerance 0.02: y is
                 not what x and the window's weights give
    finding      proof: step, window 6, piece 3: the piece does not hash to the root; adopted
                 from 5DAAnrj7VHTznn2AWBemMuyBwZWs6FNFjdyVXUeYum3PTXFy, reproduced
    convicted    in round 5, counts nothing before round 8: 1 proof
    timeliness   0; missed: root, evidence, bitmap
    scarcity     1
    score        0
    mean         0 over 3 rounds
    share        0.000000
    burn         0.1
    weight       0.000000; not set on chain after this round
    event        events/validator-0.jsonl:10
"""


def write(run: Path, name: str, *events: Event) -> None:
    ticks = iter(range(1000))
    log = Telemetry.open(run / "events" / f"{name}.jsonl", now=lambda: float(next(ticks)))
    for event in events:
        log.emit(event)
    log.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    nothing = replace(
        SCORED,
        round=5,
        root="",
        cut=512,
        claimed=0,
        units=0,
        forward=0,
        backward=0,
        unpaid={},
        flops=0.0,
        correctness=0.0,
        timeliness=0.0,
        missed=["root", "evidence", "bitmap"],
        scarcity=1.0,
        score=0.0,
        mean=0.0,
        share=0.0,
        weight=0.0,
    )
    write(
        tmp_path,
        "validator-0",
        NodeStarted(hotkey=ALICE, role="validator", endpoint="http://127.0.0.1:1"),
        FORWARD,
        replace(FORWARD, check="backward", sample=813, error=0.0121),
        SCORED,
        replace(SCORED, uid=8, hotkey=OTHER),
        WeightsSet(round=4, block=431, weights={7: 0.1125, 8: 0.8}),
        FAILED,
        ADOPTED,
        Convicted(round=5, hotkey=MINER, until=8, reason="1 proof"),
        nothing,
    )
    write(tmp_path, "miner-0", NodeStarted(hotkey=MINER, role="miner", endpoint="http://127.0.0.1:2"))
    return tmp_path


def test_every_term_and_its_evidence_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "explain", "--uid", "7", "--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed == GOLDEN
    assert max(map(len, printed.splitlines())) <= WIDTH


def test_one_round_of_every_validator(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        run,
        "validator-1",
        NodeStarted(hotkey=BOB, role="validator", endpoint="http://127.0.0.1:3"),
        replace(SCORED, weight=0.11),
    )
    assert main(["score", "explain", "--uid", "7", "--run", str(run), "--round", "4"]) == 0
    printed = capsys.readouterr().out
    assert f"validator-1 {BOB}" in printed
    assert printed.count("round 4, stage 2") == 2
    assert "round 5" not in printed
    assert "not audited" in printed


def test_a_uid_that_changed_hands_names_both_hotkeys(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, "validator-0", replace(SCORED, round=6, hotkey=OTHER))
    assert main(["score", "explain", "--uid", "7", "--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"uid 7, hotkey {OTHER}")
    assert printed.count(f"    hotkey       {MINER}") == 2
    assert "correctness  1; not audited" in printed.split("round 6")[1]


def test_what_cannot_be_compared_is_no_largest_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, "validator-2", replace(FORWARD, error=-1.0, passed=False), SCORED)
    assert main(["score", "explain", "--uid", "7", "--run", str(run)]) == 0
    printed = capsys.readouterr().out.split("validator-2")[1]
    assert "largest" not in printed
    assert "finding      measurement: forward, sample 812, window 6\n" in printed
    assert str(math.inf) not in printed


def test_an_audit_that_broke_off_is_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = AuditBroken(round=4, hotkey=MINER, reason="IndexError: piece 9")
    write(run, "validator-3", FORWARD, broken, SCORED)
    assert main(["score", "explain", "--uid", "7", "--run", str(run), "--round", "4"]) == 0
    printed = capsys.readouterr().out.split("validator-3")[1]
    assert "1; not audited, the audit broke off: IndexError: piece 9" in printed


@pytest.mark.parametrize(
    ("reported", "words"),
    [
        ([], "1; no failure reported"),
        ([ADOPTED], "1; 1 failure reported"),
        ([ADOPTED], f"the piece does not hash to the root; reported by {BOB}"),
    ],
)
def test_who_only_reads_reports_does_not_say_what_was_audited(reported: list[Checked], words: str) -> None:
    entry = RoundExplained(SCORED, "chain", reported, reported=True)
    printed = " ".join(" ".join(text(7, [Explained("recomputed by", BOB, [entry])])).split())
    assert words in printed
    assert "not audited" not in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--uid", "3"], "has scored uid 3; scored: 7, 8"),
        (["--uid", "7", "--round", "9"], "has scored uid 7 in round 9; scored: 7, 8"),
    ],
)
def test_nothing_to_explain_says_who_was_scored(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["score", "explain", "--run", str(run), *arguments]) == 1
    assert words in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "explain", "--uid", "7", "--run", str(tmp_path)]) == 1
    assert "give the folder of a run" in capsys.readouterr().err


def test_a_log_of_another_version_is_refused_with_its_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "events" / "validator-0.jsonl").open("a") as log:
        log.write('{"t": 1, "v": 1, "kind": "miner_scored", "round": 1}\n')
    assert main(["score", "explain", "--uid", "7", "--run", str(run)]) == 1
    assert "validator-0.jsonl:11: event miner_scored has other fields" in capsys.readouterr().err
