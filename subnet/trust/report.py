"""A validator's report of a round: what it looked at, what failed, and the secret that chose it.

Others do not believe a report, they replay what it says failed. What it reveals is checked first: the secret is the one
its author committed to on chain before the round, so the picks follow from it, and a validator that hunts one miner can
be seen to do so. Silence is never reported: nobody else can check it.

The signed form is canonical JSON, so a report has one hash. Parsing is bounded by sizes; nothing in it is executed, and
nothing is allocated that its bytes do not hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.heads import Statement

BYTES_LIMIT = 4 << 20
MINERS_LIMIT = 4096
FINDINGS_LIMIT = 4096
"""Failed findings in one report. More than this many name a miner that is convicted by fewer."""
WINDOWS_LIMIT = 256
REASON_LIMIT = 200
KEYS_LIMIT = 64
"""Names in one JSON object."""
SECRET_BYTES = 32

_Hotkey = Annotated[str, Field(min_length=40, max_length=60, pattern=r"^[1-9A-HJ-NP-Za-km-z]+$")]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Version = Annotated[int, Field(ge=0, lt=2**32)]


class ReportError(Exception):
    """Bytes that are no report, or not the one asked for: one line with the value and the limit."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StatementModel(_Part):
    """A chain digest that a miner signed and its closed ledger contradicts (`subnet.trust.heads.Statement`)."""

    count: Annotated[int, Field(ge=0, lt=2**20)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @classmethod
    def of(cls, statement: Statement) -> Self:
        return cls(count=statement.count, digest=statement.digest.hex(), signature=statement.signature.hex())

    def statement(self) -> Statement:
        return Statement(self.count, bytes.fromhex(self.digest), bytes.fromhex(self.signature))


class FindingModel(_Part):
    """A failed finding as it travels. `error` is null where nothing could be compared."""

    hotkey: _Hotkey
    stage: Annotated[int, Field(ge=0, lt=2**16)]
    check: Annotated[Check, Field(strict=False)]
    grade: Literal["proof", "measurement"]
    error: _Error | None
    tolerance: _Error
    version: _Version | None
    sample: _Count | None
    piece: _Count | None
    reason: Annotated[str, Field(max_length=REASON_LIMIT)]
    statement: StatementModel | None = None
    """Of a `heads` finding: what the miner signed."""

    @classmethod
    def of(cls, finding: Finding, statement: Statement | None = None) -> Self:
        """Raises `ValueError` for one that passed and for what was withheld: neither is reported."""
        if finding.passed or finding.grade is Grade.WITHHELD:
            raise ValueError(f"a finding of grade {finding.grade} that passed={finding.passed} is not reported")
        return cls(
            hotkey=finding.hotkey,
            stage=finding.stage,
            check=finding.check,
            grade="proof" if finding.grade is Grade.PROOF else "measurement",
            error=finding.error if math.isfinite(finding.error) else None,
            tolerance=finding.tolerance,
            version=finding.version,
            sample=finding.sample,
            piece=finding.piece,
            reason="".join(c if c.isprintable() else " " for c in finding.reason)[:REASON_LIMIT],
            statement=None if statement is None else StatementModel.of(statement),
        )

    def finding(self, number: int) -> Finding:
        """As a finding of round `number`. What it claims, not what is believed."""
        return Finding(
            hotkey=self.hotkey,
            round=number,
            stage=self.stage,
            check=self.check,
            grade=Grade(self.grade),
            passed=False,
            error=math.inf if self.error is None else self.error,
            tolerance=self.tolerance,
            version=self.version,
            sample=self.sample,
            piece=self.piece,
            reason=self.reason,
        )


class MinerReport(_Part):
    """What was looked at of one miner."""

    hotkey: _Hotkey
    windows: Annotated[list[_Version], Field(max_length=WINDOWS_LIMIT), FailFast()]
    """Versions of the windows looked into."""
    checks: dict[Annotated[Check, Field(strict=False)], _Count]
    """Findings by check, passed or not."""
    largest: _Error | None
    """The largest measured error; null where nothing was measured, or one could not be."""
    flops: _Error
    bytes: _Count
    """Fetched from it."""

    @classmethod
    def of(
        cls, hotkey: str, findings: Sequence[Finding], *, windows: Sequence[int], flops: float, received: int
    ) -> Self:
        counts: dict[Check, int] = {}
        for finding in findings:
            if finding.grade is not Grade.WITHHELD:
                counts[finding.check] = counts.get(finding.check, 0) + 1
        measured = [finding.error for finding in findings if finding.grade is Grade.MEASUREMENT]
        largest = max(measured, default=math.inf)
        return cls(
            hotkey=hotkey,
            windows=sorted(windows)[:WINDOWS_LIMIT],
            checks=counts,
            largest=largest if math.isfinite(largest) else None,
            flops=flops,
            bytes=received,
        )


class Report(_Part):
    """One validator's report of one round."""

    version: Literal[1] = 1
    run: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    round: Annotated[int, Field(ge=0, lt=2**32)]
    validator: _Hotkey
    secret: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    miners: Annotated[list[MinerReport], Field(max_length=MINERS_LIMIT), FailFast()]
    findings: Annotated[list[FindingModel], Field(max_length=FINDINGS_LIMIT), FailFast()]
    """The failed ones."""

    def to_bytes(self) -> bytes:
        """Canonical JSON: what is hashed and signed."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
        ).encode()

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Self:
        """Bytes back to a report. Raises `ReportError` for what is too long, no report, or not canonical."""
        if len(data) > BYTES_LIMIT:
            raise ReportError(f"a report of {len(data)} bytes, limit {BYTES_LIMIT}: it is not read")
        raw = bytes(data)
        try:
            report = cls.model_validate(json.loads(raw, object_pairs_hook=_small))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"])[:REASON_LIMIT] or "report"
            raise ReportError(f"no report: {where}: {first['msg'][:REASON_LIMIT]}") from None
        except (ValueError, RecursionError) as error:  # text that cannot be UTF-8
            raise ReportError(f"no report: {str(error)[:REASON_LIMIT]}") from None
        if report.to_bytes() != raw:
            raise ReportError("a report that is not in canonical form: its hash would not be its own")
        return report

    def message(self) -> bytes:
        """What its author signs."""
        return report_message(self.to_bytes())

    def by_miner(self) -> Mapping[str, tuple[FindingModel, ...]]:
        """Failed findings by the hotkey they accuse."""
        found: dict[str, list[FindingModel]] = {}
        for finding in self.findings:
            found.setdefault(finding.hotkey, []).append(finding)
        return {hotkey: tuple(findings) for hotkey, findings in found.items()}

    def opens(self, commitment: bytes) -> bool:
        """Whether the secret it reveals is the one committed to."""
        return commit(bytes.fromhex(self.secret)) == commitment


def _small(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of a report has few names, so a wrong one cannot be wrong in a million places."""
    found = dict(pairs)
    if not len(found) == len(pairs) <= KEYS_LIMIT:
        raise ValueError(f"an object with {len(pairs)} names, limit {KEYS_LIMIT}, or with one twice")
    return found


def report_message(data: bytes) -> bytes:
    """What is signed for a report's bytes, which name run, round and author."""
    return b"orion/report/1" + struct.pack("<I", len(data)) + hashlib.sha256(data).digest()


def commit(secret: bytes) -> bytes:
    """What a validator's record carries as its root: the hash of the secret that picks units in the round."""
    return hashlib.sha256(secret).digest()
