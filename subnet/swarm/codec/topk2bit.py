"""`topk2bit`: of every 4,096 values the 64 largest, each in two bits, as SparseLoCo sends them (arXiv 2508.15706).

A chunk of m values (4,096; the last one may be shorter) sends its ceil(m / 64) largest by magnitude, the lower index
first among equals. Each is ± one of the chunk's two levels. Together n values send K = ceil(n / 64).

Layout, little-endian, least significant bit first, each part filled up to a byte with zeros:

    levels     2 bfloat16 per chunk: low, high
    highs      2K bits: bit (index div 64) + j is set for the j-th value sent
    lows       6 bits per value sent: index mod 64
    codes      2 bits per value sent: bit 0 = negative, bit 1 = high level

The highs and lows are Elias-Fano's code of an ascending sequence: 8 bits an index where a plain one takes 12, at a
size that depends on n alone. 84 bytes per chunk are 195 times below fp32. What a payload can say, it can say in one
way: indices ascend, levels with low < high are both in use, equal ones leave bit 1 clear, zero has no sign.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subnet.swarm.codec.base import CodecName, PayloadError, Raw, check_reach, check_size, host_values

CHUNK = 4096
SPAN = 64
"""One value in 64 is sent; also the range of the low part of an index."""
TOP = CHUNK // SPAN
LOW_BITS = 6
BLOCK = 64
"""Chunks per pass: temporaries of 1 MiB stay in the cache, whatever the size of the stage."""
INFINITE = 0x7F80
"""bfloat16's first bit pattern that is no finite magnitude; it rises from 0 with the magnitude."""

Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]
Levels = NDArray[np.uint16]


