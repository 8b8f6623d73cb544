"""What can fail on the way to the chain and on it. Every message is one line: what, why, and the remedy."""

from __future__ import annotations

import bittensor.result as sdk
from bittensor.error_map import ErrorCode


class ChainError(Exception):
    """The chain, or the way to it, failed."""


class NotRegistered(ChainError):  # noqa: N818
    """The hotkey holds no uid on the subnet."""


class ChainUnreachable(ChainError):  # noqa: N818
    """No answer within the deadline, or the connection is lost for good."""


class ChainRefused(ChainError):  # noqa: N818
    """The chain (or a check made before asking it) said no."""


class NoSubnet(ChainRefused):
    """The chain answers, and has no subnet of that number."""


class WalletError(ChainError):
    """A wallet that is missing, unreadable or in the way."""


def one_line(error: BaseException) -> str:
    """An error's text without its line breaks, or its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def require_subnet(exists: object, netuid: int, network: str) -> None:
    """Raises `NoSubnet`."""
    if not exists:
        raise NoSubnet(f"network {network} has no subnet {netuid}; check --netuid and --network")


def translated(what: str, error: Exception, deadline: float) -> ChainError:
    """The SDK's error as one of ours, with its remedy."""
    if isinstance(error, TimeoutError):
        return ChainUnreachable(f"{what}: no answer within {deadline:g} s; check the network, or another --network")
    if isinstance(error, sdk.RpcConnectionError | sdk.ConnectionNotReady | OSError):
        return ChainUnreachable(f"{what}: {one_line(error)}; check that the node runs, or another --network")
    if isinstance(error, sdk.ChainError):
        if error.name == "AccountNotAllowedCommit":  # the Commitments pallet's word for an unregistered hotkey
            error = sdk.ChainError(error.message, error.name, ErrorCode.NOT_REGISTERED)
        kind = NotRegistered if error.code is ErrorCode.NOT_REGISTERED else ChainRefused
        name = f" [{error.name}]" if error.name else ""
        return kind(f"{what}: {one_line(error)}{name}; remedy: {error.remediation}")
    return ChainRefused(f"{what}: {one_line(error)}")
