"""A report has one form and one hash; anything else is refused quickly and in bounded memory."""

import json
import math
import resource
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subnet.identity import Identity, verify
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.heads import Statement
from subnet.trust.report import (
    BYTES_LIMIT,
    FINDINGS_LIMIT,
    REASON_LIMIT,
    FindingModel,
    MinerReport,
    Report,
    ReportError,
    StatementModel,
    commit,
    report_message,
)

MINER, VALIDATOR = (Identity.from_uri(f"//report-{name}") for name in ("miner", "validator"))
SECRET = bytes(range(32))


def finding(**changes: object) -> Finding:
    fields = {
        "hotkey": MINER.hotkey,
        "round": 3,
        "stage": 1,
        "check": Check.FORWARD,
        "grade": Grade.MEASUREMENT,
        "passed": False,
        "error": 0.5,
        "tolerance": 0.02,
        "version": 7,
        "sample": 12,
        "reason": "off",
    }
    return Finding(**{**fields, **changes})  # type: ignore[arg-type]


def report(*findings: Finding, **changes: object) -> Report:
    fields = {
        "run": "00" * 8,
        "round": 3,
        "validator": VALIDATOR.hotkey,
        "secret": SECRET.hex(),
        "miners": [MinerReport.of(MINER.hotkey, findings, windows=[9, 7], flops=1e9, received=5)],
        "findings": [FindingModel.of(one) for one in findings],
    }
    return Report(**{**fields, **changes})  # type: ignore[arg-type]


FINDINGS = st.builds(
    finding,
    stage=st.integers(0, 2**16 - 1),
    check=st.sampled_from(Check),
    grade=st.sampled_from([Grade.PROOF, Grade.MEASUREMENT]),
    error=st.floats(0, allow_nan=False),
    tolerance=st.floats(0, 1e3),
    version=st.none() | st.integers(0, 2**32 - 1),
    sample=st.none() | st.integers(0, 2**63 - 1),
    piece=st.none() | st.integers(0, 2**40),
    reason=st.text(max_size=REASON_LIMIT),
)


@given(st.lists(FINDINGS, max_size=5))
def test_a_report_comes_back_as_it_was(findings: list[Finding]) -> None:
    made = report(*findings)
    back = Report.parse(made.to_bytes())
    assert back == made
    assert back.to_bytes() == made.to_bytes()
    for model, one in zip(back.findings, findings, strict=True):
        whole = model.finding(3)
        assert (whole.hotkey, whole.check, whole.grade, whole.error) == (one.hotkey, one.check, one.grade, one.error)
        assert not whole.passed


def test_silence_and_passes_are_never_reported() -> None:
    for wrong in (finding(grade=Grade.WITHHELD), finding(passed=True)):
        with pytest.raises(ValueError, match="not reported"):
            FindingModel.of(wrong)
    counted = MinerReport.of(
        MINER.hotkey, [finding(grade=Grade.WITHHELD), finding()], windows=[], flops=0.0, received=0
    )
    assert counted.checks == {Check.FORWARD: 1}


def test_reasons_are_cut_and_printable() -> None:
    model = FindingModel.of(finding(reason="a\nb\x00" + "c" * 500))
    assert model.reason.startswith("a b c")
    assert len(model.reason) == REASON_LIMIT


def test_an_error_that_could_not_be_measured_stays_one() -> None:
    model = FindingModel.of(finding(error=math.inf))
    assert model.error is None
    assert model.finding(3).error == math.inf


def test_a_statement_travels_with_the_finding_that_needs_it() -> None:
    statement = Statement(4, b"d" * 32, b"s" * 64)
    assert StatementModel.of(statement).statement() == statement
    made = report(findings=[FindingModel.of(finding(check=Check.HEADS, grade=Grade.PROOF), statement)])
    model = Report.parse(made.to_bytes()).findings[0]
    assert model.statement is not None
    assert model.statement.statement() == statement


def test_the_secret_opens_its_commitment_and_no_other() -> None:
    assert report().opens(commit(SECRET))
    assert not report().opens(commit(SECRET[::-1]))
    assert not report().opens(bytes(32))


def test_a_signature_holds_for_these_bytes_alone() -> None:
    made = report(finding())
    signature = VALIDATOR.sign(made.message())
    assert verify(VALIDATOR.hotkey, Report.parse(made.to_bytes()).message(), signature)
    other = report(finding(sample=13))
    assert not verify(VALIDATOR.hotkey, other.message(), signature)
    assert report_message(made.to_bytes()) == made.message()


def test_findings_by_whom_they_accuse() -> None:
    other = Identity.from_uri("//report-other").hotkey
    grouped = report(finding(), finding(hotkey=other), finding(sample=13)).by_miner()
    assert {hotkey: len(models) for hotkey, models in grouped.items()} == {MINER.hotkey: 2, other: 1}


VALID = json.loads(report(finding()).to_bytes())


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1},
        {"round": "3"},
        {"version": 2},
        {"secret": "00"},
        {"validator": "x"},
        {"validator": "0" * 48},
        {"extra": 1},
        {"findings": [{}]},
        {"findings": VALID["findings"] * (FINDINGS_LIMIT + 1)},
        {"findings": [{**VALID["findings"][0], "grade": "withheld"}]},
        {"findings": [{**VALID["findings"][0], "check": "mood"}]},
        {"findings": [{**VALID["findings"][0], "reason": "x" * 999}]},
        {"findings": [{**VALID["findings"][0], "error": "nan"}]},
        {"findings": [{**VALID["findings"][0], "error": -0.1}]},
        {"miners": [{**VALID["miners"][0], "windows": list(range(999))}]},
        {"miners": [{**VALID["miners"][0], "flops": 1e400}]},
    ],
)
def test_other_fields_are_refused(change: dict[str, object]) -> None:
    raw = json.dumps({**VALID, **change}, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(ReportError):
        Report.parse(raw)


def test_only_the_canonical_form_is_a_report() -> None:
    raw = report(finding()).to_bytes()
    assert Report.parse(raw)
    for other in (raw + b" ", json.dumps(VALID).encode(), raw.replace(b'"round":3', b'"round":3.0')):
        with pytest.raises(ReportError):
            Report.parse(other)


@given(st.binary(max_size=300))
def test_garbage_is_a_typed_refusal(raw: bytes) -> None:
    with pytest.raises(ReportError):
        Report.parse(raw)


@given(st.data())
def test_a_damaged_report_is_a_typed_refusal_or_another_report(data: st.DataObject) -> None:
    raw = bytearray(report(finding()).to_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    shown = ""
    try:
        parsed = Report.parse(bytes(raw))
    except ReportError as error:
        shown = str(error)
    else:
        assert parsed.to_bytes() == bytes(raw)
    assert len(shown) < 600


@pytest.mark.parametrize(
    "raw",
    [
        b"0" * (BYTES_LIMIT + 1),
        b"[" * BYTES_LIMIT,
        b'{"findings":' * (BYTES_LIMIT // 12),
        b'{"version":1,"findings":[' + b"0," * (BYTES_LIMIT // 2 - 40) + b"0]}",
        b'{"version":1,"miners":[' + b"{}," * (BYTES_LIMIT // 3 - 40) + b"{}]}",
        b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}",
        b'{"round":' + b"9" * (BYTES_LIMIT - 20) + b"}",
        b'{"validator":"' + b"a" * (BYTES_LIMIT - 40) + b'"}',
    ],
)
def test_what_is_built_to_be_expensive_is_cheap_to_refuse(raw: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(ReportError):
        Report.parse(raw)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10, "KiB"