class TopK2Bit:
    """195 times below fp32. The error goes into the feedback, see `feedback`."""

    name: CodecName = "topk2bit"
    error_feedback = True

    def encode(self, delta: Tensor) -> bytes:
        values = host_values(delta)
        count = len(values)
        chosen: list[Indices] = []
        levels: list[Levels] = []
        codes: list[NDArray[np.uint8]] = []
        whole = count - count % CHUNK
        starts = [*range(0, whole, BLOCK * CHUNK), whole]
        for start, end in zip(starts, [*starts[1:], count], strict=True):
            if start == end:
                continue
            rows = values[start:end].reshape(-1, min(CHUNK, end - start))
            index = select(rows)
            level, code = quantise(np.take_along_axis(rows, index, axis=1))
            offsets = np.arange(start, end, rows.shape[1], dtype=np.int64)
            chosen.append((index + offsets[:, None]).ravel())
            levels.append(level.ravel())
            codes.append(code.ravel())
        index = np.concatenate(chosen)
        highs = np.zeros(2 * len(index), dtype=np.bool_)
        highs[index // SPAN + np.arange(len(index))] = True
        return b"".join(
            (
                np.concatenate(levels).astype("<u2", copy=False).tobytes(),
                np.packbits(highs, bitorder="little").tobytes(),
                _pack((index % SPAN).astype(np.uint8), LOW_BITS),
                _pack(np.concatenate(codes), 2),
            )
        )

    def decode(self, payload: Raw, count: int, *, limit: float = math.inf) -> Tensor:
        check_size(payload, count, self.payload_bytes(count))
        sent, ends = -(-count // SPAN), _ends(count)
        raw = np.frombuffer(payload, dtype=np.uint8)
        levels = raw[: ends[0]].view("<u2").reshape(-1, 2)
        index = _indices(raw[ends[0] : ends[1]], raw[ends[1] : ends[2]], sent, count)
        codes = _unpack(raw[ends[2] :], sent, 2)
        negative, high = (codes & 1).astype(np.bool_), (codes >> 1).astype(np.bool_)
        _check_levels(levels, high, limit)
        bits = levels.reshape(-1)[np.arange(sent) // TOP * 2 + high].astype(np.uint32) << 16
        if (negative & (bits == 0)).any():
            raise PayloadError("payload has a negative zero, which no encoder writes: its source is left out")
        bits |= negative.astype(np.uint32) << 31
        values = np.zeros(count, dtype=np.float32)
        values[index] = bits.view(np.float32)
        return torch.from_numpy(values)

    def payload_bytes(self, count: int) -> int:
        return _ends(count)[-1]


def select(rows: NDArray[np.float32]) -> Indices:
    """Ascending indices (chunks, k) of each row's k = ceil(m / 64) largest magnitudes; lower indices win ties."""
    chunks, m = rows.shape
    k = -(-m // SPAN)
    magnitudes = np.abs(rows)
    least = np.partition(magnitudes, m - k, axis=1)[:, m - k, None]
    taken = magnitudes >= least
    flat = np.flatnonzero(taken)
    if len(flat) > chunks * k:
        above = magnitudes > least
        places = k - above.sum(axis=1, keepdims=True)
        ties = taken & ~above
        flat = np.flatnonzero(above | (ties & (ties.cumsum(axis=1) <= places)))
    index: Indices = flat.reshape(chunks, k) % m
    return index


def quantise(values: NDArray[np.float32]) -> tuple[Levels, NDArray[np.uint8]]:
    """Two levels (chunks, 2) as bfloat16 bits, and codes (chunks, k), for the values sent (chunks, k).

    The levels are the two means that leave the least squared error: of the k - 1 ways to cut the sorted magnitudes
    in two, the best is found by prefix sums in fp64. Where one level does as well, both are the mean.
    """
    magnitudes = np.abs(values).astype(np.float64)
    k = values.shape[1]
    mean = magnitudes.mean(axis=1)
    low, high = mean, mean
    if k > 1:
        below = np.sort(magnitudes, axis=1).cumsum(axis=1)
        total, cut, sizes = below[:, -1:], below[:, :-1], np.arange(1.0, k)
        gain = cut * (cut / sizes) + (total - cut) * ((total - cut) / (k - sizes))
        best = gain.argmax(axis=1)
        first = np.take_along_axis(cut, best[:, None], axis=1)[:, 0]
        low, high = first / (best + 1), (total[:, 0] - first) / (k - 1 - best)
    levels = _bf16(np.stack((low, high), axis=1))
    low, high = _fp32(levels).astype(np.float64).T
    is_high = magnitudes - low[:, None] > high[:, None] - magnitudes
    ups = is_high.sum(axis=1)
    single = (levels[:, 0] >= levels[:, 1]) | (ups == 0) | (ups == k)
    levels[single] = _bf16(mean[single])[:, None]
    is_high[single] = False
    codes = is_high.astype(np.uint8) << 1
    nonzero = np.where(is_high, levels[:, 1:], levels[:, :1]) > 0
    codes |= (values < 0) & nonzero
    return levels, codes


def _indices(highs: NDArray[np.uint8], lows: NDArray[np.uint8], sent: int, count: int) -> Indices:
    """The ascending indices of all values sent, (sent,). Raises `PayloadError`."""
    places = np.flatnonzero(_unpack(highs, 2 * sent, 1))
    order = np.arange(sent)
    if len(places) != sent:
        raise PayloadError(
            f"payload names {len(places)} indices where {sent} of {count} values are sent: it is refused"
        )
    index: Indices = (places - order) * SPAN + _unpack(lows, sent, LOW_BITS)
    if not (np.diff(index) > 0).all() or index[-1] >= count or not (index // CHUNK == order // TOP).all():
        raise PayloadError(
            f"payload's indices do not ascend, leave their chunk of {CHUNK} or pass {count} values: it is refused"
        )
    return index


def _check_levels(levels: Levels, high: Flags, limit: float) -> None:
    """Levels (chunks, 2) are finite, ordered and used as the module's docstring says. Raises `PayloadError`."""
    top = int(levels.max())
    check_reach(float(_fp32(np.array([top], dtype=np.uint16))[0]) if top < INFINITE else math.nan, limit)
    ups = np.add.reduceat(high, np.arange(0, len(high), TOP), dtype=np.int64)
    sizes = np.minimum(TOP, len(high) - np.arange(0, len(high), TOP))
    two = levels[:, 0] < levels[:, 1]
    if not np.where(two, (ups > 0) & (ups < sizes), (levels[:, 0] == levels[:, 1]) & (ups == 0)).all():
        raise PayloadError("payload has levels out of order or not in use: its source is left out of the merge")


def _ends(count: int) -> tuple[int, int, int, int]:
    """Where levels, highs, lows and codes end in the payload of `count` values."""
    sent = -(-count // SPAN)
    parts = (4 * -(-count // CHUNK), -(-2 * sent // 8), -(-LOW_BITS * sent // 8), -(-2 * sent // 8))
    return parts[0], sum(parts[:2]), sum(parts[:3]), sum(parts)


def _pack(numbers: NDArray[np.uint8], bits: int) -> bytes:
    """The `bits` low bits of each number, end to end."""
    spread = np.unpackbits(numbers[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(spread, bitorder="little").tobytes()


def _unpack(raw: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint8]:
    """`count` numbers of `bits` bits each. Raises `PayloadError` if what fills the last byte is not zero."""
    spread = np.unpackbits(raw, bitorder="little")
    if spread[count * bits :].any():
        raise PayloadError("payload has bits set after the end of a part: it is refused")
    return np.packbits(spread[: count * bits].reshape(count, bits), axis=1, bitorder="little")[:, 0]


def _bf16(values: NDArray[np.float64]) -> Levels:
    """Magnitudes rounded to the nearest bfloat16, ties to even, as bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _fp32(levels: Levels) -> NDArray[np.float32]:
    """The values that bfloat16 bits stand for, exactly."""
    return (levels.astype(np.uint32) << 16).view(np.float32)
