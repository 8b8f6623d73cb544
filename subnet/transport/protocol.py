"""Which version of the protocol two nodes speak.

The version changes with whatever a node of the version before would misread: messages, their fields and tensors, what
is signed, records. It stands in the path of every request (``/1/forward``), which the signature covers, in a header of
every reply, and in the node's axon announcement on chain. A node speaks its own version and the one before it, so a
swarm can be upgraded node by node, and two nodes speak the older one's. Nothing that all must compute alike, such as
the roster, asks for it.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Final

PROTOCOL: Final = 1
FIELD: Final = "Orion-Protocol"
"""Header of a reply: the version of who answers."""
PACKAGE: Final = "orion-subnet"

_TARGET: Final = re.compile(r"/([1-9][0-9]{0,8})/([!-~]+)")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,8}")


def spoken(*, mine: int = PROTOCOL) -> range:
    """The versions that a node of version `mine` speaks."""
    return range(max(1, mine - 1), mine + 1)


def common(theirs: int, *, mine: int = PROTOCOL) -> int | None:
    """The version that nodes of these two speak to each other; None if there is none."""
    older = min(theirs, mine)
    return older if older >= 1 and abs(theirs - mine) <= 1 else None


def target(route: str, version: int) -> str:
    """Path of a request in this version."""
    return f"/{version}/{route}"


def read_target(path: str) -> tuple[int, str] | None:
    """Version and route of a request; None for another path."""
    match = _TARGET.fullmatch(path)
    return None if match is None else (int(match[1]), match[2])


def read_field(fields: Mapping[str, str]) -> int | None:
    """The version in a reply's header; None if it has none."""
    text = fields.get(FIELD, "")
    return int(text) if _VERSION.fullmatch(text) else None


def mismatch(theirs: int, *, mine: int = PROTOCOL) -> tuple[str, str]:
    """What to say to a caller whose request is in a version that this node does not speak: the reason, the remedy."""
    known = " and ".join(map(str, spoken(mine=mine)))
    older = "the node that was called" if theirs > mine else "the calling node"
    return f"the request is in protocol {theirs}, this node speaks {known}", f"upgrade Orion on {older}"


def package_version() -> str:
    """Of this installation."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
