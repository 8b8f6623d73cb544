"""A run's weights as one Hugging Face folder: config, weights, tokenizer, model card and, if needed, the model's code.

Stages are read one after the other (`checkpoint.load`, which proves each against the manifest) and written on as shards
while they pass, so the memory needed is one stage and one shard, not the model. A model without narrow boundaries is a
plain Llama and says so in its config; one with them comes with the two files of `model/hf`, and its config holds where
the boundaries are and the dtype they were rounded to on the wire. The folder is made beside its place and appears by
one rename.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.accounting import total_parameters
from model.checkpoint import load
from model.config import BoundaryForm, ModelConfig
from model.corpus import END_OF_TEXT
from model.hf.names import hf_name
from model.split import StagePlan, split
from model.stage import Stage

SHARD_BYTES = 5_000_000_000
TRAINING_STATE = "outer."
"""Tensors of a checkpoint whose names begin so belong to training, not to the model."""
CODE = ("configuration_orion.py", "modeling_orion.py")


_FORMS = {
    BoundaryForm.A: "ResBM form a, arXiv 2604.11947",
    BoundaryForm.B: "ResBM form b, arXiv 2604.11947",
    BoundaryForm.T: "form t: behind it each stage restores tokens from a table of its own",
}
"""That a model can be exported with, as its card says them."""


class ExportError(Exception):
    """The model cannot be exported; nothing was written."""


class ExportTensorError(ExportError):
    """A checkpoint lacks a tensor, has one too many or one of another shape or dtype."""


class ExportTargetError(ExportError):
    """The target folder cannot be used."""


class ExportTokenizerError(ExportError):
    """The tokenizer file cannot be used with this model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSource:
    """What an export is made of: one checkpoint per stage, in order, all of the start of round `round`.

    `wire_dtype` is a torch dtype's name ("bfloat16", "float32"). `facts` are the rows of the model card's table.
    """

    name: str
    config: ModelConfig
    wire_dtype: str
    checkpoints: Sequence[Path]
    manifest_hash: str
    round: int
    tokenizer: Path
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written: whether it is a plain Llama, its parameters, bytes of weights and number of shards."""

    plain: bool
    parameters: int
    weight_bytes: int
    shards: int


def export(
    source: ExportSource,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    tell: Callable[[int, int], None] = lambda _written, _total: None,
) -> Exported:
    """Writes the folder `out`, which must not exist or be empty; a shard exceeds `shard_bytes` only for one tensor.

    Before the first shard and after each `tell` hears how many bytes of weights are written, and of how many.

    Raises `ExportError` (see its kinds) or `checkpoint.CheckpointError`; `out` is then as it was.
    """
    out = out.resolve()
    if shard_bytes < 1:
        raise ExportError(f"shard size is {shard_bytes} bytes; it must be at least 1: raise the shard size")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportTargetError(f"{out} is there and not an empty folder: give a new folder, nothing was touched")
    config, plans = source.config, split(source.config, len(source.checkpoints))
    plain = config.boundary.form is BoundaryForm.NONE or len(plans) == 1
    end = _end_of_text(source.tokenizer, vocab=config.vocab)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            folder = Path(temporary) / "folder"
            folder.mkdir()
            stages = (_tensors(source, plan, path) for plan, path in zip(plans, source.checkpoints, strict=True))
            parameters = total_parameters(config, len(plans))
            total = parameters * torch.float32.itemsize
            tensors = chain.from_iterable(stages)
            tell(0, total)
            size, shards = _write_weights(folder, tensors, shard_bytes, lambda written: tell(written, total))
            ids = {"bos_token_id": end, "eos_token_id": end}
            _write_json(folder / "config.json", _config(source, plans, plain=plain) | ids)
            _write_json(folder / "generation_config.json", {"do_sample": False} | ids | {"pad_token_id": end})
            _write_tokenizer(folder, source.tokenizer, config, marked=end is not None)
            if not plain:
                for name in CODE:
                    (folder / name).write_text(files("model.hf").joinpath(name).read_text())
            (folder / "README.md").write_text(_card(source, parameters, plain=plain))
            folder.rename(out)
    except (OSError, SafetensorError) as error:
        raise ExportTargetError(f"{out} cannot be written ({error}): make room or give another folder") from error
    return Exported(plain=plain, parameters=parameters, weight_bytes=size, shards=shards)


def _tensors(source: ExportSource, plan: StagePlan, path: Path) -> Iterator[tuple[str, Tensor]]:
    """A stage's tensors under their exported names, once all are proven to be what the config asks for."""
    held, info = load(path, manifest_hash=source.manifest_hash)
    if info.round != source.round:
        raise ExportError(f"checkpoint {path} is of round {info.round}, not {source.round}: give files of one round")
    with torch.device("meta"):
        needed = {name: tuple(p.shape) for name, p in Stage(source.config, plan).named_parameters()}
    found = {name: tensor for name, tensor in held.items() if not name.startswith(TRAINING_STATE)}
    for name in sorted(needed.keys() | found.keys()):
        if name not in found:
            raise ExportTensorError(f"checkpoint {path} lacks '{name}': is it of stage {plan.index}?")
        if name not in needed:
            raise ExportTensorError(f"checkpoint {path} holds '{name}' too many: is it of stage {plan.index}?")
        tensor = found[name]
        if tuple(tensor.shape) != needed[name] or tensor.dtype != torch.float32:
            raise ExportTensorError(
                f"checkpoint {path} has '{name}' as {tensor.dtype} {tuple(tensor.shape)}, the manifest asks for "
                f"torch.float32 {needed[name]}: use the manifest it was trained with"
            )
    yield from ((hf_name(name), found[name]) for name in needed)


