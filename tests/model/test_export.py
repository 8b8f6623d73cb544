"""An exported folder is the trained model: `transformers`, off line, finds the same loss and text."""

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from model.checkpoint import CheckpointCorruptError, CheckpointMismatchError, CheckpointMissingError, load
from model.config import BoundaryForm
from model.corpus import END_OF_TEXT
from model.export import (
    ExportError,
    ExportTargetError,
    ExportTensorError,
    ExportTokenizerError,
    export,
)
from model.hf.names import TensorNameError, hf_name, orion_name
from model.split import split
from model.stage import Stage
from tests.model.exporting import (
    BOUNDARIES,
    HASH,
    Chain,
    batches,
    config_of,
    json_of,
    source_of,
    trained,
    with_checkpoint,
    write_checkpoint,
)

GOLDEN = Path(__file__).with_name("golden_loss.json")
CASES = [
    (form, stages, wire)
    for form in BOUNDARIES
    for stages in ((1, 3) if form in (BoundaryForm.NONE, BoundaryForm.A) else (3,))
    for wire in ("float32", "bfloat16")
    if (stages > 1 or wire == "float32") and not (form is BoundaryForm.NONE and wire == "bfloat16")
]


@pytest.fixture(autouse=True, scope="module")
def _modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where `transformers` copies a folder's code to before it imports it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        yield


@pytest.fixture(autouse=True)
def _nothing_leaves_the_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    attempts: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        attempts.append(args)
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not attempts


def loaded(folder: Path, *, trust: bool = True, device_map: str | None = None) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust, device_map=device_map, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def hf_loss(model: PreTrainedModel, held: list[torch.Tensor]) -> float:
    """As a validator takes it: the mean over batches of the mean over tokens."""
    with torch.no_grad():
        losses = [F.cross_entropy(model(b[:, :-1]).logits.flatten(0, 1), b[:, 1:].flatten()) for b in held]
    return float(torch.stack(losses).mean())


def own_loss(chain: Chain, held: list[torch.Tensor]) -> float:
    with torch.no_grad():
        return float(torch.stack([chain.loss(batch) for batch in held]).mean())


@pytest.mark.parametrize(("form", "stages", "wire"), CASES)
def test_same_loss_and_same_text(form: BoundaryForm, stages: int, wire: str, tmp_path: Path) -> None:
    chain = trained(form, stages=stages, wire=wire)
    exported = export(source_of(chain, tmp_path / "run", wire=wire), tmp_path / "out")
    plain = form is BoundaryForm.NONE or stages == 1
    assert exported.plain == plain
    assert exported.shards == 1
    assert exported.parameters == sum(p.numel() for stage in chain.stages for p in stage.parameters())
    assert exported.weight_bytes == 4 * exported.parameters

    held = batches(config_of(form), 28)[-4:]
    ours = own_loss(chain, held)
    assert ours < 5.2  # ln 300 = 5.70: it has learned something
    model = loaded(tmp_path / "out", trust=not plain)
    assert isinstance(model, LlamaForCausalLM)
    assert (type(model) is LlamaForCausalLM) == plain
    assert hf_loss(model, held) == pytest.approx(ours, abs=1e-4)
    spread = loaded(tmp_path / "out", trust=not plain, device_map="auto")
    assert hf_loss(spread, held) == pytest.approx(ours, abs=1e-4)
    golden = json.loads(GOLDEN.read_text())
    assert ours == pytest.approx(golden[f"{form}/{stages}/{wire}"], abs=1e-4)

    prompt = torch.tensor([[10, 11, 12, 13]])
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, eos_token_id=None)
    assert text.tolist() == chain.greedy(prompt, 24).tolist()
    anew = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, eos_token_id=None, use_cache=False
    )
    assert text.tolist() == anew.tolist()
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), prompt), dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    left = model.generate(padded, attention_mask=mask, max_new_tokens=8, eos_token_id=None)
    assert left[0, 3:].tolist() == text[0, :12].tolist()


