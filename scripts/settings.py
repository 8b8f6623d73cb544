"""`orion config`: what a neuron would be set to here and where each value comes from, and a file to begin with."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict

from neurons.config import NeuronConfig
from neurons.settings import (
    Setting,
    SettingsError,
    Shown,
    add_flags,
    default_of,
    defaults_of,
    is_needed,
    resolve,
    settings_of,
)
from subnet.commandline import Parser


def command() -> argparse.ArgumentParser:
    """What `orion config` takes."""
    parser = Parser(
        prog="orion config",
        description="The settings of miners and validators. A flag comes before its variable, that "
        "before the file, that before the default.",
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = commands.add_parser(
        "show",
        help="every setting, its value and where it comes from",
        description="Print every setting, its value and where it comes from. Exit status 2 if a neuron would not start "
        "with them.",
        allow_abbrev=False,
    )
    show.add_argument("--json", action="store_true", help="as JSON")
    add_flags(show, NeuronConfig)
    text = "a file to begin with: orion config template > orion.toml"
    commands.add_parser("template", help=text, description=f"Print {text}")
    return parser


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    flags = command().parse_args(argv)
    return print_template() if flags.action == "template" else show_config(vars(flags), environ, as_json=flags.json)


def show_config(flags: Mapping[str, object], environ: Mapping[str, str], *, as_json: bool) -> int:
    """Print every setting, its value and its origin. 0 if a neuron would start with them, else 2 and the reason."""
    try:
        resolved = resolve(NeuronConfig, flags, environ)
    except SettingsError as error:
        print(f"orion config: {error}", file=sys.stderr)
        return 2
    shown = resolved.shown()
    print(json.dumps([asdict(one) for one in shown], indent=2) if as_json else _table(shown))
    try:
        resolved.build()
    except SettingsError as error:
        print(f"orion config: {error}", file=sys.stderr)
        return 2
    return 0


def _table(shown: list[Shown]) -> str:
    names = max(len(one.name) for one in shown)
    values = max(len(one.value or "-") for one in shown)
    lines: list[str] = []
    group = ""
    for one in shown:
        if one.group != group:
            group = one.group
            lines += ([""] if lines else []) + [group]
        lines.append(f"  {one.name:<{names}}  {one.value or '-':<{values}}  {one.origin}")
    return "\n".join(lines)


def print_template() -> int:
    """Print a settings file in which everything is explained and nothing but what is needed is set."""
    print("# Settings of an Orion neuron. Flags and ORION_ variables come before what is set here (docs/config.md).")
    group = ""
    for name, setting in settings_of(NeuronConfig).items():
        if setting.group != group:
            group = setting.group
            print(f"\n# {group}")
        print(f"# {setting.help} ({default_of(NeuronConfig, name)})")
        print(f"{'' if is_needed(NeuronConfig, name) else '# '}{name} = {_example(name, setting)}")
    return 0


def _example(name: str, setting: Setting) -> str:
    """A value as TOML has it."""
    default = defaults_of(NeuronConfig).get(name)
    if isinstance(default, int):
        return str(default)
    return json.dumps(str(default or setting.form or ""), ensure_ascii=False)
