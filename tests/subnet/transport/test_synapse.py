"""The blob: exact bytes, readable by the safetensors library both ways, and no input but a typed refusal."""

from __future__ import annotations

import json
import warnings
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet.transport import synapse
from subnet.transport.errors import MalformedRequest, NotFinite, Refused, WrongTensor
from subnet.transport.synapse import Synapse, TensorSpec


class Push(Synapse):
    route: ClassVar[str] = "push"
    sample: int
    version: str = "v"


SPECS = {"x": TensorSpec(torch.bfloat16, (4, 6)), "ids": TensorSpec(torch.int64, (4,))}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(4, 6, generator=generator).bfloat16(), "ids": torch.arange(4)}


def joined(message: Synapse, values: dict[str, torch.Tensor]) -> bytearray:
    return bytearray(b"".join(synapse.encode(message, values)))


def blob(header: object, payload: bytes = b"") -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(bytearray(len(text).to_bytes(8, "little") + text + payload))


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


META = {"synapse": '{"sample":1}'}


@pytest.mark.parametrize("dtype", list(synapse._NAMES))
def test_round_trip_of_every_dtype(dtype: torch.dtype) -> None:
    values = {"t": torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype), "odd": torch.ones(3, dtype=torch.uint8)}
    fields, got = synapse.decode(Push, memoryview(joined(Push(sample=7), values)), synapse.specs_of(values))
    assert fields == Push(sample=7)
    assert got["t"].dtype == dtype
    assert torch.equal(got["t"], values["t"])
    assert torch.equal(got["odd"], values["odd"])


def test_scalars_empty_and_transposed_tensors_survive() -> None:
    values = {"s": torch.tensor(3.5), "none": torch.empty(0, 5), "t": torch.arange(6.0).view(2, 3).T}
    _, got = synapse.decode(Push, memoryview(joined(Push(sample=1), values)), synapse.specs_of(values))
    assert all(torch.equal(got[name], value) for name, value in values.items())


@pytest.mark.parametrize(("tokens", "width", "dtype"), [(1024, 16, torch.bfloat16), (8192, 144, torch.bfloat16)])
def test_wire_bytes_are_the_tensor_plus_a_bounded_header(tokens: int, width: int, dtype: torch.dtype) -> None:
    values = {"x": torch.zeros(tokens, width, dtype=dtype)}
    parts = synapse.encode(Push(sample=2**60, version="v" * 64), values)
    assert synapse.wire_bytes(synapse.specs_of(values)) == tokens * width * dtype.itemsize
    assert synapse.size_of(parts) - tokens * width * dtype.itemsize == parts[0].nbytes < 512
    assert synapse.size_of(parts) <= synapse.max_blob_bytes(synapse.specs_of(values))


def test_encode_and_decode_copy_nothing() -> None:
    values = tensors()
    parts = synapse.encode(Push(sample=1), values)
    values["ids"][0] = 99
    assert bytes(parts[1][:8]) == (99).to_bytes(8, "little")
    buffer = joined(Push(sample=1), values)
    _, got = synapse.decode(Push, memoryview(buffer), SPECS)
    buffer[-48:] = bytes(48)  # x is last: smaller items follow
    assert not got["x"].any()


def test_decoding_read_only_memory_warns_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        synapse.decode(Push, memoryview(bytes(joined(Push(sample=1), tensors()))), SPECS)


def test_safetensors_reads_ours_and_we_read_theirs() -> None:
    theirs = safetensors.torch.load(bytes(joined(Push(sample=1), tensors())))
    assert all(torch.equal(theirs[name], value) for name, value in tensors().items())
    data = safetensors.torch.save(tensors(), metadata={"synapse": Push(sample=5).model_dump_json()})
    fields, got = synapse.decode(Push, memoryview(bytearray(data)), SPECS)
    assert fields.sample == 5
    assert all(torch.equal(got[name], value) for name, value in tensors().items())


def test_specs_may_depend_on_the_fields() -> None:
    values = {"x": torch.zeros(3, 2)}
    received = memoryview(joined(Push(sample=3), values))
    _, got = synapse.decode(Push, received, lambda push: {"x": TensorSpec(torch.float32, (push.sample, 2))})
    assert got["x"].shape == (3, 2)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"x": torch.zeros(4, 7).bfloat16(), "ids": torch.arange(4)},
            r"'x' is BF16\[4, 7\].*BF16\[4, 6\] in 48",
        ),
        ({"x": torch.zeros(6, 4).bfloat16(), "ids": torch.arange(4)}, r"'x' is BF16\[6, 4\]"),
        ({"x": torch.zeros(4, 6).half(), "ids": torch.arange(4)}, r"'x' is F16\[4, 6\]"),
        ({"x": torch.zeros(4, 6).bfloat16()}, r"tensors \['x'\] in Push; send exactly \['ids', 'x'\]"),
        (tensors() | {"y": torch.zeros(1)}, r"tensors \['ids', 'x', 'y'\]"),
    ],
    ids=["shape", "transposed", "dtype", "missing", "extra"],
)
def test_unexpected_tensors_are_refused(values: dict[str, torch.Tensor], told: str) -> None:
    with pytest.raises(WrongTensor, match=told) as caught:
        synapse.decode(Push, memoryview(joined(Push(sample=1), values)), SPECS)
    assert caught.value.status == 422


