"""The table of cards: figures that belong together, and a name that is nearly right."""

import pytest

from model.config import ConfigError
from model.devices import DEVICES, device


def test_every_card_has_figures_that_can_be() -> None:
    for name, card in DEVICES.items():
        assert card.name == name
        assert 0 < card.efficiency < 1
        assert card.flops == pytest.approx(card.peak * card.efficiency)
        assert 16e9 < card.memory < 300e9
        assert card.peak / card.bandwidth > 50  # a matrix product of a training size is bound by arithmetic


def test_a_card_is_found_by_its_name_and_the_nearest_is_named() -> None:
    assert device("A100-80GB").peak == 312e12
    with pytest.raises(ConfigError, match="GPU 'h10' is unknown: did you mean 'h100'\\? GPUs: a100-80gb, a100-40gb"):
        device("h10")
