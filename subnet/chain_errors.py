"""What can fail on the way to the chain and on it. Every message is one line: what, why, and the remedy."""

from __future__ import annotations


class ChainError(Exception):
    """The chain, or the way to it, failed."""


class NotRegistered(ChainError):  # noqa: N818
    """The hotkey holds no uid on the subnet."""


class ChainUnreachable(ChainError):  # noqa: N818
    """No answer within the deadline, or the connection is lost for good."""


class ChainRefused(ChainError):  # noqa: N818
    """The chain (or a check made before asking it) said no."""


class WalletError(ChainError):
    """A wallet that is missing, unreadable or in the way."""
