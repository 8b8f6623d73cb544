"""A delta opens to the weights it was made from, to the bit, and to nothing larger."""

import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from subnet.trust.delta import DeltaFormatError, decode, encode, limit_of

BITS = arrays("uint32", st.integers(1, 200))


@given(st.data())
def test_any_bits_come_back(data: st.DataObject) -> None:
    raw = data.draw(BITS)
    base = data.draw(arrays("uint32", raw.shape))
    weights, known = (torch.from_numpy(bits.view("float32")) for bits in (raw, base))
    packed = encode(weights, known)
    assert len(packed) <= limit_of(weights.numel())
    assert (decode(packed, known, limit_of(weights.numel())).numpy().view("uint32") == raw).all()


def test_small_changes_are_small() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(100_000, generator=generator)
    weights = base + 1e-4 * torch.randn(100_000, generator=generator)
    assert len(encode(weights, base)) < 0.7 * 4 * base.numel()
    assert len(encode(base, base)) < 0.01 * 4 * base.numel()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        zlib.compress(bytes(4 * 100 - 1)),
        zlib.compress(bytes(4 * 100 + 1)),
        zlib.compress(bytes(64 << 20)),
        zlib.compress(bytes(4 * 100))[:-5],
        zlib.compress(bytes(4 * 100)) + b"more",
    ],
    ids=["nothing", "garbage", "short", "long", "bomb", "cut", "tail"],
)
def test_what_is_no_delta_is_refused(data: bytes) -> None:
    with pytest.raises(DeltaFormatError):
        decode(data, torch.zeros(100), limit_of(100) + (1 << 20))


def test_what_is_too_long_is_not_opened() -> None:
    with pytest.raises(DeltaFormatError, match="limit 10"):
        decode(encode(torch.ones(100), torch.zeros(100)), torch.zeros(100), 10)


@given(st.binary(max_size=200))
def test_garbage_is_a_typed_refusal(data: bytes) -> None:
    with pytest.raises(DeltaFormatError):
        decode(data, torch.zeros(50), 1000)


def test_other_shapes_are_refused() -> None:
    for weights, base in (
        (torch.zeros(3), torch.zeros(4)),
        (torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)),
        (torch.zeros(2, 2), torch.zeros(2, 2)),
    ):
        with pytest.raises(DeltaFormatError):
            encode(weights, base)
