"""Command lines that can never do end with status 2 and one line, before anything is begun."""

import shlex
from pathlib import Path

import pytest

from model.nearest import nearest
from scripts.cli import main

NODE = "--wallet a --hotkey b --manifest m --data d --network x"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("localne", "did you mean 'localnet'"),
        ("localnet --rounds 0", "--rounds 0 is outside 1 to"),
        ("localnet --rounds x", "invalid int value: 'x'"),
        ("localnet --stages 99", "outside 1 to 64"),
        ("localnet --codec zip", "did you mean"),
        ("localnet --optimizr muon", "did you mean --optimizer? orion localnet --help has all"),
        ("localnet now", "'now' is one word too many"),
        ("localnet --device gpu", "cuda:N for card N"),
        ("localnet --round-seconds 1", "outside 10 to"),
        ("localnet --kill miner:3", "miner:3@round1"),
        ("localnet --kill miner:99@round1", "the last miner is 7"),
        ("localnet --latency 50", "not of the form 50ms"),
        ("localnet --bandwidth 0mbit", "more than 0"),
        ("localnet --loss 200%", "0% to 100%"),
        ("localnet --adversary nonsense", "did you mean 'noise'"),
        ("localnet --dashboard 99999", "99999 is above 65535: lower it"),
        ("dashboard", "--run --peers"),
        ("dashboard --run . --gpu a100", "did you mean 'a100-80gb'"),
        ("dashboard --run . --target x", "not of the form 1t"),
        ("dashboard --run . --price 0", "not above 0"),
        ("dashboard --peers nonsense", "http://192.0.2.7:8091"),
        ("export --run . --out x --round -1", "-1 is below 0: raise it"),
        ("generate --from . hi --tokens 0", "--tokens 0 is below 1"),
        ("generate --from . hi --temperature -1", "--temperature -1.0"),
        ("roster", "either --run, or --network"),
        ("roster --run . --at -1", "below 0"),
        ("score explain --uid 3", "give either --run"),
        ("score explain --uid -3 --run .", "below 0"),
        ("calibrate --stages 1", "below 2"),
        ("plan --model nanoo", "did you mean 'nano'"),
        ("plan --gpu zzz", "is unknown: did you mean"),
        ("plan --stages 0", "at least 1"),
        ("plan --stages 99999", "at most --stages 90"),
        ("plan --up 0mbit", "more than 0"),
        ("plan --efficiency 2", "at most 1"),
        ("simulate --minutes 0", "outside 0.001"),
        ("data section . --sequence 0", "below 1"),
        (f"miner {NODE} --port 99999", "--port '99999' will not do"),
        (f"validator {NODE} --ring 5apples", "--ring"),
        ("miner --prot 1", "--prot is no option: did you mean --port? orion miner --help has all"),
        ("miner", "wallet is not set"),
        ("doctor --role x", "There are miner, validator"),
        ("config shw", "did you mean 'show'"),
        ("chain --port 99999", "above 65535"),
        ("chain --block-time 0", "outside 0.01..60"),
        ("events pages", "did you mean 'page'"),
        ("completion fish", "There are bash, zsh"),
        ("alive --port x", "'x' is no port"),
    ],
)
def test_usage_is_refused_in_one_line(
    line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(shlex.split(line))
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    told = (said.out + said.err).splitlines()
    assert status == 2, told
    assert len(told) == 1, told
    assert words in told[0]
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dashboard --run nodir", "give the --out folder"),
        ("monitor --run nodir", "give the --out folder"),
        ("export --run nodir --out x", "cannot be read"),
        ("generate --from nodir hi", "give a folder of `orion export`"),
        ("roster --run nodir", "no chain.url"),
        ("score explain --run nodir --uid 3", "give the folder of a run"),
        ("plan --gpu rtx4090 --recompute keep", "what would fit"),
        ("data show nodir", "orion data prepare"),
        ("localnet --resume nodir", "give the --out folder of one"),
        ("localnet --data nodir", "orion data prepare"),
        ("alive --port 1", "no node answers on port 1"),
        (f"miner {NODE}", "check --manifest"),
    ],
)
def test_what_is_not_there_is_a_failure_in_one_line(
    line: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 1
    said = capsys.readouterr()
    told = [*(said.out + said.err).splitlines(), *caplog.messages]
    assert any(words in each for each in told), told


def test_what_a_word_begins_is_nearer_than_what_looks_like_it() -> None:
    assert nearest("a100", ["h100", "a100-80gb"]) == "a100-80gb"
    assert nearest("nanoo", ["pico", "nano"]) == "nano"
    assert nearest("", ["pico", "nano"]) in {"pico", "nano"}
