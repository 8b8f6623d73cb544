"""Calls: from a decoded extrinsic to the pallet function that changes the state, and the events it leaves.

A pallet is a module that exports `CALLS`, a table from call name to function `(ctx, origin, args)`. The
function checks, then writes; it reports failure by raising `DispatchError`, and the enclosing transaction
takes its writes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import cast

from subnet.localchain.codec import Codec
from subnet.localchain.errors import DispatchError
from subnet.localchain.state import Working

Function = Callable[["Context", str, "Args"], None]
Table = Mapping[str, Mapping[str, Function]]


class Args:
    """Arguments of one decoded call, by name and type. The codec has checked them against the metadata."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def number(self, name: str) -> int:
        return cast("int", self._values[name])

    def numbers(self, name: str) -> list[int]:
        return list(cast("list[int]", self._values[name]))

    def flag(self, name: str) -> bool:
        return bool(self._values[name])

    def value(self, name: str) -> object:
        """An argument as decoded, to be stored as it is."""
        return self._values[name]

    def blob(self, name: str) -> bytes:
        """A byte string: the codec gives 0x-hex, text where the bytes are UTF-8, or a list of numbers.

        Text that spells hex cannot be told from hex, and is taken for it.
        """
        value = self._values[name]
        if not isinstance(value, str):
            return bytes(cast("list[int]", value))
        if value.startswith("0x"):
            with suppress(ValueError):
                return bytes.fromhex(value[2:])
        return value.encode()

    def account(self, name: str) -> str:
        """An account as ss58; a MultiAddress that is not an account id is refused."""
        value = self._values[name]
        if isinstance(value, Mapping):
            value = value.get("Id")
        if not isinstance(value, str):
            raise DispatchError("CannotLookup", pallet=None)
        return value

    def struct(self, name: str) -> Mapping[str, object]:
        return cast("Mapping[str, object]", self._values[name])

    def calls(self, name: str) -> list[Call]:
        return [Call.of(item) for item in cast("list[Mapping[str, object]]", self._values[name])]


@dataclass(frozen=True, slots=True)
class Call:
    """A decoded call: the pallet, the function and its arguments."""

    pallet: str
    function: str
    args: Args

    @classmethod
    def of(cls, decoded: Mapping[str, object]) -> Call:
        """From the codec's dict."""
        listed = cast("list[Mapping[str, object]]", decoded["call_args"])
        return cls(
            cast("str", decoded["call_module"]),
            cast("str", decoded["call_function"]),
            Args({cast("str", arg["name"]): arg["value"] for arg in listed}),
        )


@dataclass(slots=True)
class Context:
    """What a call sees: the state it may change, the block it is in, the events it adds to."""

    codec: Codec
    state: Working
    table: Table
    number: int
    phase: object = "Initialization"
    events: list[Mapping[str, object]] = field(default_factory=list)

    def emit(self, pallet: str, event: str, fields: object = None) -> None:
        """Record an event; `fields` is a dict for named fields, a tuple for unnamed ones."""
        body: object = event if fields is None else {event: fields}
        self.events.append({"phase": self.phase, "event": {pallet: body}, "topics": []})

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Both the writes and the events of what is inside are dropped when it raises."""
        kept = len(self.events)
        try:
            with self.state.transaction():
                yield
        except BaseException:
            del self.events[kept:]
            raise

    def error_value(self, error: DispatchError) -> object:
        """`error` as the codec encodes it inside an event."""
        if error.pallet is None:
            return error.value
        pallet, index = self.codec.error_index(error.pallet, error.name)
        return {"Module": {"index": pallet, "error": bytes([index, 0, 0, 0])}}

    def dispatch(self, origin: str, call: Call) -> None:
        """Run `call` signed by `origin`. DispatchError when it fails, then nothing of it remains."""
        function = self.table.get(call.pallet, {}).get(call.function)
        if function is None:
            # A call of the real runtime that this chain leaves out: refuse it by the runtime's word for that.
            raise DispatchError("CallFiltered", pallet="System")
        with self.transaction():
            function(self, origin, call.args)
