"""The chain decides what counts; arithmetic is pinned; a void round loses nothing."""

from dataclasses import replace

import pytest
import torch

from model.optimizer import OuterConfig
from subnet.swarm.codec import codec_of
from subnet.swarm.merge import Merged, accepted, cut_sources, mean, step
from subnet.swarm.record import MAX_HAVE, Flags, Phase, Record, bind_roots

REPLICAS = ("a", "b", "c")
OUTER = OuterConfig(lr=0.7, momentum=0.9)
PLAIN = OuterConfig(lr=0.7, momentum=0.0)


def record(phase: Phase, *, number: int = 4, root: bytes = b"r" * 32, have: int = 0) -> Record:
    return Record(run=b"run-0001", round=number, phase=phase, root=root, have=have, work=3)


def test_record_layout_is_fixed_and_small() -> None:
    full = Record(
        run=b"run-0001",
        round=2**32 - 1,
        phase=Phase.DONE,
        flags=Flags.LEAVING,
        work=7,
        root=b"\xff" * 32,
        roster=b"\x80" * 15,
        weights=b"\x01" * 32,
        have=2**MAX_HAVE - 1,
        shards=b"\x02" * 128,
    )
    assert len(full.encode()) == 108
    assert Record.decode(full.encode(), full.shards) == full
    assert Record.decode(full.encode()) == replace(full, shards=b"")
    for odd in (b"\x02" * 9, b"\x02" * 136):
        assert Record.decode(full.encode(), odd) == replace(full, shards=b"")
    for other in (
        None,
        b"",
        b"hello",
        full.encode()[:-1],
        b"XX1" + full.encode()[3:],
        full.encode()[:3] + b"\x09" + full.encode()[4:],
    ):
        assert Record.decode(other) is None


def test_a_record_tells_how_many_rounds_its_weights_hold_and_whether_its_owner_leaves() -> None:
    assert [record(phase, number=4).held for phase in Phase] == [4, 4, 4, 5]
    assert not record(Phase.CUT).stageless
    assert replace(record(Phase.CUT), flags=Flags.LEAVING | 0x80).stageless
    assert replace(record(Phase.CUT), flags=Flags.OBSERVER).stageless


def test_late_or_foreign_records_are_no_sources() -> None:
    records = {"a": record(Phase.CUT), "b": record(Phase.READY), "c": record(Phase.CUT, number=3)}
    assert [source.hotkey for source in cut_sources(REPLICAS, records, 4)] == ["a"]


@pytest.mark.parametrize(
    ("haves", "listed"),
    [
        ((0b111, 0b111, 0b111), ["a", "b", "c"]),
        ((0b011, 0b011, 0b111), ["a", "b"]),  # c's payload is held by c alone
        ((0b001, 0b010, 0b100), []),  # nobody has what the others sent: void
        ((0b111, None, None), []),  # one voter of three is no majority
        ((0b011, 0b011, None), ["a", "b"]),
    ],
)
def test_source_list_needs_a_majority(haves: tuple[int | None, ...], listed: list[str]) -> None:
    sources = cut_sources(REPLICAS, {name: record(Phase.CUT) for name in REPLICAS}, 4)
    records = {
        name: record(Phase.CUT) if have is None else record(Phase.HAVE, have=have)
        for name, have in zip(REPLICAS, haves, strict=True)
    }
    assert [source.hotkey for source in accepted(sources, records, 4)] == listed


def test_a_root_changed_after_cut_does_not_vote() -> None:
    sources = cut_sources(REPLICAS[:2], {name: record(Phase.CUT) for name in REPLICAS[:2]}, 4)
    records = {"a": record(Phase.HAVE, have=3), "b": record(Phase.HAVE, have=3, root=b"x" * 32)}
    assert accepted(sources, records, 4) == ()


def test_reduction_is_in_the_order_given() -> None:
    deltas = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    expected = ((deltas[0] + deltas[1]) + deltas[2]) * (1.0 / 3)
    assert torch.equal(mean(deltas), expected)


@pytest.mark.parametrize(
    ("name", "outer", "momentum"), [("bf16", OUTER, 1000), ("int8", OUTER, 1000), ("topk2bit", PLAIN, 0)]
)
def test_replicas_land_on_the_same_bits(name: str, outer: OuterConfig, momentum: int) -> None:
    generator, codec = torch.Generator().manual_seed(3), codec_of(name)
    theta = torch.randn(1000, generator=generator)
    state = Merged(theta, torch.zeros(momentum))
    payloads = [codec.encode(torch.randn(1000, generator=generator) * 1e-2) for _ in range(3)]
    results = [step(state, mean([codec.decode(payload, 1000) for payload in payloads]), outer) for _ in range(2)]
    assert torch.equal(results[0].theta, results[1].theta)
    assert results[0].momentum.numel() == momentum
    assert not torch.equal(results[0].theta, theta)


def test_without_a_momentum_buffer_the_step_is_plain() -> None:
    state = Merged(torch.tensor([1.0, 2.0]), torch.zeros(0))
    after = step(state, mean([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])]), OuterConfig(lr=0.5, momentum=0.0))
    assert torch.equal(after.theta, torch.tensor([0.75, 1.0]))
    assert after.momentum.numel() == 0
    with pytest.raises(ValueError, match=r"outer\.momentum is 0\.9"):
        step(state, torch.ones(2), OUTER)
    with pytest.raises(ValueError, match="no pseudo-gradients"):
        mean([])


def test_a_commitment_binds_payload_and_evidence() -> None:
    payload, evidence = b"p" * 32, b"e" * 32
    bound = bind_roots(payload, evidence)
    assert bound not in (bind_roots(b"q" * 32, evidence), bind_roots(payload, b"f" * 32), bind_roots(evidence, payload))