def test_the_wire_counts(tmp_path: Path) -> None:
    """Had the export left the rounding out, this would notice."""
    chain = trained(BoundaryForm.A, stages=3, wire="bfloat16")
    batch = batches(config_of(BoundaryForm.A), 1)[0]
    source = source_of(chain, tmp_path / "run", wire="bfloat16")
    export(source, tmp_path / "rounded")
    export(replace(source, wire_dtype="float32"), tmp_path / "exact")
    with torch.no_grad():
        expected = chain.logits(batch[:, :-1])
        rounded, exact = (loaded(tmp_path / name)(batch[:, :-1]).logits for name in ("rounded", "exact"))
    assert (rounded - expected).abs().median() < (exact - expected).abs().median() / 10


def test_accelerate_cuts_between_layers_only(tmp_path: Path) -> None:
    """With half the memory it needs, `device_map="auto"` leaves the rest on disk, in whole layers."""
    chain = trained(BoundaryForm.A, stages=3, wire="bfloat16")
    exported = export(source_of(chain, tmp_path / "run", wire="bfloat16"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        trust_remote_code=True,
        device_map="auto",
        max_memory={"cpu": exported.weight_bytes // 2},
        offload_folder=tmp_path / "disk",
    )
    places = model.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert {name for name in places if "layers" in name} == {f"model.layers.{layer}" for layer in range(6)}
    held = batches(config_of(BoundaryForm.A), 2)
    assert hf_loss(model, held) == pytest.approx(own_loss(chain, held), abs=1e-4)


def test_without_boundaries_a_rounded_residual_costs_little(tmp_path: Path) -> None:
    chain = trained(BoundaryForm.NONE, stages=3, wire="bfloat16")
    export(source_of(chain, tmp_path / "run", wire="bfloat16"), tmp_path / "out")
    held = batches(config_of(BoundaryForm.NONE), 4)
    assert hf_loss(loaded(tmp_path / "out", trust=False), held) == pytest.approx(own_loss(chain, held), abs=1e-3)
    assert "bfloat16" in (tmp_path / "out" / "README.md").read_text()


def test_shards_and_index(tmp_path: Path) -> None:
    chain = trained(BoundaryForm.A, stages=3, wire="bfloat16", steps=1)
    source = source_of(chain, tmp_path / "run", wire="bfloat16")
    exported = export(source, tmp_path / "out", shard_bytes=50_000)
    index = json_of(tmp_path / "out" / "model.safetensors.index.json")
    where = index["weight_map"]
    assert isinstance(where, dict)
    assert index["metadata"] == {"total_size": exported.weight_bytes}
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{exported.shards:05d}.safetensors" for number in range(1, exported.shards + 1)
    ]
    assert len(files) > 3
    for file in files:
        with safe_open(file, framework="pt") as shard:
            assert set(shard.keys()) == {name for name, at in where.items() if at == file.name}
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]  # noqa: SIM118 (not a mapping)
        assert sum(sizes) <= 50_000 or len(sizes) == 1
    batch = batches(config_of(BoundaryForm.A), 1)
    assert hf_loss(loaded(tmp_path / "out"), batch) == pytest.approx(own_loss(chain, batch), abs=1e-4)


