"""Quantities as people write them: a number and its unit, 50ms, 200mbit, 16gb."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_SIZES: Final = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_COUNTS: Final = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_BANDWIDTHS: Final = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class QuantityError(ValueError):
    """A quantity that cannot be read, or that makes no sense: one line with the option, the text and the form."""


def parse(option: str, text: str, units: Mapping[str, float], *, example: str) -> float:
    """The number in the base unit. Raises `QuantityError`."""
    match = re.fullmatch(rf"(\d{{1,12}}(?:\.\d{{1,12}})?)({'|'.join(units)})", text, re.ASCII)
    if match is None:
        raise QuantityError(f"--{option} {text!r} is not of the form {example} (units: {', '.join(units)})")
    return float(match[1]) * units[match[2]]


def parse_size(option: str, text: str) -> int:
    """Bytes, from a text like 16gb. Raises `QuantityError`."""
    return int(parse(option, text, _SIZES, example="16gb"))


def parse_count(option: str, text: str) -> float:
    """How many, above 0, from a text like 1t. Raises `QuantityError`."""
    count = parse(option, text, _COUNTS, example="1t")
    if count <= 0:
        raise QuantityError(f"--{option} is {count:g}; it must be above 0: raise it")
    return count


def parse_bandwidth(option: str, text: str) -> float:
    """Bits per second, above 0, from a text like 200mbit. Raises `QuantityError`."""
    bandwidth = parse(option, text, _BANDWIDTHS, example="200mbit")
    if bandwidth <= 0:
        raise QuantityError(f"--{option} {text!r} lets nothing pass: give more than 0, in the form 200mbit")
    return bandwidth


def written(size: int) -> str:
    """A size as `parse_size` reads it, rounded up to a tenth of its unit."""
    unit = next((unit for unit in reversed(_SIZES) if size >= _SIZES[unit]), "kb")
    return f"{-(-size * 10 // _SIZES[unit]) / 10:g}{unit}"


def size(count: float) -> str:
    """Bytes for a person, in units of 1,000: 1.5 MB."""
    return scaled(count, "B", "kB", "MB", "GB", "TB")


def scaled(count: float, first: str, *units: str) -> str:
    """So many of the unit `first` for a person, in the largest unit of which there are one or more; each of `units` is
    1,000 of the one before."""
    unit = first
    for larger in units:
        if count < 1_000:
            break
        count, unit = count / 1_000, larger
    return f"{count:,.0f} {unit}" if unit == first else f"{count:,.1f} {unit}"


def duration(seconds: float) -> str:
    """For a person, in the largest unit of which there are two or more: 1.5 s, 90 s, 12 min, 3.5 h, 4.0 days."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7_200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:,.1f} days"
