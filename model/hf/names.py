"""Parameter names: those of Orion's stages and those of the exported model, each from the other.

`transformers`' Llama names its parts differently, and there a boundary's two ends belong to the layers they follow and
precede: "boundaries.2.sender.…" becomes "model.layers.1.sender.…", "boundaries.2.receiver.…" becomes
"model.layers.2.receiver.…".
"""

import re

_WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
_WHOLE_BACK = {theirs: ours for ours, theirs in _WHOLE.items()}
_LAYER_BACK = {theirs: ours for ours, theirs in _LAYER.items()}
_NUMBER = r"(0|[1-9]\d{0,8})"
_END = r"(sender\.encoder|receiver\.decoder|receiver\.restore\.(?:tokens|out))(\.[02])?\.weight"
_OURS_IN_LAYER = re.compile(rf"layers\.{_NUMBER}\.([a-z_.]+)\.weight")
_OURS_AT_END = re.compile(rf"boundaries\.{_NUMBER}\.{_END}")
_THEIRS_IN_LAYER = re.compile(rf"model\.layers\.{_NUMBER}\.([a-z_.]+)\.weight")
_THEIRS_AT_END = re.compile(rf"model\.layers\.{_NUMBER}\.{_END}")


class TensorNameError(ValueError):
    """A name that no parameter has."""


def hf_name(name: str) -> str:
    """A parameter's name in the exported model, from its name in a stage. Raises `TensorNameError`."""
    if name in _WHOLE:
        return _WHOLE[name]
    if (match := _OURS_IN_LAYER.fullmatch(name)) and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.weight"
    if (match := _OURS_AT_END.fullmatch(name)) and match[1] != "0":
        layer = int(match[1]) - (1 if match[2] == "sender.encoder" else 0)
        return f"model.layers.{layer}.{match[2]}{match[3] or ''}.weight"
    raise TensorNameError(f"'{name}' is no parameter of an Orion stage: use a checkpoint that Orion wrote")


def orion_name(name: str) -> str:
    """The inverse of `hf_name`. Raises `TensorNameError`."""
    if name in _WHOLE_BACK:
        return _WHOLE_BACK[name]
    if (match := _THEIRS_IN_LAYER.fullmatch(name)) and match[2] in _LAYER_BACK:
        return f"layers.{match[1]}.{_LAYER_BACK[match[2]]}.weight"
    if match := _THEIRS_AT_END.fullmatch(name):
        boundary = int(match[1]) + (1 if match[2] == "sender.encoder" else 0)
        if boundary > 0:
            return f"boundaries.{boundary}.{match[2]}{match[3] or ''}.weight"
    raise TensorNameError(f"'{name}' is no parameter of an exported model: use a folder that Orion wrote")
