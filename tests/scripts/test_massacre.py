"""Everything is killed at random moments, again and again; each time the run goes on from where it was."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from model.checkpoint import load
from neurons.telemetry import NodeFailed, RoundStarted
from scripts.tally import LogFollower
from subnet.manifest import load_manifest

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
SHAPE = ["--model", "pico", "--stages", "2", "--replicas", "2", "--validators", "1"]
FLAGS = [*SHAPE, "--rounds", "400", "--round-seconds", "12"]
STAGES = 2


class Run:
    """A local swarm whose processes can be killed all at once."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._process = self._start("--out", str(out), *FLAGS)

    def _start(self, *flags: str) -> subprocess.Popen[bytes]:
        with (self.out.parent / "output").open("ab") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "scripts.cli", "localnet", "--plain", *flags],
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    def kill(self) -> None:
        everyone = [*psutil.Process(self._process.pid).children(recursive=True), psutil.Process(self._process.pid)]
        for one in everyone:
            one.kill()
        self._process.wait()
        psutil.wait_procs(everyone, timeout=30)

    def resume(self) -> None:
        self._process = self._start("--resume", str(self.out))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    @property
    def output(self) -> str:
        return (self.out.parent / "output").read_text()[-3000:]

    def trained(self) -> set[int]:
        """Rounds that a miner began to train: nodes that start after a round has begun sit it out."""
        return {event.round for event in self._events() if isinstance(event, RoundStarted) and event.stage is not None}

    def round(self) -> int:
        """The newest round that a miner trains in, -1 before the first."""
        return max(self.trained(), default=-1)

    def failures(self) -> list[str]:
        return [event.message for event in self._events() if isinstance(event, NodeFailed)]

    def _events(self) -> list[object]:
        return [stamped.event for _, stamped in LogFollower(self.out / "events").read()]

    def complete(self) -> int:
        """The newest round that all stages have a checkpoint of; every checkpoint on disk is read and proven."""
        digest = load_manifest(self.out / "manifest.toml").digest.hex()
        rounds = []
        for stage in range(STAGES):
            paths = sorted((self.out / "checkpoints" / f"stage-{stage:02d}").glob("*.safetensors"))
            rounds.append({load(path, manifest_hash=digest)[1].round for path in paths})
        return max(set.intersection(*rounds), default=0)

    def cuts(self) -> dict[str, int]:
        """The newest cut that each replica has on disk; each is read and proven."""
        digest = load_manifest(self.out / "manifest.toml").digest.hex()
        return {
            folder.name: max(load(path, manifest_hash=digest)[1].round for path in folder.glob("*.safetensors"))
            for folder in (self.out / "replicas").glob("*")
            if any(folder.glob("*.safetensors"))
        }


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_deaths_of_everything_cost_a_round_each_at_most(tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    run = Run(tmp_path / "run")
    trained: list[int] = []
    try:
        for death in range(20):
            deadline = time.monotonic() + 120
            before = trained[-1] if trained else -1
            while run.round() <= before:  # until it trains a round it had not begun before
                assert time.monotonic() < deadline, f"death {death}: no new round since round {before}\n{run.output}"
                time.sleep(0.2)
            time.sleep(generator.uniform(0, 14))  # the moment of death is what varies
            run.kill()
            trained.append(run.round())
            # What is on disk is whole, and all that is missing is the round in which they died: the round before is
            # merged, or cut and ready to be merged.
            merged, cuts = run.complete(), run.cuts()
            assert merged >= trained[-1] - 1, f"death {death} in round {trained[-1]}: {merged} rounds are complete"
            previous = trained[-1] - 1
            if previous > before and previous in run.trained():
                late = {hotkey: cut for hotkey, cut in cuts.items() if cut < previous}
                assert not late, f"death {death} in round {trained[-1]}: {late}"
            run.resume()
        deadline = time.monotonic() + 120
        while run.round() <= trained[-1]:
            assert time.monotonic() < deadline, run.output
            time.sleep(0.2)
    finally:
        run.stop()
    assert run.failures() == []
