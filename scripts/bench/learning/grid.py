"""Grids of rows and where their results are kept, one line of JSON per row, so that a grid goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from model.config import ConfigError, preset
from model.optimizer import Kind
from scripts.bench.learning.rows import WHOLE, Form, Row
from scripts.bench.learning.training import Curve


class GridError(Exception):
    """A grid file or a file of results that cannot be used: one line with the remedy."""


class Block(BaseModel):
    """All combinations of what it lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forms: Annotated[list[Form], Field(min_length=1)]
    ratios: list[int] = []
    """Of forms that compress."""
    optimizers: Annotated[list[Kind], Field(min_length=1)]
    boundaries: Annotated[list[int], Field(min_length=1)] = [3]
    model: str = "nano"
    hidden: list[int] = []
    """Other widths than the model's own."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    depths: Annotated[list[int], Field(min_length=1)] = [1]
    accumulation: int = 1
    steps: int = 400
    rates: list[float] = []
    """Learning rates instead of the usual ones, for sweeps."""
    ranks: Annotated[list[int | None], Field(min_length=1)] = [None]
    """Of token tables; the model's own without."""
    pairs: Annotated[list[int], Field(min_length=1)] = [0]
    bits: Annotated[list[int], Field(min_length=1)] = [16]

    def _ratios_and_rates(self, form: Form) -> tuple[Sequence[int], Sequence[float | None]]:
        return [1] if form in (*WHOLE, "cut") else self.ratios, self.rates or [None]

    def rows(self) -> Iterator[Row]:
        """Every row once. Raises `ConfigError` for a combination that cannot be."""
        widths = self.hidden or [preset(self.model).hidden]
        combined = product(self.seeds, widths, self.boundaries, self.optimizers, self.forms, self.depths)
        options = list(product(self.ranks, self.pairs, self.bits))
        for seed, hidden, boundaries, optimizer, form, depth in combined:
            for ratio, rate, (rank, pairs, bits) in product(*self._ratios_and_rates(form), options):
                alone = form == "none" and depth == 1 and bits == 16
                yield Row(
                    form=form,
                    ratio=ratio,
                    optimizer=optimizer,
                    boundaries=1 if alone else boundaries,
                    hidden=hidden,
                    seed=seed,
                    steps=self.steps,
                    depth=depth,
                    accumulation=self.accumulation,
                    lr=rate,
                    rank=rank,
                    pairs=pairs,
                    bits=bits,
                    model=self.model,
                )


class _Grid(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    block: Annotated[list[Block], Field(min_length=1)]


def read_grid(path: Path) -> list[Row]:
    """All rows of a grid file, each once, in its order. Raises `GridError`."""
    try:
        grid = _Grid.model_validate(tomllib.loads(path.read_text()))
        rows = dict.fromkeys(row for block in grid.block for row in block.rows())
    except OSError as error:
        raise GridError(f"grid {path} cannot be read ({error.strerror}): check --grid") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GridError(f"grid {path} is not TOML ({error}): mend it") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise GridError(f"grid {path}: {where}: {first['msg']} (got {first['input']!r:.80})") from error
    except ConfigError as error:
        raise GridError(f"grid {path}: {error}") from error
    return list(rows)


_LINE = TypeAdapter(dict[str, object])
_ROW = TypeAdapter(Row)
_CURVE = TypeAdapter(Curve)


class Results:
    """Rows done, in a file that several processes may append to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[Row, Curve]:
        """All rows that are done. Raises `GridError` for a line that is none."""
        found: dict[Row, Curve] = {}
        text = self.path.read_text() if self.path.exists() else ""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                content = _LINE.validate_json(line)
                found[_ROW.validate_python(content["row"])] = _CURVE.validate_python(content["curve"])
            except (ValidationError, KeyError, ConfigError) as error:
                raise GridError(f"line {number} of {self.path} is no result ({error!r:.120}): remove it") from error
        return found

    def add(self, row: Row, curve: Curve) -> None:
        """Append one line, whole or not at all, whoever else writes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        losses = [[steps, round(loss, 5) if math.isfinite(loss) else math.inf] for steps, loss in curve.losses]
        content: Mapping[str, object] = {
            "row": asdict(row),
            "curve": {"losses": losses, "parameters": curve.parameters, "seconds": round(curve.seconds, 1)},
        }
        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(content) + "\n")
