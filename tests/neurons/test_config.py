"""The flags of a neuron: an emulated link is read, or named with the form it must have."""

import pytest

from neurons.config import parse
from subnet.quantities import parse_size, written
from subnet.transport.shaping import Link

NEEDED = ["--wallet", "w", "--hotkey", "h", "--manifest", "m.toml", "--data", "d"]


def test_a_link_is_emulated_only_when_asked_for() -> None:
    assert parse(NEEDED, {}, program="x", description="x").link is None
    flags = [*NEEDED, "--latency", "50ms", "--bandwidth", "200mbit", "--loss", "0.5%"]
    assert parse(flags, {}, program="x", description="x").link == Link(0.05, 200e6, 200e6, 0.005)


@pytest.mark.parametrize(("flag", "text"), [("--latency", "50"), ("--bandwidth", "fast"), ("--loss", "0.5")])
def test_a_bad_link_is_a_usage_error(flag: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([*NEEDED, flag, text], {}, program="x", description="x")
    assert caught.value.code == 2
    assert f"{flag} '{text}' is not of the form" in capsys.readouterr().err


def test_a_ring_is_read_in_bytes_or_named_with_its_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(NEEDED, {}, program="x", description="x").ring == 16 * 10**9
    assert parse([*NEEDED, "--ring", "1.5tb"], {}, program="x", description="x").ring == 1_500_000_000_000
    for text in ("16", "-1gb", "16GB", "16 gb", "lots"):
        with pytest.raises(SystemExit):
            parse([*NEEDED, f"--ring={text}"], {}, program="x", description="x")
        assert f"--ring '{text}' is not of the form 16gb" in capsys.readouterr().err


def test_a_device_is_read_or_named_with_what_it_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(NEEDED, {}, program="x", description="x").device == "auto"
    for text in ("cpu", "cuda", "cuda:12"):
        assert parse(NEEDED, {"ORION_DEVICE": text}, program="x", description="x").device == text
    for text in ("gpu", "cuda:", "cuda:-1", "cuda:1 ", "CPU"):
        with pytest.raises(SystemExit) as caught:
            parse([*NEEDED, f"--device={text}"], {}, program="x", description="x")
        assert caught.value.code == 2
        assert f"--device '{text}' will not do: it is none of auto, cpu, cuda" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 999, 10**9, 10**9 + 1, 123_456_789_012, 10**15])
def test_a_size_is_written_as_it_is_read_and_never_smaller(size: int) -> None:
    assert size <= parse_size("ring", written(size)) <= size * 1.1 + 1000


def test_the_help_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], {}, program="x", description="x")
    output = capsys.readouterr().out
    assert "emulated link (for tests)" in output
    assert "--loss 0.5% " in output
