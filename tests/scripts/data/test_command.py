"""`orion data` through the command line's own main: what it writes, says and refuses."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from model.corpora.folder import read_manifest
from model.data import Corpus, ShardEntry
from scripts.cli import main
from scripts.data import prepare as command
from scripts.locks import Lock
from subnet.manifest import DataSection
from tests.model.corpora.making import (
    contents,
    documents_in,
    texts,
    tokenizer_json,
    write_jsonl,
    write_parquet,
)

DOCUMENTS = texts(200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    (tmp_path / "src").mkdir()
    write_parquet(tmp_path / "src" / "a.parquet", DOCUMENTS[:90])
    write_parquet(tmp_path / "src" / "b.parquet", [*DOCUMENTS[90:], None])
    return tmp_path


def prepare(folder: Path, *more: str, source: str = "src", out: str = "out") -> int:
    given = ["--from", str(folder / source), "--tokenizer", str(folder / "tokenizer.json"), "--out", str(folder / out)]
    return main(["data", "prepare", *given, "--held-out", "0.2", *more])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_prepare_show_verify_and_section_say_what_a_run_needs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(folder, "--shard-tokens", "5000", "--model", "nano") == 0
    said = capsys.readouterr()
    assert "training: " in said.out
    assert "left out: 1 empty, 0 too long, 0 broken documents" in said.out
    assert "283 ids as uint16, '<|endoftext|>' before every document" in said.out
    assert "sources: 2 parquet file(s), " in said.out
    assert main(["data", "show", str(folder / "out")]) == 0
    assert capsys.readouterr().out == said.out
    assert main(["data", "show", str(folder / "out"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["training"]["documents"] + shown["held_out"]["documents"] == len(DOCUMENTS)
    assert main(["data", "verify", str(folder / "out")]) == 0
    assert "shards are as dataset.json says" in capsys.readouterr().out

    section = ["data", "section", str(folder / "out"), "--sequence", "32", "--batch", "2", "--validation-batches", "3"]
    assert main(section) == 0
    printed = capsys.readouterr().out
    assert main([*section, "--out", str(folder / "section.toml")]) == 0
    assert (folder / "section.toml").read_text() == printed
    data = DataSection.model_validate(tomllib.loads(printed)["data"])
    corpus = Corpus.open(
        folder / "out",
        [ShardEntry(name=shard.name, sha256=shard.sha256, dtype=shard.dtype) for shard in data.shards],
        seed=0,
        batch=data.batch,
        tokens=data.sequence,
        vocab=1_024,
        held_out=data.held_out,
    )
    manifest = read_manifest(folder / "out")
    assert corpus.training_windows == sum((s.tokens - 1) // 32 for s in manifest.shards if not s.held_out)


def test_json_and_plain_output_keep_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(folder, "--json", "--plain") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["recipe"]["column"] == "text"
    assert prepare(folder, "--json") == 0
    assert capsys.readouterr().out == captured.out


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (["--column", "txt"], 1, "source a.parquet: column 'txt' is not there, did you mean 'text'? It has id, text: "),
        (["--column", "id"], 1, "source a.parquet: column 'id' is int64, no text: change --column"),
        (["--end-of-text", "<eos>"], 1, "tokenizer.json has no token '<eos>': did you mean '<|endoftext|>'? "),
        (["--shard-tokens", "10"], 2, "--shard-tokens 10 is outside 1024 to 4294967296: change it"),
        (["--held-out", "0.5"], 2, "--held-out 0.5 is outside 1e-06 to 0.49: change it"),
        (["--longest", "0"], 2, "--longest 0 is outside 1 to 1073741824: change it"),
        (["--model", "nanoo"], 2, "model preset 'nanoo' is unknown: did you mean 'nano'?"),
        (["--separator", "|"], 2, "--separator is for text files, the sources are parquet: leave it out"),
        (["--separator", "|", "--format", "jsonl"], 2, "--separator is for text files, --format is jsonl: leave one"),
        (["--separator", "\\n\\n"], 2, "separator '\\n\\n' is empty or can overlap itself: choose another --separator"),
        (["--format", "jsonl"], 1, "src names no jsonl files (.jsonl, .ndjson): change it"),
        (["--from", "nowhere"], 1, "--from nowhere does not exist: name a file, a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], status: int, words: str
) -> None:
    assert prepare(folder, *more) == status
    line = refused(capsys)
    assert line.startswith("orion data prepare: ")
    assert words in line
    assert not (folder / "out").exists()


def test_usage_errors_of_the_command_line_are_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", "prepare", "--from", "x"])
    assert caught.value.code == 2


def test_a_tokenizer_too_large_for_the_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").write_bytes(tokenizer_json(1_030))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"<{number}>": number for number in range(len(tokenizer["model"]["vocab"]), 1_030)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert prepare(folder, "--model", "nano") == 1
    assert "has 1030 ids, model nano takes 1024: give a smaller tokenizer or another --model" in refused(capsys)


def test_a_bad_line_stops_the_work_which_goes_on_without_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(folder / "a.jsonl", DOCUMENTS)
    path.write_text(path.read_text() + '{"text": \n')
    assert prepare(folder, source="a.jsonl") == 1
    assert "source a.jsonl, line 201: no JSON (Expecting value" in capsys.readouterr().err
    assert not [name for name in contents(folder / "out") if not name.startswith(".") and name != "tokenizer.json"]
    assert prepare(folder, "--skip-broken", source="a.jsonl") == 0
    assert "left out: 0 empty, 0 too long, 1 broken documents" in capsys.readouterr().out


def test_one_process_at_a_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = Lock.take(folder / "out" / ".locks" / "prepare")
    try:
        assert prepare(folder) == 1
        assert f"out is in use: its prepare is process {os.getpid()}; stop that first" in refused(capsys)
    finally:
        lock.release()
    assert prepare(folder) == 0


def test_a_full_disk_says_so_and_that_the_work_can_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert prepare(folder) == 1
    assert "cannot be written (No space left on device): make room or give another folder, the same" in refused(capsys)
    assert prepare(folder) == 0


def test_show_verify_and_section_refuse_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("show", "verify", "section"):
        assert main(["data", action, str(folder)]) == 1
        line = refused(capsys)
        assert line.startswith(f"orion data {action}: {folder} has no dataset.json: give a folder that orion data")
    assert prepare(folder) == 0
    capsys.readouterr()
    for option in ("sequence", "batch", "samples-per-round", "validation-batches"):
        with pytest.raises(SystemExit, match="2"):
            main(["data", "section", str(folder / "out"), f"--{option}", "0"])
        assert f"--{option}: 0 is below 1: raise it" in refused(capsys)
    assert main(["data", "section", str(folder / "out"), "--sequence", "32", "--validation-batches", "900"]) == 1
    assert "900 validation batches are more than the " in refused(capsys)
    assert main(["data", "section", str(folder / "out"), "--sequence", "100000"]) == 1
    assert "are too few, 1 and 2 are needed: prepare more data, or lower --sequence" in refused(capsys)
    assert main(["data", "section", str(folder / "out"), "--sequence", "8", "--out", str(folder / "no" / "x")]) == 1
    assert "cannot be written (No such file or directory): change it" in refused(capsys)


def test_verify_names_every_damaged_shard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(folder, "--shard-tokens", "2000") == 0
    capsys.readouterr()
    for name in ("training-00000.bin", "held-out-00001.bin"):
        path = folder / "out" / name
        path.write_bytes(path.read_bytes()[:-2] + b"\x01\x00")
    assert main(["data", "verify", str(folder / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split("/")[-1].split()[0] for line in captured.err.splitlines()] == [
        "training-00000.bin",
        "held-out-00001.bin",
    ]


def test_a_killed_process_is_followed_by_one_that_ends_with_the_same_bytes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of a real process right after it has kept a window."""
    monkeypatch.setattr(command, "BLOCK_BYTES", 2_000)
    monkeypatch.setattr(command, "WINDOW", 4_000)
    assert prepare(folder, "--shard-tokens", "3000", out="whole") == 0
    program = f"""
import os, signal, sys
from scripts.cli import main
from scripts.data import prepare
from scripts.progress import ProgressView
prepare.BLOCK_BYTES, prepare.WINDOW = 2_000, 4_000
shown = ProgressView.show
def show(view, done, total, note):
    shown(view, done, total, note)
    if int(note.split()[0]) > 50:
        os.kill(os.getpid(), signal.SIGKILL)
ProgressView.show = show
main(["data", "prepare", "--from", {str(folder / "src")!r}, "--tokenizer", {str(folder / "tokenizer.json")!r},
      "--out", {str(folder / "out")!r}, "--held-out", "0.2", "--shard-tokens", "3000"])
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "out" / "dataset.json").exists()
    capsys.readouterr()
    assert prepare(folder, "--shard-tokens", "3000") == 0
    assert "going on after " in capsys.readouterr().err
    assert contents(folder / "out") == contents(folder / "whole")
    found = [documents_in(folder / "out", read_manifest(folder / "out"), held_out=part) for part in (False, True)]
    assert sorted(found[0] + found[1]) == sorted(DOCUMENTS)


def test_ctrl_c_says_how_to_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_arguments: object, **_named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "prepare", stopped)
        assert prepare(folder) == 130
    assert refused(capsys) == "orion data prepare: stopped; the same command goes on from here\n"
