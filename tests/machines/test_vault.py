"""The checkpoint store against a dictionary: puts, damage, lost files, other runs' files and restarts in any order."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neurons.vault import Vault, stage_file

RUN = "ab" * 32
KEEP = 2
STAGES = 2


def content(value: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((5,), float(value))}


class Store(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vault-"))
        self.sound: dict[tuple[int, int], int] = {}
        """What was put and is whole, by stage and round."""
        self.files: set[tuple[int, int]] = set()
        self.open()

    @rule()
    def open(self) -> None:
        """As after a restart: nothing is remembered but what is on disk."""
        self.vault = asyncio.run(Vault.open(str(self.folder), manifest_hash=RUN, keep=KEEP, report=lambda _line: None))

    @rule(stage=st.integers(0, STAGES - 1), number=st.integers(0, 7), value=st.integers(0, 99))
    def put(self, stage: int, number: int, value: int) -> None:
        asyncio.run(self.vault.put_stage(stage, number, content(value), version=number))
        self.sound[stage, number] = value
        self.files.add((stage, number))
        there = {place for place in self.files if self._path(place).exists()}
        gone = self.files - there
        assert (stage, number) in there
        kept = sorted((n for s, n in self.sound if s == stage and n <= number and (s, n) in there), reverse=True)
        for place in gone:  # only older ones of this stage, and only while enough whole ones stay
            assert place[0] == stage
            assert place[1] < number
            assert len([n for n in kept if n > place[1]]) >= KEEP or place not in self.sound
        self.files = there
        self.sound = {place: value for place, value in self.sound.items() if place in there}

    @precondition(lambda self: self.files)
    @rule(which=st.integers(0, 99), at=st.integers(0, 10_000))
    def damage(self, which: int, at: int) -> None:
        place = sorted(self.files)[which % len(self.files)]
        path = self._path(place)
        data = bytearray(path.read_bytes())
        if data:
            data[at % len(data)] ^= 0x40
            path.write_bytes(data)
            self.sound.pop(place, None)

    @precondition(lambda self: self.files)
    @rule(which=st.integers(0, 99))
    def lose(self, which: int) -> None:
        place = sorted(self.files)[which % len(self.files)]
        self._path(place).unlink()
        self.files.discard(place)
        self.sound.pop(place, None)

    @precondition(lambda self: self.files)
    @rule(which=st.integers(0, 99), share=st.floats(0.0, 0.99))
    def cut_short(self, which: int, share: float) -> None:
        place = sorted(self.files)[which % len(self.files)]
        path = self._path(place)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        self.sound.pop(place, None)

    @invariant()
    def newest_is_the_newest_sound_one(self) -> None:
        if not hasattr(self, "folder"):
            return
        for stage in range(STAGES):
            rounds = [number for other, number in self.sound if other == stage]
            found = asyncio.run(self.vault.newest(stage))
            if not rounds:
                assert found is None
                continue
            assert found is not None
            assert found[0] == max(rounds)
            assert torch.equal(found[1]["w"], content(self.sound[stage, found[0]])["w"])

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, place: tuple[int, int]) -> Path:
        return self.folder / stage_file(*place)


TestVault = Store.TestCase
TestVault.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
