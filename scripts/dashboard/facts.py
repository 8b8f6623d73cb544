"""What a run's manifest says that its events do not: its name, its length, how large a microbatch is, its model.

`subnet.manifest` checks a whole manifest, for nodes; here a few numbers are read, without what computes with them.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from scripts.dashboard.errors import DashboardError

FILE = "manifest.toml"


class _Run(BaseModel):
    name: str


class _Data(BaseModel):
    batch: PositiveInt
    sequence: PositiveInt


class _Round(BaseModel):
    count: PositiveInt


class _Swarm(BaseModel):
    stages: PositiveInt


class Facts(BaseModel):
    """The part of `manifest.toml` that the page needs."""

    model_config = ConfigDict(frozen=True)

    run: _Run
    data: _Data
    round: _Round
    swarm: _Swarm | None = None
    model: dict[str, object] | None = None
    """As `subnet.manifest.ModelSection` has it."""

    @property
    def tokens_per_microbatch(self) -> int:
        return self.data.batch * self.data.sequence


def read_facts(run: Path) -> Facts | None:
    """Of the run in this folder; None while it has no manifest. Raises `DashboardError` for one that is none."""
    path = run / FILE
    try:
        return Facts.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DashboardError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DashboardError(f"{path}: {where}: {first['msg']}; it must be the run's manifest") from error
    except ValueError as error:
        raise DashboardError(f"{path} is no TOML ({error}): restore the run's manifest") from error
