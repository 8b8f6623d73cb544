"""`orion export` and `orion generate` on a run's folder, through the command line's own main."""

from pathlib import Path

import pytest
import torch

from model.checkpoint import CheckpointInfo, save
from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.corpus import CorpusFiles, standard_library_corpus
from model.split import split
from model.stage import build_stage
from neurons.telemetry import Telemetry, Validated
from neurons.vault import stage_file
from scripts.cli import main
from scripts.data.local import RunData
from scripts.manifests import local_manifest
from subnet.manifest import ModelSection

STAGES = 3
TOY = ModelConfig(
    vocab=300,
    hidden=32,
    layers=6,
    heads=4,
    kv_heads=2,
    ffn=64,
    context=48,
    boundary=BoundaryConfig(form=BoundaryForm.B, width=8),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache: Path) -> CorpusFiles:
    return standard_library_corpus(cache, vocab=300, cap_bytes=60_000, training_bytes=20_000)


@pytest.fixture
def run(tmp_path: Path, corpus: CorpusFiles, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder: all stages at rounds 1 and 2, one stage already at 3."""
    monkeypatch.setenv("ORION_CACHE", str(cache))
    folder = tmp_path / "run"
    folder.mkdir()
    manifest = local_manifest(
        model="nano",
        stages=STAGES,
        replicas=1,
        rounds=3,
        round_blocks=200,
        seed=0,
        authority="5C",
        netuid=9,
        activation_block=1,
        phase_blocks=6,
        data=RunData(folder=corpus.folder, entries=corpus.entries, held_out=0.05),
        overlap=False,
        codec="bf16",
    )
    toy = ModelSection.of(TOY, wire_dtype="bfloat16")
    data = manifest.data.model_copy(update={"sequence": TOY.context})
    loaded = manifest.model_copy(update={"model": toy, "data": data}).write(folder / "manifest.toml")
    for plan in split(TOY, STAGES):
        for number in (1, 2) if plan.index else (1, 2, 3):
            stage = build_stage(TOY, plan, seed=number)
            tensors = dict(stage.state_dict()) | {"outer.momentum": torch.zeros(4)}
            info = CheckpointInfo(manifest_hash=loaded.digest.hex(), round=number, version=number)
            save(folder / stage_file(plan.index, number), tensors, info)
    telemetry = Telemetry.open(folder / "events" / "validator-0.jsonl", now=lambda: 1.0)
    telemetry.emit(Validated(round=1, loss=6.5, tokens=384))
    telemetry.emit(Validated(round=2, loss=5.25, tokens=384))
    telemetry.close()
    return folder


def test_export_then_generate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", "--run", str(run), "--out", str(out), "--shard-gb", "0.0001"]) == 0
    printed = capsys.readouterr().out
    assert "round 2" in printed
    assert "trust_remote_code=True" in printed
    assert "5.25 nats per token, 384 held-out tokens" in (out / "README.md").read_text()
    assert len(list(out.glob("model-*.safetensors"))) > 1

    texts = []
    for flags in ([], [], ["--temperature", "1", "--seed", "1"], ["--temperature", "1", "--seed", "2"]):
        assert main(["generate", "--from", str(out), "def main(", "--tokens", "8", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("def main(") for text in texts)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_generate_refuses_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", "--run", str(run), "--out", str(out), "--round", "1"]) == 0
    capsys.readouterr()
    for status, words, *flags in (
        (2, "--tokens 0 is below 1", "x", "--tokens", "0"),
        (1, "48 new ones leave 0", "x", "--tokens", "48"),
        (1, "the prompt has 0 tokens", "", "--tokens", "4"),
    ):
        assert main(["generate", "--from", str(out), *flags]) == status
        assert words in capsys.readouterr().err
    assert main(["generate", "--from", str(out), "x"]) == 0  # as many as the model sees
    capsys.readouterr()
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main(["generate", "--from", str(out), "x"]) == 1
    assert "does not load" in capsys.readouterr().err
    assert main(["generate", "--from", str(tmp_path), "x"]) == 1
    assert "no config.json" in capsys.readouterr().err


def test_export_refuses_in_one_line(
    run: Path,
    corpus: CorpusFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, tokenizer = tmp_path / "out", corpus.folder / "tokenizer.json"

    def refusal(*flags: str) -> str:
        assert main(["export", "--run", str(run), "--out", str(out), *flags]) == 1
        assert not out.exists()
        printed = capsys.readouterr()
        assert not printed.out
        assert printed.err.count("\n") == 1
        return printed.err

    assert "stage-01/round-00003.safetensors does not exist" in refusal("--round", "3")
    assert "no-such.json cannot be read" in refusal("--tokenizer", str(run / "no-such.json"))
    monkeypatch.setenv("ORION_CACHE", str(tmp_path / "elsewhere"))
    assert "give its tokenizer with --tokenizer FILE" in refusal()
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "given"), "--tokenizer", str(tokenizer)]) == 0
    capsys.readouterr()

    manifest = (run / "manifest.toml").read_text()
    (run / "manifest.toml").write_text(manifest + "\n# a comment makes it another manifest\n")
    assert "belongs to manifest" in refusal("--tokenizer", str(tokenizer))
    (run / "manifest.toml").write_text(manifest)
    for path in run.glob("checkpoints/stage-02/*"):
        path.unlink()
    assert "newest of stage 0: 3, stage 1: 2, stage 2: none" in refusal("--tokenizer", str(tokenizer))
    (run / "manifest.toml").unlink()
    assert "manifest.toml cannot be read" in refusal()
