"""The marks of a local round: they fit for every round that the options admit."""

from pathlib import Path

import pytest

from model.data import ShardEntry
from scripts.data.local import RunData
from scripts.manifests import local_manifest
from scripts.options import LocalnetOptions, check_options
from subnet.manifest import Manifest


def built(*, overlap: bool, round_seconds: float = 14.0, block_time: float = 0.1) -> Manifest:
    options = LocalnetOptions(
        stages=2,
        replicas=2,
        validators=1,
        rounds=3,
        model="nano",
        seed=0,
        block_time=block_time,
        round_seconds=round_seconds,
        overlap=overlap,
    )
    check_options(options)
    return local_manifest(
        model=options.model,
        stages=options.stages,
        replicas=options.replicas,
        rounds=options.rounds,
        round_blocks=options.round_blocks,
        phase_blocks=options.phase_blocks,
        seed=options.seed,
        authority="5C",
        netuid=9,
        activation_block=1,
        data=RunData(
            folder=Path(), entries=(ShardEntry(name="tokens.bin", sha256="a" * 64, dtype="uint16"),), held_out=0.05
        ),
        overlap=options.overlap,
        codec=options.codec,
    )


def test_with_overlap_the_merge_lies_in_the_next_round() -> None:
    marks = built(overlap=True).round
    assert marks.overlapped
    assert (marks.close, marks.length, marks.cut, marks.have, marks.merge) == (138, 140, 163, 186, 209)
    assert marks.linger == 92


def test_without_overlap_the_merge_ends_with_its_round() -> None:
    marks = built(overlap=False).round
    assert not marks.overlapped
    assert (marks.close, marks.cut, marks.have, marks.merge, marks.length) == (67, 90, 113, 136, 140)
    assert marks.linger == 92


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("round_seconds", "block_time"), [(10, 0.05), (10, 0.4), (24, 1.0), (288, 12), (86_400, 12)])
def test_marks_fit_at_the_limits_of_the_options(overlap: bool, round_seconds: float, block_time: float) -> None:
    manifest = built(overlap=overlap, round_seconds=round_seconds, block_time=block_time)
    assert manifest.merge.codec == "topk2bit"
    assert manifest.optimizer.outer().momentum == 0
