"""The options of `orion data prepare`, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.config import ConfigError, ModelConfig, preset
from model.corpora.documents import PlainText
from model.corpora.folder import Format
from model.data import DataError

LIMITS: dict[str, tuple[float, float]] = {
    "shard_tokens": (1_024, 1 << 32),
    "longest": (1, 1 << 30),
    "held_out": (1e-6, 0.49),
}


class DataOptionError(DataError):
    """An option that cannot be used; the usage is wrong and nothing was looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What is asked of a preparation; `scripts/cli.py` says what each means."""

    addresses: list[str]
    tokenizer: Path
    out: Path
    format: Format | None = None
    column: str = "text"
    separator: str | None = None
    end_of_text: str | None = None
    model: str | None = None
    held_out: float = 0.01
    shard_tokens: int = 100_000_000
    longest: int = 16 << 20
    seed: int = 0
    skip_broken: bool = False

    def check(self) -> ModelConfig | None:
        """The model that the data are for, if one is named. Raises `DataOptionError`."""
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise DataOptionError(f"--{name.replace('_', '-')} {value} is outside {least} to {most}: change it")
        if self.separator is not None and self.format in ("parquet", "jsonl"):
            raise DataOptionError(f"--separator is for text files, --format is {self.format}: leave one of them out")
        try:
            PlainText(self.separator, self.longest)
            return None if self.model is None else preset(self.model)
        except (DataError, ConfigError) as error:
            raise DataOptionError(str(error)) from error
