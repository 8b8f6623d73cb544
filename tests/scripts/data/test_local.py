"""A local run takes prepared shards if its model can learn from them, and says why not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model.corpora.folder import read_manifest
from model.data import DataError
from scripts.cli import main
from scripts.data.local import fitting, prepared
from subnet.manifest import load_manifest
from tests.model.corpora.making import made, recipe, texts, write_jsonl


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    made(folder / "shards", [write_jsonl(folder / "a.jsonl", texts(900))], recipe(shard_tokens=20_000))
    return folder / "shards"


def test_shards_that_fit_come_with_their_share(shards: Path) -> None:
    data = prepared(shards, "pico", batch=8, validation_batches=8)
    assert data == fitting(shards, "pico")
    assert data.held_out == read_manifest(shards).held_out_share(64)
    assert [entry.name for entry in data.entries] == [shard.name for shard in read_manifest(shards).shards]


def test_what_does_not_fit_is_named(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(shards)
    large = manifest.model_copy(update={"recipe": manifest.recipe.model_copy(update={"vocab": 1_025})})
    with monkeypatch.context() as patch:
        patch.setattr("scripts.data.local.read_manifest", lambda _folder: large)
        with pytest.raises(DataError, match=r"shards has 1025 ids, model nano takes 1024: choose another --model, or"):
            fitting(shards, "nano")
    with pytest.raises(DataError, match="a batch needs 5000 of each"):
        prepared(shards, "pico", batch=5_000, validation_batches=1)
    with pytest.raises(
        DataError, match=r"has \d+ batches of 8 x 64 tokens held out, 500 are needed: prepare more data"
    ):
        prepared(shards, "pico", batch=8, validation_batches=500)
    wrong = [shard.model_copy(update={"sha256": "0" * 64}) for shard in manifest.shards]
    monkeypatch.setattr(
        "scripts.data.local.read_manifest", lambda _folder: manifest.model_copy(update={"shards": wrong})
    )
    with pytest.raises(DataError, match="has SHA-256"):
        prepared(shards, "pico", batch=8, validation_batches=8)


def test_localnet_refuses_data_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["localnet", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().out
    assert "orion localnet: --data: " in said
    assert "none has no dataset.json: give a folder that orion data prepare has finished" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.alone
@pytest.mark.timeout(170)
def test_a_swarm_trains_on_prepared_shards(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ["--model", "pico", "--stages", "2", "--replicas", "1", "--validators", "1", "--rounds", "1"]
    small += ["--round-seconds", "14"]
    command = [sys.executable, "-m", "scripts.cli", "localnet", "--plain", "--data", str(shards), "--out", str(out)]
    done = subprocess.run([*command, *small], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    data = load_manifest(out / "manifest.toml").manifest.data
    assert [(shard.name, shard.sha256) for shard in data.shards] == [
        (shard.name, shard.sha256) for shard in read_manifest(shards).shards
    ]
    loss = json.loads((out / "summary.json").read_text())["loss"]
    assert loss["validation_last"] < loss["validation_first"]
