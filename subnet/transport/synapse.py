"""Messages: a pydantic model for the fields, tensors beside it, one safetensors blob on the wire.

The blob is the safetensors format, so any tool can read a captured message: eight bytes of header length, a
JSON header padded to eight bytes, the tensors' bytes in order of falling item size. The header's
``__metadata__`` has one key, ``synapse``, with the model's JSON. Writing copies nothing: `encode` returns
the header and views of the tensors' memory. Reading is our own and strict, because the header comes from a
stranger: at most 64 KiB, no duplicate or unknown key, offsets that tile the payload exactly, and every
name, dtype, shape and size equal to what the caller expects, all checked before a single element is
touched. The tensors are views of the received buffer, which they keep alive.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from subnet.transport.errors import MalformedRequest, NotFinite, WrongTensor

OFF_LOOP: Final = 4 * 1024 * 1024
"""Bodies of this many bytes are hashed in a thread: what would stall the loop for a millisecond."""

HEADER_LIMIT: Final = 64 * 1024
"""Bytes before the first tensor: the length field and the padded JSON header, fields included."""

_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


class Synapse(BaseModel):
    """Base of every message. Fields are immutable and strictly typed; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    route: ClassVar[str] = ""
    """Path of the axon's route, such as ``forward``; empty for kinds that only occur as replies."""


S = TypeVar("S", bound=Synapse)


class Received(dict[str, torch.Tensor]):
    """The tensors of a request whose bytes are proven to be the signed ones."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, payload: bytes, source: str = "") -> None:
        """
        Args:
            payload: the BLAKE3 of all their bytes, end to end: where there is one tensor, that one's.
            source: IP address that the request came from; empty where it came over no network.
        """
        super().__init__(tensors)
        self.payload = payload
        self.source = source


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor must be, to the byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{_NAMES.get(self.dtype, self.dtype)}{list(self.shape)}"


Specs: TypeAlias = Mapping[str, TensorSpec]


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """The specs that exactly these tensors satisfy."""
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def wire_bytes(specs: Specs) -> int:
    """Payload bytes of a message with these tensors: no framing, no padding, nothing between them."""
    return sum(spec.nbytes for spec in specs.values())


def max_blob_bytes(specs: Specs) -> int:
    """The size no valid message with these tensors exceeds: payload plus the bounded header."""
    return HEADER_LIMIT + wire_bytes(specs)


def encode(synapse: Synapse, tensors: Mapping[str, torch.Tensor]) -> list[memoryview]:
    """The blob in parts: the header, then views of the tensors' memory, so do not write to that meanwhile.

    Raises:
        ValueError: a tensor is not in host memory or has a dtype without a wire name; the header is too long.
    """
    header: dict[str, object] = {"__metadata__": {"synapse": synapse.model_dump_json()}}
    parts: list[memoryview] = []
    offset = 0
    # Falling item size keeps every tensor aligned without padding: the order of the safetensors library.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if tensor.device.type != "cpu" or tensor.dtype not in _NAMES or name == "__metadata__":
            raise ValueError(
                f"tensor {name!r} ({tensor.dtype} on {tensor.device}) cannot be sent; "
                f"copy it to host memory as one of {', '.join(_DTYPES)}"
            )
        part = tensor_bytes(tensor)
        end = offset + part.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        if end > offset:
            parts.append(part)
        offset = end
    text = _WRITER.encode(header).encode()
    text += b" " * (-len(text) % 8)
    if 8 + len(text) > HEADER_LIMIT:
        raise ValueError(
            f"header of {type(synapse).__name__} has {8 + len(text)} bytes, limit {HEADER_LIMIT}; "
            "send long fields as a tensor"
        )
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes as they cross the wire; a view of its memory where that is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def size_of(parts: Sequence[memoryview]) -> int:
    """Bytes of an encoded message."""
    return sum(part.nbytes for part in parts)


def slices(parts: Sequence[memoryview], *, size: int) -> Iterator[memoryview]:
    """The parts, cut into pieces of at most `size` bytes."""
    for part in parts:
        for start in range(0, part.nbytes, size):
            yield part[start : start + size]


def decode(
    kind: type[S], blob: memoryview, expected: Specs | Callable[[S], Specs]
) -> tuple[S, dict[str, torch.Tensor]]:
    """Read a blob written by `encode` or by the safetensors library.

    Args:
        kind: the model of the fields.
        blob: the bytes, in memory aligned to at least 8; the tensors returned are views of it.
        expected: exactly the tensors it must hold, or a function that says so once the fields are known.

    Raises:
        MalformedRequest: the header is not a header, or its fields are not a `kind`.
        WrongTensor: the tensors are not those expected.
    """
    header, start = _read_header(blob)
    synapse = _read_fields(kind, header)
    specs = expected(synapse) if callable(expected) else expected
    if header.keys() != specs.keys():
        raise WrongTensor(f"tensors {sorted(header)} in {kind.__name__}", f"send exactly {sorted(specs)}")
    places = {name: _read_entry(name, entry, specs[name]) for name, entry in header.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1], item[0])):
        spec = specs[name]
        if place != end or place % spec.dtype.itemsize:
            raise MalformedRequest(
                f"tensor {name!r} at offset {place}, expected at {end}, a multiple of {spec.dtype.itemsize}",
                "lay tensors end to end by falling item size",
            )
        end += spec.nbytes
    if start + end != blob.nbytes:
        raise MalformedRequest(f"{blob.nbytes} bytes received, {start + end} announced", "send the whole blob")
    if blob.readonly:
        blob = memoryview(bytearray(blob))  # torch knows no read-only tensors
    return synapse, {name: _view(blob, start + place, specs[name]) for name, place in places.items()}


def require_finite(tensors: Mapping[str, torch.Tensor], *, limit: float = math.inf) -> None:
    """Refuse NaN, infinity and magnitudes above `limit`, in one pass and without a temporary (0.1 ms per million bf16).

    Raises:
        NotFinite: naming the tensor and how many of its elements are at fault.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        low, high = torch.aminmax(tensor)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            count = tensor.numel() - int(torch.isfinite(tensor).sum())
            raise NotFinite(
                f"tensor {name!r} has {count} of {tensor.numel()} elements that are NaN or infinite",
                "do not send it: lower the learning rate or reload the last checkpoint",
            )
        if max(-low.item(), high.item()) > limit:
            raise NotFinite(
                f"tensor {name!r} reaches {max(-low.item(), high.item()):.3g}, limit {limit:g}",
                "do not send it: lower the learning rate or reload the last checkpoint",
            )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key occurs twice")
    return keys


