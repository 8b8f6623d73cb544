"""Configuration of an Orion model for `transformers`: Llama's, plus where and how its residual is narrowed.

The model was trained in pipeline stages that send each other only `boundary_width` channels per token (ResBM, arXiv
2604.11947). The boundaries are part of the model, so they stay in it on one machine too. This file and
`modeling_orion.py` need `transformers` 5 and nothing else.
"""

from transformers import LlamaConfig


class OrionConfig(LlamaConfig):
    """Llama's fields and five of Orion's.

    `boundary_form` is "a", "b" or "t", `boundary_width` the channels that cross, `boundary_rank` that of the token
    tables of form t, 0 without, `boundary_layers` the first layers behind each boundary, rising. `wire_dtype` is what a
    boundary tensor was rounded to in training, and so is here.
    """

    model_type = "orion"

    boundary_form: str = "a"
    boundary_width: int = 16
    boundary_rank: int = 0
    boundary_layers: tuple[int, ...] | list[int] = ()
    wire_dtype: str = "bfloat16"


__all__ = ["OrionConfig"]
