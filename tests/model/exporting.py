"""Small trained models as stage checkpoints on disk, and their loss and greedy text as the stages compute them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from model.checkpoint import CheckpointInfo, save
from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.corpus import END_OF_TEXT
from model.export import ExportSource
from model.split import split
from model.stage import Stage, build_stage

HASH = "ab" * 32
ROUND = 3
BOUNDARIES = {
    BoundaryForm.NONE: BoundaryConfig(),
    BoundaryForm.A: BoundaryConfig(form=BoundaryForm.A, width=8),
    BoundaryForm.B: BoundaryConfig(form=BoundaryForm.B, width=8),
    BoundaryForm.T: BoundaryConfig(form=BoundaryForm.T, width=8, rank=4),
}
WIRES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config_of(form: BoundaryForm) -> ModelConfig:
    return ModelConfig(
        vocab=300,
        hidden=32,
        layers=6,
        heads=4,
        kv_heads=2,
        ffn=64,
        context=48,
        boundary=BOUNDARIES[form],
    )


@dataclass(frozen=True)
class Chain:
    """Stages that hand each other what crosses the wire, as a validator runs them."""

    stages: Sequence[Stage]
    wire: torch.dtype

    def logits(self, tokens: Tensor) -> Tensor:
        """int64 (B, T) to (B, T, vocab)."""
        x = tokens
        for stage in self.stages[:-1]:
            x = stage(x, tokens).to(self.wire).to(torch.float32)
        out: Tensor = self.stages[-1](x, tokens)
        return out

    def loss(self, batch: Tensor) -> Tensor:
        """Of int64 (B, T+1): inputs [:, :-1], targets [:, 1:]."""
        return F.cross_entropy(self.logits(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def greedy(self, tokens: Tensor, count: int) -> Tensor:
        """The likeliest `count` tokens behind int64 (1, T), everything computed anew for each."""
        for _ in range(count):
            tokens = torch.cat((tokens, self.logits(tokens)[:, -1:].argmax(-1)), dim=1)
        return tokens


def batches(config: ModelConfig, count: int) -> list[Tensor]:
    """int64 (4, T+1) each: rising runs modulo the vocabulary, with noise, so that there is something to learn."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        start = torch.randint(config.vocab, (4, 1), generator=generator)
        run = (start + torch.arange(config.context + 1)) % config.vocab
        noise = torch.rand(run.shape, generator=generator) < 0.1
        made.append(torch.where(noise, torch.randint(config.vocab, run.shape, generator=generator), run))
    return made


def trained(form: BoundaryForm, *, stages: int, wire: str, steps: int = 24) -> Chain:
    """The same weights for either wire: training through a rounding one ends elsewhere on another processor."""
    config = config_of(form)
    chain = Chain([build_stage(config, plan, seed=5) for plan in split(config, stages)], torch.float32)
    parameters = [parameter for stage in chain.stages for parameter in stage.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for batch in batches(config, steps):
        optimizer.zero_grad()
        chain.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return replace(chain, wire=WIRES[wire])


def tokenizer_file(folder: Path) -> Path:
    """A byte-level BPE whose ids are all below 300."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def main(argv): return argv", "class Main: pass"] * 9, trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def write_checkpoint(path: Path, tensors: dict[str, Tensor], *, manifest_hash: str = HASH, number: int = ROUND) -> Path:
    save(path, tensors, CheckpointInfo(manifest_hash=manifest_hash, round=number, version=1))
    return path


def source_of(chain: Chain, folder: Path, *, wire: str) -> ExportSource:
    """Checkpoints as a miner writes them, outer momentum included, and all else that an export needs."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stage in chain.stages:
        tensors = {name: tensor.detach() for name, tensor in stage.state_dict().items()}
        momentum = {"outer.momentum": torch.zeros(sum(t.numel() for t in tensors.values()))}
        paths.append(write_checkpoint(folder / f"stage-{stage.plan.index}.safetensors", tensors | momentum))
    return ExportSource(
        name="toy",
        config=chain.stages[0].config,
        wire_dtype=wire,
        checkpoints=paths,
        manifest_hash=HASH,
        round=ROUND,
        tokenizer=tokenizer_file(folder),
        facts={"validation loss": "as good as it gets"},
    )


def with_checkpoint(source: ExportSource, index: int, path: Path) -> ExportSource:
    paths = list(source.checkpoints)
    paths[index] = path
    return replace(source, checkpoints=paths)


def json_of(path: Path) -> dict[str, object]:
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content