# Made once: `json.loads` and `json.dumps` make new ones for a hook or separators, which takes as long as their work.
_READER: Final = json.JSONDecoder(object_pairs_hook=_unique)
_WRITER: Final = json.JSONEncoder(separators=(",", ":"))


def _read_header(blob: memoryview) -> tuple[dict[str, object], int]:
    """The header and the offset of the first tensor byte."""
    size = int.from_bytes(blob[:8], "little")
    start = 8 + size
    if blob.nbytes < 8 or start > HEADER_LIMIT or start > blob.nbytes or start % 8:
        raise MalformedRequest(
            f"header of {size} bytes in a blob of {blob.nbytes}, limit {HEADER_LIMIT - 8}, a multiple of 8",
            "send one safetensors blob",
        )
    try:
        header = _READER.decode(str(blob[8:start], "utf-8"))
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(f"header is no JSON object ({error})", "send one safetensors blob") from None
    if not isinstance(header, dict):
        raise MalformedRequest("header is no JSON object", "send one safetensors blob")
    return header, start


def _read_fields(kind: type[S], header: dict[str, object]) -> S:
    metadata = header.pop("__metadata__", None)
    fields = metadata.get("synapse") if isinstance(metadata, dict) and len(metadata) == 1 else None
    if not isinstance(fields, str):
        raise MalformedRequest("metadata is not {'synapse': JSON}", f"put the JSON of a {kind.__name__} there")
    try:
        return kind.model_validate_json(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "fields"
        raise MalformedRequest(
            f"{kind.__name__}: {where}: {first['msg']} ({error.error_count()} in all)",
            "send the fields of this version of the protocol",
        ) from None
    except ValueError as error:  # text that cannot be UTF-8
        raise MalformedRequest(f"{kind.__name__}: {error}", "send JSON as UTF-8") from None


def _read_entry(name: str, entry: object, spec: TensorSpec) -> int:
    """The tensor's offset, once everything else in its entry is what the spec says."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedRequest(f"entry of tensor {name!r} is not one", "give it dtype, shape and data_offsets only")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise MalformedRequest(f"entry of tensor {name!r} has a bad shape or offsets", "give lists of sizes")
    begin, end = offsets
    if dtype != _NAMES[spec.dtype] or tuple(shape) != spec.shape or end - begin != spec.nbytes:
        raise WrongTensor(
            f"tensor {name!r} is {dtype}{shape} in {end - begin} bytes",
            f"this run's plan says {spec} in {spec.nbytes} bytes",
        )
    return int(begin)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _view(blob: memoryview, offset: int, spec: TensorSpec) -> torch.Tensor:
    if spec.nbytes == 0:  # torch.frombuffer refuses an empty range
        return torch.empty(spec.shape, dtype=spec.dtype)
    count = math.prod(spec.shape)
    return torch.frombuffer(blob, dtype=spec.dtype, count=count, offset=offset).view(spec.shape)
