"""A merge played by the nodes' own code moves the bytes that the closed form says, and everybody ends alike."""

from __future__ import annotations

import pytest

from scripts.simulate.merges import play
from subnet.swarm.butterfly import ButterflyError
from subnet.swarm.codec import CodecName

PARAMETERS = 6_500_000_000
UP, DOWN = 856e6, 1322e6


@pytest.mark.parametrize(
    ("replicas", "codec"), [(3, "topk2bit"), (8, "topk2bit"), (2, "int8"), (3, "int8"), (4, "bf16")]
)
def test_bytes_and_seconds_are_those_of_the_closed_form(replicas: int, codec: CodecName) -> None:
    merge = play(parameters=PARAMETERS, replicas=replicas, codec=codec, up=UP, down=DOWN, latency=0.03, seed=0)
    assert merge.agreed
    assert merge.sent == pytest.approx(merge.expected, rel=0.01)
    floor = 8 * merge.expected / UP
    assert floor * 0.99 < merge.moving < 1.3 * floor + 1
    assert merge.moving < merge.seconds


def test_a_codec_without_room_says_so() -> None:
    with pytest.raises(ButterflyError, match="stage has 18 replicas"):
        play(parameters=PARAMETERS, replicas=18, codec="int8", up=UP, down=DOWN, latency=0.03, seed=0)
