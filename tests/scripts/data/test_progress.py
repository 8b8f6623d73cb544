"""What a person sees of a long preparation."""

import io

import pytest
from rich.console import Console

from model.corpora.prepare import Advance
from scripts.data.progress import PrepareView, size


class Clock:
    """Seconds, as the test says."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_lines_come_every_few_seconds_with_the_rate_of_this_run() -> None:
    console, clock = Console(file=io.StringIO(), width=200), Clock()
    with PrepareView(console, plain=False, now=clock) as view:
        view.show(Advance(read=1_000_000, total=4_000_000, documents=10, tokens=500))
        clock.seconds += 4
        view.show(Advance(read=1_500_000, total=4_000_000, documents=15, tokens=750))
        clock.seconds += 6
        view.show(Advance(read=2_000_000, total=4_000_000, documents=20, tokens=1_000))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "going on after 1.0 MB of 4.0 MB",
        "    10.0 s   50.0% of 4.0 MB  100.0 kB/s  20 s left  20 documents  1,000 tokens",
    ]


def test_a_terminal_gets_a_bar() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with PrepareView(console, plain=False) as view:
        view.show(Advance(read=0, total=4_000_000, documents=0, tokens=0))
        view.show(Advance(read=2_000_000, total=4_000_000, documents=20, tokens=1_000))
    assert isinstance(console.file, io.StringIO)
    assert "2.0/4.0 MB" in console.file.getvalue()
    assert "20 documents  1,000 tokens" in console.file.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (2.5e9, "2.5 GB"), (7.1e15, "7,100.0 TB")],
)
def test_sizes_read_well(count: float, text: str) -> None:
    assert size(count) == text
