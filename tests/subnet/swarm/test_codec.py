"""Every codec keeps its bound and its size, and a decoder takes one form of a payload and refuses all others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet.swarm.codec import Bf16, Codec, DeltaError, Int8, PayloadError, TopK2Bit, codec_of
from subnet.swarm.codec.base import LARGEST
from subnet.swarm.codec.int8 import GROUP

CODECS = [TopK2Bit(), Int8(), Bf16()]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
lengths = st.one_of(st.integers(1, 200), st.integers(4000, 4200), st.integers(8100, 9000))
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-42, 1e-30, 1e-6, 1.0, 1e30])


def heavy(count: int, seed: int, scale: float = 1e-3) -> torch.Tensor:
    """Heavy-tailed values as a pseudo-gradient has them."""
    generator = torch.Generator().manual_seed(seed)
    tail = torch.randn(count, generator=generator) * torch.randn(count, generator=generator) ** 2
    return tail * scale


@each_codec
@settings(max_examples=50, deadline=None)
@given(count=lengths, seed=seeds, scale=scales)
def test_a_payload_has_its_size_and_one_form(codec: Codec, count: int, seed: int, scale: float) -> None:
    payload = codec.encode(heavy(count, seed, scale))
    assert len(payload) == codec.payload_bytes(count)
    decoded = codec.decode(payload, count)
    assert decoded.shape == (count,)
    assert decoded.dtype == torch.float32
    assert torch.equal(codec.decode(memoryview(bytearray(payload)), count), decoded)


@each_codec
@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=seeds)
def test_shards_are_payloads_of_their_own(codec: Codec, data: st.DataObject, seed: int) -> None:
    delta = heavy(5000, seed)
    start = data.draw(st.integers(0, 4999))
    end = data.draw(st.integers(start + 1, 5000))
    shard = codec.encode(delta[start:end])
    assert shard == codec.encode(delta[start:end].clone())
    assert len(shard) == codec.payload_bytes(end - start)


@settings(max_examples=50, deadline=None)
@given(count=lengths, seed=seeds, scale=scales)
def test_bf16_rounds_each_value(count: int, seed: int, scale: float) -> None:
    delta = heavy(count, seed, scale)
    assert torch.equal(Bf16().decode(Bf16().encode(delta), count), delta.bfloat16().float())


@settings(max_examples=50, deadline=None)
@given(count=lengths, seed=seeds, scale=scales)
def test_int8_is_within_half_a_step_of_each_value(count: int, seed: int, scale: float) -> None:
    delta = heavy(count, seed, scale)
    error = (Int8().decode(Int8().encode(delta), count) - delta).abs().double()
    for values, errors in zip(delta.split(GROUP), error.split(GROUP), strict=True):
        step = float(values.abs().max()) / 127
        assert float(errors.max()) <= (0.5001 * step if step > 1.2e-38 else 127 * 1.2e-38)


@each_codec
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("place", [0, 4096, 4999])
def test_what_is_not_finite_is_not_encoded(codec: Codec, value: float, place: int) -> None:
    delta = heavy(5000, 1)
    delta[place] = value
    with pytest.raises(DeltaError, match="sends nothing this round"):
        codec.encode(delta)


@each_codec
@pytest.mark.parametrize("delta", [torch.zeros(0), torch.zeros(3, 4), torch.zeros(3, dtype=torch.float64)])
def test_only_flat_fp32_is_encoded(codec: Codec, delta: torch.Tensor) -> None:
    with pytest.raises(DeltaError, match=r"float32 \(n,\)"):
        codec.encode(delta)


@each_codec
def test_the_largest_values_survive(codec: Codec) -> None:
    delta = torch.tensor([LARGEST, -LARGEST, 0.0])
    decoded = codec.decode(codec.encode(delta), 3)
    assert float(decoded[0]) == pytest.approx(LARGEST, rel=1e-6)
    assert bool(torch.isfinite(decoded).all())


@each_codec
@pytest.mark.parametrize("count", [1, 63, 64, 65, 4096, 4097])
def test_zeros_come_back_as_zeros(codec: Codec, count: int) -> None:
    for zero in (0.0, -0.0):
        decoded = codec.decode(codec.encode(torch.full((count,), zero)), count)
        assert torch.equal(decoded, torch.zeros(count))


@each_codec
def test_another_size_is_refused(codec: Codec) -> None:
    payload = codec.encode(heavy(5000, 2))
    for wrong in (payload[:-1], payload + b"\0", b"", payload[1:-1]):
        with pytest.raises(PayloadError, match="bytes where 5000 values need"):
            codec.decode(wrong, 5000)
    with pytest.raises(PayloadError, match="bytes where"):
        codec.decode(payload, 9000)


@each_codec
def test_a_value_above_the_limit_is_refused(codec: Codec) -> None:
    delta = heavy(5000, 3)
    payload = codec.encode(delta)
    top = float(codec.decode(payload, 5000).abs().max())
    codec.decode(payload, 5000, limit=top)
    with pytest.raises(PayloadError, match="where the limit is"):
        codec.decode(payload, 5000, limit=top * 0.999)


@each_codec
@settings(max_examples=50, deadline=None)
@given(count=st.one_of(st.integers(1, 300), st.integers(4090, 4200)), seed=seeds, data=st.data())
def test_flipped_bits_are_refused_or_harmless(codec: Codec, count: int, seed: int, data: st.DataObject) -> None:
    payload = bytearray(codec.encode(heavy(count, seed)))
    for _ in range(data.draw(st.integers(1, 4))):
        bit = data.draw(st.integers(0, 8 * len(payload) - 1))
        payload[bit // 8] ^= 1 << bit % 8
    refused_or_within(codec, bytes(payload), count)


@each_codec
@settings(max_examples=50, deadline=None)
@given(count=st.one_of(st.integers(1, 300), st.integers(4090, 4200)), seed=seeds)
def test_noise_is_refused_or_harmless(codec: Codec, count: int, seed: int) -> None:
    noise = np.random.default_rng(seed).bytes(codec.payload_bytes(count))
    refused_or_within(codec, noise, count)


def refused_or_within(codec: Codec, payload: bytes, count: int) -> None:
    try:
        decoded = codec.decode(payload, count, limit=1.0)
    except PayloadError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert decoded.shape == (count,)
    assert bool((decoded.abs() <= 1.0).all())


@each_codec
def test_a_value_that_is_not_finite_is_refused(codec: Codec) -> None:
    """The first bytes hold a bfloat16 (levels, values) or an fp32 (scales)."""
    payload = codec.encode(heavy(64, 4))
    wide = codec.name == "int8"
    for bits in (0x7F800000, 0xFF800000, 0x7FC00000):
        bad = bits.to_bytes(4, "little") if wide else (bits >> 16).to_bytes(2, "little")
        with pytest.raises(PayloadError):
            codec.decode(bad + payload[len(bad) :], 64)


@pytest.mark.parametrize(
    ("scale", "step"),
    [(1.0, 126), (1.0, -128), (1.0, 0), (0.0, 127), (0.0, 1), (-1.0, 127), (-0.0, 0), (1e-39, 127)],
)
def test_int8_refuses_other_forms_of_a_group(scale: float, step: int) -> None:
    payload = np.array([scale], dtype="<f4").tobytes() + np.array([step, 0, 0], dtype=np.int8).tobytes()
    with pytest.raises(PayloadError, match="group"):
        Int8().decode(payload, 3)
    with pytest.raises(PayloadError, match="infinite"):
        Int8().decode(np.array([3e38], dtype="<f4").tobytes() + bytes((127, 0, 0)), 3)


def test_codecs_have_the_names_of_the_manifest() -> None:
    assert [codec_of(codec.name).name for codec in CODECS] == ["topk2bit", "int8", "bf16"]
    assert [codec.error_feedback for codec in CODECS] == [True, False, False]
    with pytest.raises(ValueError, match="codec is 'zip'"):
        codec_of("zip")