X = {"x": TensorSpec(torch.float32, (2,))}
XY = {"x": TensorSpec(torch.float32, (2,)), "y": TensorSpec(torch.float32, (2,))}
HUGE = 2**62


@pytest.mark.parametrize(
    ("received", "specs", "kind", "told"),
    [
        (memoryview(b"abc"), {}, MalformedRequest, "header of"),
        (memoryview(b"\xff" * 64), {}, MalformedRequest, "limit 65528"),
        (blob(b"not json"), {}, MalformedRequest, "no JSON object"),
        (blob(b"[" * 30_000), {}, MalformedRequest, "no JSON object"),
        (blob([1]), {}, MalformedRequest, "no JSON object"),
        (blob(b'{"__metadata__":{},"__metadata__":{}}'), {}, MalformedRequest, "occurs twice"),
        (blob({}), {}, MalformedRequest, "metadata"),
        (blob({"__metadata__": META | {"other": "1"}}), {}, MalformedRequest, "metadata"),
        (blob({"__metadata__": {"synapse": "{}"}}), {}, MalformedRequest, "Push: sample: Field required"),
        (blob({"__metadata__": {"synapse": '{"sample":"1"}'}}), {}, MalformedRequest, "valid integer"),
        (blob({"__metadata__": {"synapse": '{"sample":1,"x":2}'}}), {}, MalformedRequest, "Push: x: Extra"),
        (blob({"__metadata__": {"synapse": "\ud800"}}), {}, MalformedRequest, "Push"),
        (blob({"__metadata__": META, "x": entry("F32", [HUGE], 0, 4 * HUGE)}), X, WrongTensor, "F32"),
        (blob({"__metadata__": META, "x": entry("F32", [2], 0, HUGE)}), X, WrongTensor, "in 8 bytes"),
        (
            blob({"__metadata__": META, "x": entry("F32", [2], 0, 8)}, b"1234567"),
            X,
            MalformedRequest,
            "received",
        ),
        (
            blob({"__metadata__": META, "x": entry("F32", [2], 0, 8)}, b"1" * 9),
            X,
            MalformedRequest,
            "received",
        ),
        (
            blob({"__metadata__": META, "x": entry("F32", [2], 8, 16)}, b"1" * 16),
            X,
            MalformedRequest,
            "offset 8",
        ),
        (
            blob({"__metadata__": META, "x": entry("F32", [2], 0, 8), "y": entry("F32", [2], 4, 12)}, b"1" * 12),
            XY,
            MalformedRequest,
            "'y' at offset 4, expected at 8",
        ),
        (
            blob({"__metadata__": META, "x": entry("F32", [2], -8, 0)}),
            X,
            MalformedRequest,
            "bad shape or offsets",
        ),
        (blob({"__metadata__": META, "x": entry("F32", [True, 2], 0, 8)}), X, MalformedRequest, "bad shape"),
        (blob({"__metadata__": META, "x": {"dtype": "F32"}}), X, MalformedRequest, "entry of tensor 'x'"),
        (blob({"__metadata__": META, "x": 3}), X, MalformedRequest, "entry of tensor 'x'"),
    ],
)
def test_broken_blobs_are_refused(
    received: memoryview, specs: dict[str, TensorSpec], kind: type[Refused], told: str
) -> None:
    with pytest.raises(kind) as caught:
        synapse.decode(Push, received, specs)
    assert told in caught.value.message
    assert "\n" not in caught.value.message


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused_and_never_crash(data: bytes) -> None:
    with pytest.raises(Refused):
        synapse.decode(Push, memoryview(data), SPECS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {"__metadata__": st.just(META) | json_values},
        optional={
            name: json_values
            | st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["BF16", "I64", "?"]),
                    "shape": st.lists(st.integers(-1, 7), max_size=3) | json_values,
                    "data_offsets": st.lists(st.integers(-1, 90), min_size=2, max_size=2) | json_values,
                }
            )
            for name in ("x", "ids", "y")
        },
    ),
    st.binary(max_size=90),
)
def test_random_headers_are_refused_or_exact(header: dict[str, object], payload: bytes) -> None:
    try:
        _, got = synapse.decode(Push, blob(header, payload), SPECS)
    except Refused:
        return
    assert synapse.specs_of(got) == SPECS


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_one_flipped_byte_never_crashes(position: int, value: int) -> None:
    received = joined(Push(sample=1), tensors())
    received[position % len(received)] = value
    try:
        _, got = synapse.decode(Push, memoryview(received), SPECS)
    except Refused:
        return
    assert synapse.specs_of(got) == SPECS


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_that_are_not_finite_are_refused(bad: float, dtype: torch.dtype) -> None:
    x = torch.zeros(100, dtype=dtype)
    x[41] = bad
    with pytest.raises(NotFinite, match="'x' has 1 of 100 elements"):
        synapse.require_finite({"ok": torch.ones(3), "x": x})


def test_the_largest_finite_values_pass() -> None:
    extreme = torch.finfo(torch.bfloat16).max
    synapse.require_finite({"x": torch.full((9,), extreme).bfloat16(), "i": torch.arange(3), "e": torch.empty(0)})


def test_what_cannot_be_sent_is_the_callers_error() -> None:
    with pytest.raises(ValueError, match=r"'c'.*cannot be sent"):
        synapse.encode(Push(sample=1), {"c": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="limit 65536; send long fields as a tensor"):
        synapse.encode(Push(sample=1, version="v" * 70_000), {})
