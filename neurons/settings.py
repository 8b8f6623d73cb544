"""Settings of a program from four places: a flag, else its environment variable, else a TOML file, else the default.

A settings class is a frozen pydantic model whose fields carry a `Setting`. Field `wallet_path` is flag `--wallet-path`,
variable `ORION_WALLET_PATH` and key `wallet_path` or `wallet-path` of the file that `--config` or `ORION_CONFIG` names.
What is no setting is refused with the nearest that is one, and of every value it is known where it came from.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from model.nearest import nearest

PREFIX = "ORION_"
FILE_VARIABLE = f"{PREFIX}CONFIG"
OTHER_VARIABLES = frozenset({FILE_VARIABLE, f"{PREFIX}CACHE"})
"""Read from the environment, but no settings."""

M = TypeVar("M", bound=BaseModel)


class SettingsError(Exception):
    """A setting that is unknown, missing or out of range: one line with its place, its value and the remedy."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a field is shown, and whose value it has unless it is set itself."""

    group: str
    help: str
    form: str | None = None
    """An example of its text."""
    follows: str | None = None
    """The field whose value stands in for it."""
    default: str | None = None
    """Its text without being set, of a field whose value is another thing than its text."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One setting as it stands."""

    name: str
    group: str
    value: str | None
    """As it was given; None if nobody has."""
    origin: str


@dataclass(frozen=True, slots=True)
class Resolved(Generic[M]):
    """Values by field as they were given, and where each came from."""

    kind: type[M]
    values: Mapping[str, object]
    origins: Mapping[str, str]

    def shown(self) -> list[Shown]:
        """All settings in the order of the class."""
        found = []
        for name, setting in settings_of(self.kind).items():
            value = self.values.get(name)
            origin = self.origins.get(name, "not set")
            found.append(Shown(name, setting.group, None if value is None else str(value), origin))
        return found

    def build(self) -> M:
        """The checked settings. Raises `SettingsError`."""
        for name in self.kind.model_fields:
            if is_needed(self.kind, name) and name not in self.values:
                raise SettingsError(
                    f"{name} is not set: give {flag_of(name)}, {variable_of(name)} or {name} in the file of --config"
                )
        try:
            return self.kind.model_validate(dict(self.values))
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            message = first["msg"].removeprefix("Value error, ")
            if flag_of(name) not in message:
                message = f"{flag_of(name)} '{self.values[name]}' will not do: {message[0].lower()}{message[1:]}"
            origin = self.origins[name]
            raise SettingsError(message if origin == flag_of(name) else f"{message} (set by {origin})") from error


def settings_of(kind: type[BaseModel]) -> dict[str, Setting]:
    """By field."""
    found = {}
    for name, info in kind.model_fields.items():
        setting = next((entry for entry in info.metadata if isinstance(entry, Setting)), None)
        if setting is None:
            raise TypeError(f"field {name} of {kind.__name__} has no Setting")
        found[name] = setting
    return found


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def variable_of(name: str) -> str:
    return PREFIX + name.upper()


def is_needed(kind: type[BaseModel], name: str) -> bool:
    """Whether nothing runs without it."""
    setting = settings_of(kind)[name]
    return kind.model_fields[name].is_required() and setting.follows is None and setting.default is None


def default_of(kind: type[BaseModel], name: str) -> str:
    """What it is without being set, in words."""
    if is_needed(kind, name):
        return "needed"
    setting = settings_of(kind)[name]
    if setting.follows is not None:
        return f"default: as {flag_of(setting.follows)}"
    default = defaults_of(kind)[name]
    return f"default: {'none' if default is None else default}"


def defaults_of(kind: type[BaseModel]) -> dict[str, object]:
    """Of all settings that have one and follow no other."""
    found: dict[str, object] = {}
    for name, setting in settings_of(kind).items():
        info = kind.model_fields[name]
        if setting.default is not None:
            found[name] = setting.default
        elif not info.is_required():
            found[name] = info.default
    return found


def add_flags(parser: argparse.ArgumentParser, kind: type[BaseModel]) -> None:
    """`--config`, and in its group a flag for every setting. None is required, as each may be set elsewhere."""
    help_text = "TOML file with any of these settings (docs/config.md)"
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help=help_text)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, setting in settings_of(kind).items():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        text = f"{setting.help} ({default_of(kind, name)})"
        groups[setting.group].add_argument(
            flag_of(name), default=argparse.SUPPRESS, metavar=setting.form, help=text.replace("%", "%%")
        )


def resolve(kind: type[M], flags: Mapping[str, object], environ: Mapping[str, str]) -> Resolved[M]:
    """Where every setting has its value from.

    Args:
        flags: what `argparse` found for `add_flags`; what else is in it is passed over.

    Raises `SettingsError`.
    """
    names = tuple(kind.model_fields)
    values = defaults_of(kind)
    origins = dict.fromkeys(values, "default")
    path = flags.get("config") or environ.get(FILE_VARIABLE)
    if path is not None:
        found = _from_file(Path(str(path)).expanduser(), names)
        values |= found
        origins |= dict.fromkeys(found, str(path))
    found = _from_environment(environ, names)
    values |= found
    origins |= {name: variable_of(name) for name in found}
    found = {name: value for name, value in flags.items() if name in names}
    values |= found
    origins |= {name: flag_of(name) for name in found}
    for name, setting in settings_of(kind).items():
        if setting.follows in values and name not in values:
            values[name] = values[setting.follows]
            origins[name] = f"as {setting.follows}"
    return Resolved(kind, values, origins)


def _from_file(path: Path, names: Collection[str]) -> dict[str, object]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"settings file {path} cannot be read ({error.strerror}): check --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {path} is not TOML ({error}): mend it") from error
    found: dict[str, object] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in names:
            raise SettingsError(f"{path}: '{key}' is no setting: did you mean '{nearest(name, names)}'?")
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise SettingsError(f"{path}: {key} is {value!r}; every setting is a text or a number: write it as one")
        found[name] = value
    return found


def _from_environment(environ: Mapping[str, str], names: Collection[str]) -> dict[str, object]:
    known = {variable_of(name): name for name in names}
    found: dict[str, object] = {}
    for variable, value in environ.items():
        if variable in known:
            found[known[variable]] = value
        elif _is_setting(variable):
            meant = nearest(variable, known)
            raise SettingsError(f"variable {variable} is no setting: did you mean {meant}? Else unset it")
    return found


def settings_in(environ: Mapping[str, str]) -> list[str]:
    """The variables that would set something."""
    return [name for name in environ if name == FILE_VARIABLE or _is_setting(name)]


def _is_setting(variable: str) -> bool:
    return variable.startswith(PREFIX) and variable not in OTHER_VARIABLES
