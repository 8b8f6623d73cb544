"""What `orion localnet` says of options that cannot be: one line, before anything starts."""

from pathlib import Path

import pytest

from scripts.cli import main


def localnet(out: Path, *flags: str) -> int:
    """The command's exit status."""
    try:
        return main(["localnet", "--out", str(out), *flags])
    except SystemExit as stopped:  # of argparse
        return int(stopped.code or 0)


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--stages", "0"], 2, "--stages 0"),
        (["--stages", "9"], 2, "8 layers"),
        (["--model", "nono"], 2, "did you mean 'nano'"),
        (["--rounds", "x"], 2, "invalid int value"),
        (["--round-seconds", "3"], 2, "--round-seconds 3"),
        (["--round-seconds", "nan"], 2, "--round-seconds nan"),
        (["--block-time", "0"], 2, "--block-time 0"),
        (["--block-time", "5", "--round-seconds", "30"], 2, "no room for its deadlines"),
        (["--kill", "miner-3"], 2, "miner:3@round1"),
        (["--kill", "miner:8@round1"], 2, "the last miner is 7"),
        (["--join", "1@round3"], 2, "after the last round, 2"),
        (["--freeze", "stage:0@round1:x"], 2, ":SECONDS"),
        (["--stages", "0", "--chaos", "1"], 2, "--stages 0 is outside"),
        (["--codec", "zip"], 2, "is unknown: did you mean"),
        (["--optimizer", "sgd"], 2, "is unknown: did you mean"),
        (["--accumulation", "0"], 2, "--accumulation 0"),
        (["--device", "gpu"], 2, "--device 'gpu' will not do"),
        (["--device", "cuda:99"], 1, "--device cuda:99: torch sees"),
        (["--latency", "50"], 2, "--latency '50' is not of the form 50ms"),
        (["--bandwidth", "fast"], 2, "200mbit"),
        (["--loss", "0.5"], 2, "0.5%"),
        (["--adversary", "signflip"], 2, "did you mean 'sign-flip'"),
        (["--adversary", "noise:9"], 2, "uid 9 is no miner"),
    ],
)
def test_bad_options_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, words: str
) -> None:
    assert localnet(tmp_path / "run", *flags) == status
    assert words in "".join(capsys.readouterr())


def test_a_full_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("x")
    assert localnet(tmp_path) == 1
    assert "is not empty" in "".join(capsys.readouterr())
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
