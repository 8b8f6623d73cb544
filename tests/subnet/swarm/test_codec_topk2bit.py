"""`topk2bit`: the largest values, in one order, at the least error two levels allow, and in one form."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet.swarm.codec import PayloadError, TopK2Bit
from subnet.swarm.codec.topk2bit import CHUNK, SPAN, quantise, select

CODEC = TopK2Bit()
seeds = st.integers(0, 2**32 - 1)
few_values = st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0]), min_size=1, max_size=400)


def reference(values: list[float]) -> list[int]:
    """The definition: sort by magnitude, then by index."""
    order = sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))
    return sorted(order[: -(-len(values) // SPAN)])


@settings(max_examples=50, deadline=None)
@given(few_values)
def test_ties_go_to_the_lower_index(values: list[float]) -> None:
    assert select(np.array([values], dtype=np.float32))[0].tolist() == reference(values)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 10_000), seed=seeds)
def test_each_chunk_sends_its_largest(count: int, seed: int) -> None:
    delta = torch.from_numpy(np.random.default_rng(seed).standard_t(3, count).astype(np.float32))
    decoded = CODEC.decode(CODEC.encode(delta), count)
    for values, sent in zip(delta.split(CHUNK), decoded.split(CHUNK), strict=True):
        chosen = sent.nonzero()[:, 0].tolist()
        assert chosen == reference(values.tolist())
        assert bool((sent[chosen].sign() == values[chosen].sign()).all())
        assert len(sent[chosen].abs().unique()) <= 2
        assert float((sent - values).norm()) < float(values.norm())


@pytest.mark.parametrize("count", [*range(4096, 12_400, 61), 10**6, 6_480_000_000])
def test_it_is_a_hundred_times_below_fp32(count: int) -> None:
    assert 4 * count / CODEC.payload_bytes(count) >= 100


def test_the_ratio_of_whole_chunks() -> None:
    assert CODEC.payload_bytes(CHUNK) == 84
    assert 4 * CHUNK / 84 > 195


@settings(max_examples=50, deadline=None)
@given(seed=seeds, k=st.integers(2, 12))
def test_the_levels_leave_the_least_error(seed: int, k: int) -> None:
    """Against every way to assign k values to two levels (the best one cuts the sorted magnitudes)."""
    values = np.random.default_rng(seed).standard_t(2, (1, k)).astype(np.float32)
    magnitudes = np.abs(values[0]).astype(np.float64)
    best = min(
        sum(float(((part - part.mean()) ** 2).sum()) for part in (magnitudes[mask], magnitudes[~mask]) if part.size)
        for mask in (np.array([word >> i & 1 for i in range(k)], dtype=bool) for word in range(2 ** (k - 1)))
    )
    levels, codes = quantise(values)
    exact = (levels.astype(np.uint32) << 16).view(np.float32)[0].astype(np.float64)
    error = float(((magnitudes - exact[codes[0] >> 1]) ** 2).sum())
    rounding = 2**-16 * float((magnitudes**2).sum())  # bfloat16 moves a level by at most 2⁻⁸ of it
    assert error <= best + rounding


def test_the_levels_beat_one_level_and_bins_of_six_sigma() -> None:
    values = np.random.default_rng(0).standard_t(3, (64, 4096)).astype(np.float32)
    sent = np.take_along_axis(values, select(values), axis=1)
    levels, codes = quantise(sent)
    exact = np.take_along_axis((levels.astype(np.uint32) << 16).view(np.float32), (codes >> 1).astype(np.int64), axis=1)
    magnitudes = np.abs(sent)
    deviation = sent.std(axis=1, keepdims=True)
    others = (
        magnitudes.mean(axis=1, keepdims=True),
        np.where(magnitudes < 1.5 * deviation, 0.75 * deviation, 2.25 * deviation),
    )
    error = ((magnitudes - exact) ** 2).sum()
    assert all(error < 0.8 * ((magnitudes - other) ** 2).sum() for other in others)


def test_encoding_is_the_same_every_time_and_block_by_block() -> None:
    delta = torch.randn(70 * CHUNK + 100, generator=torch.Generator().manual_seed(0))
    payload = CODEC.encode(delta)
    assert payload == CODEC.encode(delta.clone())
    whole = CODEC.decode(payload, delta.numel())
    for start, end in pairwise([0, CHUNK, 66 * CHUNK, delta.numel()]):
        assert torch.equal(CODEC.decode(CODEC.encode(delta[start:end]), end - start), whole[start:end])


def test_the_layout_is_fixed() -> None:
    delta = torch.zeros(130)
    delta[3], delta[70], delta[129] = -1.0, 2.0, 1.0
    payload = bytes.fromhex("803f 0040  15  831100  09")  # levels 1 and 2, spans 0 1 2, lows 3 6 1, codes 1 2 0
    assert CODEC.encode(delta) == payload
    assert torch.equal(CODEC.decode(payload, 130), delta)


def parts(count: int) -> tuple[bytearray, int, int, int]:
    """A payload and where its highs, lows and codes begin."""
    delta = torch.from_numpy(np.random.default_rng(1).standard_t(3, count).astype(np.float32))
    sent, chunks = -(-count // SPAN), -(-count // CHUNK)
    highs = 4 * chunks
    lows = highs + -(-2 * sent // 8)
    return bytearray(CODEC.encode(delta)), highs, lows, lows + -(-6 * sent // 8)


def refused(payload: bytes | bytearray, count: int, match: str) -> None:
    with pytest.raises(PayloadError, match=match):
        CODEC.decode(payload, count)


def test_indices_must_ascend() -> None:
    """Two values in the same span of 64, with lows 5 and 9; then 9 and 5, then 5 and 5."""
    delta = torch.zeros(128)
    delta[5], delta[9] = 1.0, 2.0
    payload = bytearray(CODEC.encode(delta))
    lows = 4 + 1
    assert payload[lows : lows + 2] == (5 | 9 << 6).to_bytes(2, "little")
    payload[lows : lows + 2] = (9 | 5 << 6).to_bytes(2, "little")
    refused(payload, 128, "do not ascend")
    payload[lows : lows + 2] = (5 | 5 << 6).to_bytes(2, "little")
    refused(payload, 128, "do not ascend")


def test_indices_must_stay_below_the_count_and_in_their_chunk() -> None:
    delta = torch.zeros(100)
    delta[98:] = 1.0
    payload = bytearray(CODEC.encode(delta))
    payload[5:7] = (34 | 36 << 6).to_bytes(2, "little")  # 98 and 100
    refused(payload, 100, "pass 100 values")
    delta = torch.zeros(2 * CHUNK)
    delta[:64], delta[CHUNK + 64 : CHUNK + 128] = 1.0, 1.0
    payload = bytearray(CODEC.encode(delta))
    assert payload[8:24] == b"\xff" * 8 + bytes(8)  # 64 indices in the first span of the first chunk
    payload[15], payload[24] = 0x7F, payload[24] | 1  # the 64th now opens the second chunk
    refused(payload, 2 * CHUNK, "leave their chunk")


def test_the_number_of_indices_is_fixed() -> None:
    payload, highs, _, _ = parts(CHUNK)
    more = bytearray(payload)
    more[highs + 3] = 0xFF if payload[highs + 3] != 0xFF else 0
    refused(more, CHUNK, "where 64 of 4096 values are sent")


def test_filling_bits_are_zero() -> None:
    for place in (4, 5, 6):  # highs, lows and codes of one value sent
        payload = bytearray(CODEC.encode(torch.tensor([1.0])))
        payload[place] |= 0x80
        refused(payload, 1, "after the end of a part")


@pytest.mark.parametrize(
    ("low", "high", "codes"),
    [
        (0x3F80, 0x3F00, 0b0010),  # low above high
        (0x3F80, 0x4000, 0b0000),  # high not in use
        (0x3F80, 0x4000, 0b1010),  # low not in use
        (0x3F80, 0x3F80, 0b0010),  # two names for one level
        (0xBF80, 0x3F80, 0b0010),  # a negative level
        (0x3F80, 0x7F80, 0b0010),  # infinite
        (0x7FC0, 0x7FC0, 0b0000),  # not a number
        (0x0000, 0x3F80, 0b0110),  # a negative zero
    ],
)
def test_levels_have_one_form(low: int, high: int, codes: int) -> None:
    sound = CODEC.encode(torch.tensor([1.0, 2.0] + [0.0] * 126))
    assert sound == b"\x80\x3f\x00\x40" + sound[4:7] + b"\x08"
    levels = low.to_bytes(2, "little") + high.to_bytes(2, "little")
    refused(levels + sound[4:7] + bytes([codes]), 128, "levels|infinite|negative zero")