def test_tokenizer_and_card(tmp_path: Path) -> None:
    chain = trained(BoundaryForm.A, stages=3, wire="bfloat16", steps=1)
    export(source_of(chain, tmp_path / "run", wire="bfloat16"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = tokenizer("def main(").input_ids
    assert tokenizer.decode(ids) == "def main("
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.model_max_length == 48
    config = json_of(tmp_path / "out" / "config.json")
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["boundary_layers"] == [plan.first_layer for plan in split(config_of(BoundaryForm.A), 3)[1:]]
    card = (tmp_path / "out" / "README.md").read_text()
    assert HASH in card
    assert "| validation loss | as good as it gets |" in card


@given(st.sampled_from(list(BOUNDARIES)), st.integers(1, 6))
def test_names_have_an_inverse(form: BoundaryForm, stages: int) -> None:
    config = config_of(form)
    with torch.device("meta"):
        names = [name for plan in split(config, stages) for name, _ in Stage(config, plan).named_parameters()]
    theirs = [hf_name(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [orion_name(name) for name in theirs] == names


@pytest.mark.parametrize(
    "name", ["", "outer.momentum", "layers.01.ffn.up.weight", "boundaries.0.sender.encoder.weight"]
)
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(TensorNameError, match="is no parameter of"):
        hf_name(name)
    with pytest.raises(TensorNameError, match="is no parameter of"):
        orion_name(name)
    with pytest.raises(TensorNameError, match="is no parameter of"):
        orion_name("model.layers.0.receiver.decoder.weight")


def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    chain = trained(BoundaryForm.A, stages=3, wire="bfloat16", steps=1)
    run, out = tmp_path / "run", tmp_path / "place" / "out"
    source = source_of(chain, run, wire="bfloat16")
    good, _ = load(source.checkpoints[1], manifest_hash=HASH)
    norm, matrix = "layers.3.ffn_norm.weight", "layers.3.ffn.up.weight"

    whole = source.checkpoints[1].read_bytes()
    flipped, cut = run / "flipped.safetensors", run / "cut.safetensors"
    flipped.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    cut.write_bytes(whole[: len(whole) // 2])
    lacking = write_checkpoint(run / "1", {name: value for name, value in good.items() if name != norm})
    surplus = write_checkpoint(run / "2", good | {"layers.9.ffn_norm.weight": torch.ones(32)})
    shaped = write_checkpoint(run / "3", good | {matrix: good[matrix].T})
    typed = write_checkpoint(run / "4", good | {matrix: good[matrix].to(torch.bfloat16)})
    foreign = write_checkpoint(run / "5", good, manifest_hash="cd" * 32)
    older = write_checkpoint(run / "6", good, number=2)
    for path, kind, words in (
        (flipped, CheckpointCorruptError, "flipped.safetensors has content"),
        (cut, CheckpointCorruptError, r"cut\.safetensors has \d+ bytes of"),
        (run / "none", CheckpointMissingError, "none does not exist"),
        (lacking, ExportTensorError, f"lacks '{norm}'"),
        (surplus, ExportTensorError, "holds 'layers.9.ffn_norm.weight'"),
        (shaped, ExportTensorError, rf"'{matrix}' as torch.float32 \(32, 64\).*torch.float32 \(64, 32\)"),
        (typed, ExportTensorError, f"'{matrix}' as torch.bfloat16"),
        (source.checkpoints[0], ExportTensorError, "is it of stage 1"),
        (foreign, CheckpointMismatchError, "belongs to manifest cdcd"),
        (older, ExportError, "is of round 2, not 3"),
    ):
        with pytest.raises(kind, match=words) as raised:
            export(with_checkpoint(source, 1, path), out)
        assert "\n" not in str(raised.value)
        assert not list(out.parent.iterdir())
    with pytest.raises(CheckpointMismatchError, match="this run is efef"):
        export(replace(source, manifest_hash="ef" * 32), out)

    big, empty = run / "big.json", run / "empty.json"
    big.write_text(json.dumps({"model": {"vocab": {"a": 300}}, "added_tokens": []}))
    empty.write_text("{}")
    for tokenizer, words in ((big, "has id 300"), (empty, "is no tokenizer.json"), (run / "no", "cannot be read")):
        with pytest.raises(ExportTokenizerError, match=words):
            export(replace(source, tokenizer=tokenizer), out)
    with pytest.raises(ExportError, match="shard size is 0"):
        export(source, out, shard_bytes=0)
    assert not list(out.parent.iterdir())


def test_a_target_in_use_is_left_alone(tmp_path: Path) -> None:
    chain = trained(BoundaryForm.NONE, stages=1, wire="float32", steps=1)
    source = source_of(chain, tmp_path / "run", wire="float32")
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    for target in (full, file):
        with pytest.raises(ExportTargetError, match="not an empty folder: give a new folder"):
            export(source, target)
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    assert file.read_text() == "mine"
    export(source, empty)
    assert {path.name for path in empty.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"run", "full", "file", "empty"}
