"""`orion generate`: text from an exported folder, with the code that is installed here and never the folder's own."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from model.hf.modeling_orion import OrionForCausalLM
from subnet.commandline import UsageError, status_of

NEW_TOKENS = 64
KINDS: dict[str, type[LlamaForCausalLM]] = {"llama": LlamaForCausalLM, "orion": OrionForCausalLM}


class GenerateError(Exception):
    """No text can be made of this: one line with the value and the remedy."""


class GenerateOptionError(GenerateError, UsageError):
    """Options with which no model makes a text."""


def generate(*, folder: Path, prompt: str, tokens: int | None, temperature: float, seed: int) -> int:
    """Print `prompt` and at most `tokens` more, greedy at temperature 0; 0 done, 1 refused, 2 for options that cannot
    be. `tokens` None: `NEW_TOKENS`, or as many as the model sees at a time."""
    try:
        print(continuation(folder=folder, prompt=prompt, tokens=tokens, temperature=temperature, seed=seed))
    except GenerateError as error:
        print(f"orion generate: {error}", file=sys.stderr)
        return status_of(error)
    return 0


def continuation(*, folder: Path, prompt: str, tokens: int | None, temperature: float, seed: int) -> str:
    """`prompt` and what the model in `folder` makes of it. Raises `GenerateError`."""
    if tokens is not None and tokens < 1:
        raise GenerateOptionError(f"--tokens {tokens} is below 1: raise it")
    if not 0 <= temperature < math.inf:
        raise GenerateOptionError(f"--temperature {temperature} is no finite number from 0 on: change it")
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = load_model(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    length, context = encoded["input_ids"].shape[1], model.config.max_position_embeddings
    asked = 1 if tokens is None else tokens
    if length < 1 or length + asked > context:
        raise GenerateError(
            f"the prompt has {length} tokens; of the {context} that the model sees, {asked} new ones leave "
            f"{context - asked}: change the prompt or lower --tokens"
        )
    most = min(NEW_TOKENS, context - length) if tokens is None else tokens
    how = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    torch.manual_seed(seed)
    out = model.generate(  # type: ignore[misc] # its self is declared as a protocol that Llama does not match
        input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=most, **how
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def load_model(folder: Path) -> LlamaForCausalLM:
    """The exported model, spread over this machine's devices. Raises `GenerateError` unless every weight is there."""
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GenerateError(
            f"{folder} holds no config.json of a model ({error!r}): give a folder of `orion export`"
        ) from error
    if kind not in KINDS:
        raise GenerateError(f"{folder} holds a model of type {kind!r}; it must be one of {', '.join(KINDS)}")
    try:
        loaded = KINDS[kind].from_pretrained(folder, device_map="auto", local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise GenerateError(f"{folder} does not load ({first}): export it again") from error
    model, info = cast("tuple[LlamaForCausalLM, dict[str, set[str]]]", loaded)
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise GenerateError(f"{folder} has weights that do not fit its config, '{wrong[0]}' first: export it again")
    return model
