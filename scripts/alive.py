"""`orion alive`: whether the node on this machine serves, for health checks of containers and supervisors."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping

from neurons.config import NeuronConfig
from neurons.settings import SettingsError, resolve

PATIENCE = 5.0
"""Seconds."""


def is_alive(flags: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Print what the axon says of itself. 0 if it answers, 1 if not, 2 if there is no port to ask."""
    try:
        given = str(resolve(NeuronConfig, flags, environ).values["port"])
    except SettingsError as error:
        print(f"orion alive: {error}", file=sys.stderr)
        return 2
    port = int(given) if given.isascii() and given.isdigit() else -1
    if not 0 < port <= 65_535:
        print(
            f"orion alive: port '{given}' is no port of a node: give the one it printed",
            file=sys.stderr,
        )
        return 2
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=PATIENCE) as answer:
            health = json.load(answer)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        print(f"orion alive: no node answers on port {port} ({reason}): look at its log, or give --port")
        return 1
    what = f"Orion {health['orion']}, protocol {health['protocol']}"
    print(f"{health['hotkey']} serves {len(health['routes'])} routes on port {port}: {what}")
    return 0
