"""Presets and validation: exact sizes, and errors that name the value and the option."""

import pytest
import torch
from accelerate import init_empty_weights

from model.accounting import total_parameters
from model.config import PRESETS, BoundaryConfig, BoundaryForm, ConfigError, ModelConfig, preset
from model.split import split
from model.stage import Stage


def test_100b_has_exactly_the_published_size() -> None:
    config = preset("100b")
    assert total_parameters(config, boundaries=False) == 99_615_863_808
    with init_empty_weights():
        stages = [Stage(config, plan) for plan in split(config, 16)]
    names = {name: p.numel() for stage in stages for name, p in stage.named_parameters()}
    assert sum(n for name, n in names.items() if not name.startswith("boundaries.")) == 99_615_863_808
    boundary = 2 * 9_216 * 144 + 1_152 * (128_256 + 9_216)
    assert sum(names.values()) == total_parameters(config, 16) == 99_615_863_808 + 15 * boundary
    assert all(p.device == torch.device("meta") for stage in stages for p in stage.parameters())


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("100m", 0.9e8, 1.1e8), ("1b", 1.2e9, 1.6e9), ("8b", 7.8e9, 8.2e9), ("16b", 15.5e9, 16.5e9)],
)
def test_presets_have_the_size_in_their_name(name: str, low: float, high: float) -> None:
    assert low < total_parameters(preset(name)) < high


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'nanoo' is unknown: did you mean 'nano'\? Presets: pico, nano, 100m"):
        preset("nanoo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": 0}, "vocab is 0"),
        ({"heads": 3}, "hidden 128 is not a multiple of heads 3"),
        ({"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"hidden": 12}, "rotary embedding needs an even number"),
        ({"rope_base": 1.0}, "rope_base is 1.0"),
        (
            {"boundary": BoundaryConfig(form=BoundaryForm.A, width=129)},
            "boundary.width 129 is above hidden 128",
        ),
    ],
)
def test_a_shape_that_cannot_work_is_refused(change: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {
        "vocab": 64, "hidden": 128, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 64, "context": 16,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig(**{**fields, **change})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("form", "width"), [(BoundaryForm.NONE, 4), (BoundaryForm.A, 0), (BoundaryForm.B, -1)])
def test_a_boundary_width_must_fit_its_form(form: BoundaryForm, width: int) -> None:
    with pytest.raises(ConfigError, match=f"boundary.width is {width}"):
        BoundaryConfig(form=form, width=width)


def test_every_preset_is_valid_and_frozen() -> None:
    for config in PRESETS.values():
        assert config.boundary_width < config.hidden
        with pytest.raises(AttributeError):
            config.vocab = 1  # type: ignore[misc]