def _write_weights(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int, tell: Callable[[int], None]
) -> tuple[int, int]:
    """Shards of at most `limit` bytes in the order given, and an index if there are several; bytes and shards."""
    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        part = folder / f"part-{len(parts)}"
        save_file(held, part, {"format": "pt"})
        part.chmod(0o644)  # safetensors' own files are for their owner alone
        parts.append(list(held))
        held.clear()
        tell(total)

    for name, tensor in tensors:
        if held and size + tensor.nbytes > limit:
            flush()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return total, 1
    where: dict[str, str] = {}
    for index, names in enumerate(parts):
        shard = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{index}").rename(folder / shard)
        where |= dict.fromkeys(names, shard)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return total, len(parts)


def _config(source: ExportSource, plans: Sequence[StagePlan], *, plain: bool) -> dict[str, object]:
    config = source.config
    shape: dict[str, object] = {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        # Readers older than `rope_parameters` would take 10,000 without the second field.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    if plain:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | shape
    return {
        "architectures": ["OrionForCausalLM"],
        "model_type": "orion",
        "auto_map": {
            "AutoConfig": "configuration_orion.OrionConfig",
            "AutoModelForCausalLM": "modeling_orion.OrionForCausalLM",
        },
        "boundary_form": config.boundary.form.value,
        "boundary_width": config.boundary.width,
        "boundary_rank": config.boundary.rank,
        "boundary_layers": [plan.first_layer for plan in plans[1:]],
        "wire_dtype": source.wire_dtype,
    } | shape


def _end_of_text(path: Path, *, vocab: int) -> int | None:
    """Id of the end-of-text mark, None if the tokenizer has none; proves that every id is below `vocab`."""
    try:
        content = json.loads(path.read_text())
        ids = {str(text): int(number) for text, number in content["model"]["vocab"].items()}
        ids |= {str(token["content"]): int(token["id"]) for token in content["added_tokens"]}
    except OSError as error:
        raise ExportTokenizerError(f"tokenizer {path} cannot be read ({error.strerror}): give its file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportTokenizerError(f"{path} is no tokenizer.json with a vocabulary ({error!r}): give one") from error
    largest = max(ids.values(), default=0)
    if largest >= vocab:
        raise ExportTokenizerError(
            f"tokenizer {path} has id {largest}, the model's vocabulary has {vocab}: give the tokenizer of its data"
        )
    return ids.get(END_OF_TEXT)


def _write_tokenizer(folder: Path, tokenizer: Path, config: ModelConfig, *, marked: bool) -> None:
    marks = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT} if marked else {}
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.context,
            "clean_up_tokenization_spaces": False,
        }
        | marks,
    )


def _card(source: ExportSource, parameters: int, *, plain: bool) -> str:
    config = source.config
    facts = {
        "parameters": f"{parameters:,}",
        "layers x hidden": f"{config.layers} x {config.hidden}",
        "context": f"{config.context:,} tokens",
        "pipeline stages": str(len(source.checkpoints)),
        "manifest (SHA-256)": f"`{source.manifest_hash}`",
        "weights": f"the public ones at the start of round {source.round}",
    } | dict(source.facts)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    if plain:
        form = "The architecture is Llama's; it needs no code of its own."
        if len(source.checkpoints) > 1 and source.wire_dtype != "float32":
            form += f" Training rounded the residual to {source.wire_dtype}\nbetween its stages; this model does not."
        trust = ""
    else:
        form = (
            f"Between its pipeline stages the model was trained with a boundary of {config.boundary.width} of "
            f"{config.hidden} channels\n({_FORMS[config.boundary.form]}), rounded to "
            f"{source.wire_dtype}. The boundaries are part of the model, so they\nare here too: "
            "`configuration_orion.py` and `modeling_orion.py`, on top of `transformers`' Llama (version 5)."
        )
        trust = ", trust_remote_code=True"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [orion, bittensor]
---
# {source.name}

A causal language model, trained by an Orion swarm: miners with one pipeline stage each, without an orchestrator.

| | |
|---|---|
{rows}

{form}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto"{trust})
prompt = tokenizer("def main(", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

It continues text and follows no instructions. Nothing was done to keep what it writes correct or harmless.
"""


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
