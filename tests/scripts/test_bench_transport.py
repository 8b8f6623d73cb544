"""The transport benchmark: what its ratios are of, and that what cannot be measured is not made up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.bench.transport import SIZES, Ends, Sample, Unmeasured, figures, peer_python, table


def samples(*, orion: list[float], gloo: list[float]) -> dict[tuple[str, str], list[Sample]]:
    return {
        (name, size): [Sample(seconds, seconds / 2) for seconds in rounds]
        for name, rounds in (("orion", orion), ("gloo", gloo))
        for size in SIZES
    }


def test_a_ratio_is_taken_within_rounds() -> None:
    # the machine is ten times slower in the second round, and both with it
    content = figures(samples(orion=[1.0, 10.0, 1.0], gloo=[0.5, 5.0, 0.5]), {})
    assert content["ratio_vs_gloo"] == 0.5


def test_the_headline_is_the_worst_large_message() -> None:
    measured = samples(orion=[1.0], gloo=[0.8])
    measured["gloo", "64KiB"] = [Sample(0.1, 0.1)]
    measured["gloo", "16MiB"] = [Sample(0.7, 0.7)]
    content = figures(measured, {})
    assert content["ratio_vs_gloo"] == 0.7
    assert content["ratio_vs_gloo_by_size"] == {"64KiB": 0.1, "2MiB": 0.8, "16MiB": 0.7}


def test_what_was_not_measured_has_no_ratio() -> None:
    content = figures(samples(orion=[1.0], gloo=[1.0]), {"bittensor10": "not measured: no registry"})
    assert content["ratio_vs_bittensor10"] is None
    assert content["ratio_vs_bittensor10_by_size"] == dict.fromkeys(SIZES)
    assert "not measured: no registry" in table(content)


def test_without_a_registry_the_peer_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], **_options: object) -> subprocess.CompletedProcess[str]:
        found = "venv" in command
        return subprocess.CompletedProcess(command, 0 if found else 1, "", "" if found else "ERROR: No matching\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(Unmeasured, match=r"not measured: -m pip install failed \(ERROR: No matching\); is a package"):
        peer_python(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.alone
@pytest.mark.parametrize("name", ["orion", "hashed", "gloo"])
async def test_both_ends_run(name: str) -> None:
    async with Ends(name, (sys.executable, "-m", "scripts.bench.transport_ends", name)) as ends:
        sample = await ends.measure(SIZES["64KiB"], 3, 2)
    assert sample.cpu_seconds > 0
    assert 0 < sample.seconds < 60
