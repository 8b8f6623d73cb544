"""Our decoder equals `transformers`' Llama on the same random weights, whole and cut into stages."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig
from model.split import split
from model.stage import build_stage

_NAMES = (
    ("model.embed_tokens.", "embedding."),
    ("model.norm.", "norm."),
    ("lm_head.", "head."),
    ("model.layers.", "layers."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".self_attn.q_proj.", ".attention.q."),
    (".self_attn.k_proj.", ".attention.k."),
    (".self_attn.v_proj.", ".attention.v."),
    (".self_attn.o_proj.", ".attention.o."),
    (".mlp.gate_proj.", ".ffn.gate."),
    (".mlp.up_proj.", ".ffn.up."),
    (".mlp.down_proj.", ".ffn.down."),
)


def _ours(name: str) -> str:
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "tokens", "stages"),
    [
        (32, 1, 2, 2, 48, 50, 7, 1),
        (64, 3, 8, 2, 96, 100, 33, 2),
        (48, 4, 4, 1, 80, 64, 64, 4),
        (128, 2, 4, 2, 384, 1_024, 128, 1),
    ],
)
def test_logits_equal_llama(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, tokens: int, stages: int
) -> None:
    config = ModelConfig(
        vocab=vocab, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, ffn=ffn, context=tokens
    )
    torch.manual_seed(layers)
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=tokens,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=False,
            initializer_range=0.05,
        )
    )
    weights = {_ours(name): value for name, value in reference.state_dict().items()}
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            weight.uniform_(0.5, 1.5)
    x = torch.randint(vocab, (3, tokens))
    with torch.no_grad():
        y = x
        used: set[str] = set()
        for plan in split(config, stages):
            stage = build_stage(config, plan, seed=0)
            own = {name: weights[name] for name in stage.state_dict()}
            stage.load_state_dict(own)
            used |= own.keys()
            y = stage(y)
        expected = reference(x).logits
    assert used == weights.keys()
    assert (y - expected).abs().max() <= 1e-5
    assert expected.abs().max() > 0.05
