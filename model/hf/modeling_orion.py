"""An Orion model for `transformers`: Llama, with narrow boundaries between some of its layers.

Every part is Llama's but two. Before a boundary a layer's `sender` turns residual and FFN output into the narrow tensor
y; the layer behind it has a `receiver` that turns y into the input of its attention branch and the residual to carry
on. Both belong to their layers, so a `device_map` that cuts the model at a boundary moves y alone, as training did:

    form a     y = h[:b] + W silu(f)                 input = relu(W' y),  carry = pad(y)
    form b     y = Enc(x) + x[:b], x = h + f         input = carry = Dec(y) + pad(y)
    form t     y = norm(W norm(x))                   input = carry = W' y + R(tokens)

Layers behind a boundary of form t get the tokens beside their input. Attention, its cache, masks, loss and `generate`
are inherited.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

from .configuration_orion import OrionConfig


def _coder(config: OrionConfig, inputs: int, outputs: int) -> nn.Module:
    if config.boundary_form in ("a", "t"):
        return nn.Linear(inputs, outputs, bias=False)
    if config.boundary_form == "b":
        middle = max(4 * config.boundary_width, 64)
        return nn.Sequential(nn.Linear(inputs, middle, bias=False), nn.SiLU(), nn.Linear(middle, outputs, bias=False))
    raise ValueError(
        f"boundary_form is {config.boundary_form!r}; this file knows 'a', 'b' and 't': take its newer version"
    )


class OrionSender(nn.Module):
    """Residual h and FFN output f, both (B, T, hidden), to y (B, T, width), rounded as it was on the wire."""

    def __init__(self, config: OrionConfig) -> None:
        super().__init__()
        self.form = config.boundary_form
        self.width = config.boundary_width
        self.wire: torch.dtype = getattr(torch, config.wire_dtype)
        self.encoder = _coder(config, config.hidden_size, config.boundary_width)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        x = residual + branch
        if self.form == "a":
            y: Tensor = residual[..., : self.width] + self.encoder(F.silu(branch))
        elif self.form == "b":
            y = self.encoder(x) + x[..., : self.width]
        else:
            y = _normed(self.encoder(_normed(x)))
        return y.to(self.wire).to(y.dtype)


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class OrionRestore(nn.Module):
    """What a receiver of form t knows of a token without being told: int64 (B, T) to (B, T, hidden)."""

    def __init__(self, config: OrionConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.boundary_rank)
        narrow = config.boundary_rank < config.hidden_size
        self.out = nn.Linear(config.boundary_rank, config.hidden_size, bias=False) if narrow else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(self.tokens(tokens))
        return out


class OrionReceiver(nn.Module):
    """y (B, T, width) to attention input and carried residual, both (B, T, hidden)."""

    def __init__(self, config: OrionConfig) -> None:
        super().__init__()
        self.form = config.boundary_form
        self.padding = config.hidden_size - config.boundary_width
        self.decoder = _coder(config, config.boundary_width, config.hidden_size)
        self.restore = OrionRestore(config) if config.boundary_rank else None

    def forward(self, y: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        padded = F.pad(y, (0, self.padding))
        if self.form == "a":
            return F.relu(self.decoder(y)), padded
        x = self.decoder(y) if self.form == "t" else self.decoder(y) + padded
        if self.restore is not None:
            x = x + self.restore(tokens)
        return x, x


class OrionDecoderLayer(LlamaDecoderLayer):
    """Llama's layer; it takes y instead of the residual behind a boundary, and returns y before one."""

    def __init__(self, config: OrionConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.receiver = OrionReceiver(config) if layer_idx in config.boundary_layers else None
        self.sender = OrionSender(config) if layer_idx + 1 in config.boundary_layers else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        branch_input = carry = hidden_states
        if self.receiver is not None:
            branch_input, carry = self.receiver(hidden_states, tokens)
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(branch_input),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        residual = carry + attended
        branch = self.mlp(self.post_attention_layernorm(residual))
        out: Tensor = residual + branch if self.sender is None else self.sender(residual, branch)
        return out


class OrionModel(LlamaModel):
    """Embedding, layers and final norm."""

    config_class = OrionConfig
    _no_split_modules = ["OrionDecoderLayer"]
    _can_record_outputs = {"hidden_states": OrionDecoderLayer, "attentions": LlamaAttention}

    def __init__(self, config: OrionConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(OrionDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids: torch.LongTensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        if input_ids is None and self.config.boundary_rank:
            raise ValueError("a boundary of form t restores tokens, embeddings do not tell them: give input_ids")
        out: BaseModelOutputWithPast = super().forward(input_ids=input_ids, tokens=input_ids, **kwargs)
        return out


class OrionForCausalLM(LlamaForCausalLM):
    """The whole model with its vocabulary head."""

    config_class = OrionConfig
    _no_split_modules = ["OrionDecoderLayer"]

    def __init__(self, config: OrionConfig) -> None:
        super().__init__(config)
        self.model = OrionModel(config)
        self.post_init()


__all__ = ["OrionForCausalLM", "OrionModel"]
