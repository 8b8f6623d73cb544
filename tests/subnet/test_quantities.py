"""Quantities as a person reads them."""

import pytest

from subnet.quantities import duration, size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (2.5e9, "2.5 GB"), (7.1e15, "7,100.0 TB")],
)
def test_sizes_read_well(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "40 ms"), (9.4, "9.4 s"), (119, "119 s"), (3_600, "60 min"), (7_200, "2.0 h"), (864_000, "10.0 days")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
