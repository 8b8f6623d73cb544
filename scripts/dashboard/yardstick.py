"""What a run's figures are measured against: the arithmetic of its model, and the card, price and goal that were named.

Nodes do not say which card they compute with, and no log has a price. What is not named is not shown.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ConfigError
from model.devices import Device, device
from scripts.dashboard.errors import DashboardError, OptionError
from scripts.dashboard.facts import Facts
from subnet.quantities import QuantityError, parse_count

HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What `orion dashboard` was told."""

    card: Device | None = None
    """Of every miner."""
    price: float | None = None
    """Dollars per miner and hour."""
    target: int | None = None
    """Tokens to train on; None for the manifest's rounds."""

    @classmethod
    def of(cls, *, gpu: str | None, price: float | None, target: str | None) -> Yardstick:
        """From options as they are written. Raises `OptionError`."""
        try:
            card = None if gpu is None else device(gpu)
            tokens = None if target is None else int(parse_count("target", target))
        except ConfigError as error:
            raise OptionError(f"--gpu: {error}") from error
        except QuantityError as error:
            raise OptionError(str(error)) from error
        if price is not None and not 0 < price < float("inf"):
            raise OptionError(f"--price {price:g} is not above 0: give dollars per card and hour, or leave it out")
        return cls(card, price, tokens)


NOTHING_NAMED = Yardstick()


def flops_per_token(facts: Facts) -> int | None:
    """Training FLOPs by `model.accounting.FORMULA`; None for a manifest without a model. Raises `DashboardError`."""
    if facts.model is None or facts.swarm is None:
        return None
    # torch comes with them: some seconds and 200 MB that a page without a model need not take.
    from model.accounting import training_flops_per_token  # noqa: PLC0415
    from subnet.manifest import ModelSection  # noqa: PLC0415

    try:
        config = ModelSection.model_validate(facts.model).config()
        return training_flops_per_token(config, stages=facts.swarm.stages, tokens=facts.data.sequence)
    except (ConfigError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise DashboardError(f"manifest.toml: [model]: {line}; it must be the run's manifest") from error
