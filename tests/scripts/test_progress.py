"""What a person sees of a long command."""

import io

from rich.console import Console

from scripts.progress import ProgressView


class Clock:
    """Seconds, as the test says."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_lines_come_every_few_seconds_with_the_rate_of_this_run() -> None:
    console, clock = Console(file=io.StringIO(), width=200), Clock()
    with ProgressView(console, now=clock) as view:
        for seconds, done in ((0, 1_000_000), (4, 1_500_000), (6, 2_000_000), (20, 4_000_000)):
            clock.seconds += seconds
            view.show(done, 4_000_000, "20 documents")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "going on after 1.0 MB of 4.0 MB",
        "    10.0 s  50.0% of 4.0 MB, 100.0 kB/s, 20 s left  20 documents",
        "    30.0 s  4.0 MB in 30 s, 100.0 kB/s  20 documents",
    ]


def test_what_is_done_at_once_says_nothing() -> None:
    console, clock = Console(file=io.StringIO(), width=200), Clock()
    with ProgressView(console, now=clock) as view:
        view.show(0, 10)
        clock.seconds += 1
        view.show(10, 10)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with ProgressView(console) as view:
        view.show(0, 4_000_000)
        view.show(2_000_000, 4_000_000, "20 documents")
    assert isinstance(console.file, io.StringIO)
    assert "50.0% of 4.0 MB" in console.file.getvalue()
    assert "20 documents" in console.file.getvalue()
