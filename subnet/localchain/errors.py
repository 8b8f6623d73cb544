"""What can go wrong on chain, as the chain itself tells it.

`InvalidTransaction` is a refusal before inclusion and becomes a JSON-RPC error; `DispatchError` is a failure
after inclusion and becomes a `System.ExtrinsicFailed` event whose module and index come from the metadata.
The SDK turns both into its typed errors with remedies.
"""

from __future__ import annotations


class RpcError(Exception):
    """A JSON-RPC error object: code, message and data as a Substrate node words them."""

    def __init__(self, code: int, message: str, data: object = None) -> None:
        super().__init__(f"{code}: {message}" + ("" if data is None else f" ({data})"))
        self.code = code
        self.message = message
        self.data = data


class InvalidTransaction(RpcError):  # noqa: N818 - the name that Substrate has for it
    """An extrinsic that may not enter the pool (or stay in it)."""

    def __init__(self, data: str) -> None:
        super().__init__(1010, "Invalid Transaction", data)


BAD_SIGNATURE = "Transaction has a bad signature"
STALE = "Transaction is outdated"
ANCIENT_BIRTH_BLOCK = "Transaction has an ancient birth block"
TOO_LARGE = "Transaction would exhaust the block limits"
PAYMENT = "Inability to pay some fees (e.g. account balance too low)"


class DispatchError(Exception):
    """A call that failed: `SubtensorModule.HotKeyNotRegisteredInSubNet` …, by the metadata's names.

    `pallet` is None for the runtime's own errors, given as the enum value that the codec encodes.
    """

    def __init__(self, name: str, *, pallet: str | None = "SubtensorModule", value: object = None) -> None:
        super().__init__(f"{pallet}.{name}" if pallet else name)
        self.pallet = pallet
        self.name = name
        self.value = name if value is None else value


def token_error(name: str) -> DispatchError:
    """A fungible-token error: FundsUnavailable, NotExpendable, BelowMinimum."""
    return DispatchError(name, pallet=None, value={"Token": name})
