"""The page and the schema of event logs are what the code writes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from neurons.telemetry import EVENTS, SCHEMA, CheckpointWritten, MinerScored, NodeFinished, Telemetry, read_event
from scripts.cli import main
from scripts.events import page, schema

PAGE = Path(__file__).parents[2] / "docs" / "events.md"


def test_the_page_is_of_these_types() -> None:
    assert PAGE.read_text() == page(), "orion events page > docs/events.md, and SCHEMA one up if it was released"


def test_the_schema_knows_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
    kinds = {kind["properties"]["kind"]["const"]: kind for kind in schema()["oneOf"]}
    assert list(kinds) == list(EVENTS)
    log = io.StringIO()
    Telemetry(log, now=lambda: 1.0).emit(CheckpointWritten(round=1, stage=0, path="here"))
    line = json.loads(log.getvalue())
    assert list(line) == kinds["checkpoint_written"]["required"] == list(kinds["checkpoint_written"]["properties"])
    assert line["v"] == kinds["checkpoint_written"]["properties"]["v"]["const"] == SCHEMA
    scored = kinds["miner_scored"]["properties"]
    assert scored["unpaid"]["additionalProperties"] == {"type": "integer"}
    assert scored["cut"] == {"type": "integer"}
    assert scored["burn"] == {"type": "number", "description": "Share of the weight that nobody earns."}
    assert list(scored)[3:] == list(MinerScored.__dataclass_fields__)


@pytest.mark.parametrize("version", [SCHEMA + 1, 0, None, "1"])
def test_lines_of_another_schema_are_refused_with_both_versions(version: object) -> None:
    log = io.StringIO()
    Telemetry(log, now=lambda: 1.0).emit(NodeFinished(rounds=1))
    line = json.loads(log.getvalue())
    assert read_event(json.dumps(line)).event == NodeFinished(rounds=1)
    with pytest.raises(ValueError, match=f"schema {version!r}, this Orion reads {SCHEMA}: .*another version"):
        read_event(json.dumps(line | {"v": version}))


def test_every_reader_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "validator-0.jsonl").write_text('{"t":1,"v":2,"kind":"node_finished","rounds":1}\n')
    for command in (["monitor", "--plain"], ["dashboard", "--port", "0"], ["score", "explain", "--uid", "1"]):
        assert main([*command, "--run", str(tmp_path)]) == 1
        said = capsys.readouterr().err
        assert "the log has schema 2, this Orion reads 1" in said
        assert said.count("\n") == 1
