"""Yuma against an independent slow reference, epoch after epoch, and against subtensor's own worked examples.

The examples are the numbers of subtensor's unit tests (pallets/subtensor/src/tests/epoch/yuma_3.rs, bonds.rs and
weight_activity.rs): stakes, weights per epoch, and the bonds and dividends that the real pallet is tested to give.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet.localchain import yuma
from tests.subnet.localchain import yuma_reference as reference

U16 = 65_535
NEVER = 2**62

# against the reference ------------------------------------------------------------------------------


@dataclass
class Story:
    """A subnet and what its validators do in each of several epochs."""

    size: int
    kappa: float
    rate: float
    penalty: float
    liquid: tuple[float, float, float] | None
    yuma3: bool
    owner: int | None
    bonds: list[list[float]]
    epochs: list[dict[str, list[object]]] = field(default_factory=list)


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Up to ten neurons over up to four epochs: sparse weights, lapsed permits and activity, newcomers, no weights."""
    size = draw(st.integers(1, 10))
    share = st.floats(0, 1)
    u16 = st.one_of(st.just(0), st.integers(0, U16))

    def per_uid(values: st.SearchStrategy[object]) -> list[object]:
        return draw(st.lists(values, min_size=size, max_size=size))

    low = draw(share)
    story = Story(
        size=size,
        kappa=draw(st.one_of(st.sampled_from((32_767 / U16, 0.5, 0.25)), st.floats(0.01, 0.99))),
        rate=draw(st.one_of(st.just(0.1), share)),
        penalty=draw(st.one_of(st.just(1.0), share)),
        liquid=draw(st.none() | st.tuples(st.just(low), st.floats(low, 1), st.floats(0, 5_000))),
        yuma3=draw(st.booleans()),
        owner=draw(st.none() | st.integers(0, size - 1)),
        bonds=[[value / U16 for value in per_uid(u16)] for _ in range(size)],  # type: ignore[operator]
    )
    silent = draw(st.booleans())
    for number in range(draw(st.integers(1, 4))):
        now = 100 * (number + 1)
        quiet = silent and draw(st.booleans())
        block = st.sampled_from((now - 150, now - 100, now - 99, now - 50, now))  # so that blocks coincide
        stake = st.one_of(st.just(0), st.integers(1, 10), st.integers(0, 2**50))
        story.epochs.append(
            {
                "weights": [[0] * size if quiet else per_uid(u16) for _ in range(size)],
                "stake": per_uid(stake),
                "permits": per_uid(st.booleans()),
                "active": per_uid(st.sampled_from((True, True, True, False))),
                "last_update": per_uid(block),
                "registered_at": per_uid(st.one_of(st.just(0), block)),
                "oldest_commit": per_uid(st.one_of(st.just(NEVER), block)),
                "since": [now - 100],
            }
        )
    return story


def near(found: object, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(found, dtype=float), np.asarray(expected, dtype=float), rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(stories())
def test_every_epoch_equals_the_reference(story: Story) -> None:
    compare(story)


@pytest.mark.long
@pytest.mark.timeout(600)
@settings(max_examples=2000, deadline=None)
@given(stories())
def test_every_epoch_of_many_equals_the_reference(story: Story) -> None:
    compare(story)


def compare(story: Story) -> None:
    """Both implementations over all epochs of a story."""
    bonds = story.bonds
    for acts in story.epochs:
        slow = reference.epoch(
            reference.Given(
                weights=[[float(value) for value in row] for row in acts["weights"]],  # type: ignore[attr-defined]
                bonds=bonds,
                stake=[float(value) for value in acts["stake"]],  # type: ignore[arg-type]
                permits=acts["permits"],  # type: ignore[arg-type]
                active=acts["active"],  # type: ignore[arg-type]
                last_update=acts["last_update"],  # type: ignore[arg-type]
                registered_at=acts["registered_at"],  # type: ignore[arg-type]
                oldest_commit=acts["oldest_commit"],  # type: ignore[arg-type]
                bonds_since=acts["since"][0],  # type: ignore[arg-type]
                owner=story.owner,
                kappa=story.kappa,
                rate=story.rate,
                penalty=story.penalty,
                liquid=story.liquid,
                yuma3=story.yuma3,
            )
        )
        fast = yuma.epoch(
            yuma.Subnet(
                weights=np.array(acts["weights"], dtype=np.float64),
                bonds=np.array(bonds),
                stake=np.array(acts["stake"], dtype=np.float64),
                permits=np.array(acts["permits"], dtype=np.bool_),
                active=np.array(acts["active"], dtype=np.bool_),
                last_update=np.array(acts["last_update"], dtype=np.int64),
                registered_at=np.array(acts["registered_at"], dtype=np.int64),
                oldest_commit=np.array(acts["oldest_commit"], dtype=np.int64),
                bonds_since=acts["since"][0],  # type: ignore[arg-type]
                owner=story.owner,
                kappa=story.kappa,
                bonds_rate=story.rate,
                bonds_penalty=story.penalty,
                liquid=None if story.liquid is None else yuma.LiquidAlpha(*story.liquid),
                yuma3=story.yuma3,
            )
        )
        near(fast.consensus, slow.consensus)
        near(fast.trust, slow.trust)
        near(fast.incentive, slow.incentive)
        near(fast.dividends, slow.dividends)
        near(fast.emission, slow.emission)
        near(fast.bonds, slow.bonds)
        near(fast.voting_stake, slow.voting)
        assert abs(fast.emission.sum() - (1.0 if any(acts["stake"]) else 0.0)) < 1e-6 or fast.incentive.any()
        bonds = [[int(value * U16) / U16 for value in row] for row in slow.bonds]  # as they are stored


# against subtensor's examples -----------------------------------------------------------------------

A, B = [U16, 0], [0, U16]
LIQUID = yuma.LiquidAlpha(low=0.1, high=0.3, steepness=1000)


@dataclass(frozen=True)
class Example:
    """Weights of the three validators on the servers per epoch (the last ones stay), and what comes of them.

    bonds: per epoch, a row of bonds on the servers per validator. reset: the epoch before which those on the first go.
    """

    stakes: list[int]
    servers: int
    weights: list[list[list[int]]]
    bonds: dict[int, list[list[float]]]
    dividends: dict[int, list[float]]
    liquid: yuma.LiquidAlpha | None = LIQUID
    reset: int | None = None


def numbered(rows: list[list[float]] | list[list[list[float]]]) -> dict[int, list[object]]:
    return dict(enumerate(rows))  # type: ignore[arg-type]


H = U16 // 2
EXAMPLES = {
    "kappa moves first": Example(
        [8, 1, 1], 2, [[A, A, A], [B, A, A], [B, B, A], [B, B, B]],
        numbered([
            [[0.1013, 0], [0.1013, 0], [0.1013, 0]],
            [[0.0908, 0.1013], [0.3697, 0], [0.3697, 0]],
            [[0.0815, 0.1924], [0.3170, 0.1013], [0.5580, 0]],
            [[0.0731, 0.2742], [0.2765, 0.1924], [0.4306, 0.1013]],
            [[0.0656, 0.3478], [0.2435, 0.2742], [0.3589, 0.1924]],
            [[0.0588, 0.4139], [0.2157, 0.3478], [0.3089, 0.2742]],
        ]),
        numbered([[0.8, 0.1, 0.1], [1, 0, 0], [0.9382, 0.0618, 0], [0.8819, 0.0773, 0.0407],
                  [0.8564, 0.0844, 0.0592], [0.8418, 0.0884, 0.0697]]),
    ),
    "kappa moves second": Example(
        [8, 1, 1], 2, [[A, A, A], [A, B, A], [B, B, A], [B, B, B]],
        numbered([
            [[0.1013, 0], [0.1013, 0], [0.1013, 0]],
            [[0.1924, 0], [0.0908, 0.2987], [0.1924, 0]],
            [[0.1715, 0.1013], [0.0815, 0.3697], [0.4336, 0]],
            [[0.1531, 0.1924], [0.0731, 0.4336], [0.3608, 0.1013]],
            [[0.1369, 0.2742], [0.0656, 0.4910], [0.3103, 0.1924]],
            [[0.1225, 0.3478], [0.0588, 0.5426], [0.2712, 0.2742]],
        ]),
        numbered([[0.8, 0.1, 0.1], [0.8446, 0.0498, 0.1056], [0.6868, 0.3132, 0], [0.7421, 0.2090, 0.0489],
                  [0.7625, 0.1706, 0.0669], [0.7730, 0.1508, 0.0762]]),
    ),
    "kappa moves last": Example(
        [8, 1, 1], 2, [[A, A, A], [A, B, A], [A, B, B], [B, B, B]],
        numbered([
            [[0.1013, 0], [0.1013, 0], [0.1013, 0]],
            [[0.1924, 0], [0.0908, 0.2987], [0.1924, 0]],
            [[0.2742, 0], [0.0815, 0.5081], [0.1715, 0.2987]],
            [[0.2416, 0.1013], [0.0731, 0.5580], [0.1531, 0.3697]],
            [[0.2141, 0.1924], [0.0656, 0.6028], [0.1369, 0.4336]],
            [[0.1903, 0.2742], [0.0588, 0.6430], [0.1225, 0.4910]],
        ]),
        numbered([[0.8, 0.1, 0.1], [0.8446, 0.0498, 0.1056], [0.8966, 0.0333, 0.0701], [0.4663, 0.3210, 0.2127],
                  [0.5976, 0.2340, 0.1683], [0.6592, 0.1932, 0.1475]]),
    ),
    "one epoch switch": Example(
        [33, 33, 34], 2, [[A, A, A], [A, A, A], [A, A, B], [A, A, A]],
        numbered([
            [[0.1013, 0], [0.1013, 0], [0.1013, 0]],
            [[0.1924, 0], [0.1924, 0], [0.1924, 0]],
            [[0.2742, 0], [0.2742, 0], [0.1715, 0.2987]],
            [[0.3478, 0], [0.3478, 0], [0.2554, 0.2618]],
            [[0.4139, 0], [0.4139, 0], [0.3309, 0.2312]],
            [[0.4733, 0], [0.4733, 0], [0.3987, 0.2051]],
        ]),
        numbered([[0.33, 0.33, 0.34], [0.33, 0.33, 0.34], [0.3782, 0.3782, 0.2436], [0.3628, 0.3628, 0.2745],
                  [0.3541, 0.3541, 0.2917], [0.3487, 0.3487, 0.3026]]),
    ),
    "liquid alpha disabled": Example(
        [33, 33, 34], 2, [[A, A, A], [A, A, A], [A, A, B], [A, A, A]],
        numbered([
            [[0.0250, 0], [0.0250, 0], [0.0250, 0]],
            [[0.0494, 0], [0.0494, 0], [0.0494, 0]],
            [[0.0731, 0], [0.0731, 0], [0.0481, 0.0250]],
            [[0.0963, 0], [0.0963, 0], [0.0719, 0.0244]],
            [[0.1189, 0], [0.1189, 0], [0.0951, 0.0238]],
            [[0.1409, 0], [0.1409, 0], [0.1178, 0.0232]],
        ]),
        numbered([[0.33, 0.33, 0.34], [0.33, 0.33, 0.34], [0.3734, 0.3734, 0.2532], [0.3611, 0.3611, 0.2779],
                  [0.3541, 0.3541, 0.2919], [0.3495, 0.3495, 0.3009]]),
        liquid=None,
    ),
    "stable miner": Example(
        [8, 1, 1], 3,
        [[[H, 0, H]] * 3, [[H, 0, H], [0, H, H], [H, 0, H]], [[0, H, H], [0, H, H], [H, 0, H]], [[0, H, H]] * 3],
        numbered([
            [[0.0507, 0, 0.0507], [0.0507, 0, 0.0507], [0.0507, 0, 0.0507]],
            [[0.0962, 0, 0.0962], [0.0455, 0.1000, 0.0962], [0.0962, 0, 0.0962]],
            [[0.0863, 0.0507, 0.1371], [0.0408, 0.1405, 0.1371], [0.1770, 0, 0.1371]],
            [[0.0774, 0.0962, 0.1739], [0.0367, 0.1770, 0.1739], [0.1579, 0.0507, 0.1739]],
            [[0.0694, 0.1371, 0.2069], [0.0329, 0.2097, 0.2069], [0.1411, 0.0962, 0.2069]],
            [[0.0623, 0.1739, 0.2366], [0.0296, 0.2391, 0.2366], [0.1263, 0.1371, 0.2366]],
        ]),
        numbered([[0.8, 0.1, 0.1], [0.8226, 0.0745, 0.1028], [0.7750, 0.1685, 0.0565], [0.7864, 0.1372, 0.0764],
                  [0.7912, 0.1241, 0.0847], [0.7937, 0.1173, 0.0890]]),
    ),
    "bonds reset": Example(
        [8, 1, 1], 2, [[A, A, A], [A, B, B], *[[B, B, B]] * 19, [B, A, A], [A, A, A]],
        {
            0: [[0.1013, 0], [0.1013, 0], [0.1013, 0]],
            1: [[0.1924, 0], [0.0908, 0.2987], [0.0908, 0.2987]],
            2: [[0.1715, 0.1013], [0.0815, 0.3697], [0.0815, 0.3697]],
            19: [[0.0269, 0.8539], [0.0131, 0.8975], [0.0131, 0.8975]],
            20: [[0, 0.8687], [0, 0.9079], [0, 0.9079]],
            21: [[0, 0.8820], [0.2987, 0.6386], [0.2987, 0.6386]],
            40: [[0.8687, 0.0578], [0.9079, 0.0523], [0.9079, 0.0523]],
        },
        {0: [0.8, 0.1, 0.1], 1: [0.8944, 0.0528, 0.0528], 2: [0.5230, 0.2385, 0.2385], 19: [0.7919, 0.1040, 0.1040],
         20: [0.7928, 0.1036, 0.1036], 21: [0.8467, 0.0766, 0.0766], 40: [0.7928, 0.1036, 0.1036]},
        reset=20,
    ),
}  # fmt: skip


def subnet(
    weights: list[list[float]], stake: list[float], bonds: yuma.Matrix | None = None, **options: object
) -> yuma.Subnet:
    """Neurons of old with a permit each; `options` replace what is usual."""
    n = len(stake)
    usual: dict[str, object] = {
        "weights": np.array(weights, dtype=np.float64),
        "bonds": np.zeros((n, n)) if bonds is None else bonds,
        "stake": np.array(stake, dtype=np.float64),
        "permits": np.ones(n, dtype=np.bool_),
        "active": np.ones(n, dtype=np.bool_),
        "last_update": np.full(n, 10),
        "registered_at": np.zeros(n, dtype=np.int64),
        "bonds_since": 5,
        "owner": None,
        "kappa": 32_767 / U16,
        "bonds_rate": 0.1,
        "bonds_penalty": 1.0,
    }
    return yuma.Subnet(**(usual | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", EXAMPLES)
def test_subtensors_yuma3_examples(name: str) -> None:
    """Over 6 to 41 epochs, bonds passing through u16 as on chain; subtensor's tests allow the same 1e-3."""
    example = EXAMPLES[name]
    n = 3 + example.servers
    bonds = np.zeros((n, n))
    for number in range(max(example.bonds) + 1):
        rows = example.weights[min(number, len(example.weights) - 1)]
        weights = [[0, 0, 0, *row] for row in rows] + [[0] * n] * example.servers
        if number == example.reset:
            bonds[:, 3] = 0.0
        outcome = yuma.epoch(
            subnet(
                weights, example.stakes + [0] * example.servers, bonds,
                kappa=H / U16, bonds_rate=0.025, bonds_penalty=0.0, liquid=example.liquid,
            )
        )  # fmt: skip
        bonds = np.floor(outcome.bonds * U16) / U16
        if number in example.bonds:
            np.testing.assert_allclose(bonds[:3, 3:], example.bonds[number], atol=1e-3, err_msg=f"epoch {number}")
            np.testing.assert_allclose(outcome.dividends[:3], example.dividends[number], atol=1e-3)


def test_subtensors_yuma2_example() -> None:
    """bonds.rs `test_bonds`: eight neurons, self-weights one validator after the other, stored bonds on server 4."""
    spread, on_last = [0, 0, 0, 0, U16 // 4, U16 // 2, U16 // 4 * 3, U16], [0, 0, 0, 0, 0, 0, 0, U16]
    nothing = [0] * 8
    rows = [spread] * 4 + [nothing] * 4
    bonds = np.zeros((8, 8))
    expected = [
        (4, [16_383, 32_767, 49_151, 65_535]),
        (4, [14_582, 32_767, 49_151, 65_535]),
        (4, [12_603, 28_321, 49_151, 65_535]),
        (7, [12_602, 28_320, 49_150, 65_535]),
        (7, [10_951, 24_609, 49_150, 65_535]),
        (7, [9_559, 21_482, 49_150, 65_535]),
        (7, [8_376, 18_824, 49_150, 65_535]),
    ]
    for number, (server, column) in enumerate(expected):
        if 1 <= number <= 3:  # a weight on oneself alone, by one more validator each time
            rows[number - 1] = [U16 if uid == number - 1 else 0 for uid in range(8)]
        if number == 4:
            rows[2] = on_last
        outcome = yuma.epoch(subnet(rows, [1, 2, 3, 4, 0, 0, 0, 0], bonds, yuma3=False))
        stored = np.floor(outcome.bonds * U16 + 1e-6)
        assert np.abs(stored[:4, server] - column).max() <= 1, (number, stored[:4, server])
        bonds = stored / U16
        if number == 0:
            np.testing.assert_allclose(outcome.dividends[:4], [0.1, 0.2, 0.3, 0.4], atol=1e-6)
            np.testing.assert_allclose(
                outcome.incentive[4:], [0.0999975582, 0.2000012207, 0.2999926752, 0.4000085455], atol=1e-8
            )
        if number == 3:  # less than half of the stake has an opinion: no incentive, all is paid by stake
            assert not outcome.incentive.any()
            np.testing.assert_allclose(outcome.emission[:4], [0.1, 0.2, 0.3, 0.4])
        if number == 4:
            np.testing.assert_allclose(outcome.trust[2:4], [0.400008545, 0.400008545], atol=1e-8)
            np.testing.assert_allclose(
                outcome.dividends[:4], [0.0728874663, 0.1637972582, 0.3271309866, 0.4361842885], atol=1e-5
            )


@pytest.mark.parametrize("yuma3", [True, False])
def test_subtensors_example_of_outdated_weights(yuma3: bool) -> None:
    """weight_activity.rs `test_outdated_weights`: server 3 is new, only validator 0 has looked since."""
    rows = [[0, 0, U16, 32_768], [0, 0, U16, 32_768], [0, 0, U16, 0], [0, 0, 0, U16]]
    first = yuma.epoch(subnet(rows, [1, 1, 1, 1], yuma3=yuma3))
    np.testing.assert_allclose(first.incentive, [0, 0, 0.6666632756, 0.3333367242], atol=1e-9)
    np.testing.assert_allclose(first.emission, [0.25, 0.25, 0.3333316378, 0.166668362], atol=1e-9)
    second = yuma.epoch(
        subnet(
            rows, [1, 1, 1, 0], first.bonds, yuma3=yuma3,
            last_update=np.array([12, 10, 10, 10]), registered_at=np.array([0, 0, 0, 11]), bonds_since=12,
            permits=np.array([True, True, True, False]),
        )
    )  # fmt: skip
    np.testing.assert_allclose(second.consensus, [0, 0, 0.6666632756, 0], atol=1e-9)
    np.testing.assert_allclose(second.trust, [0.6666632756, 0.6666632756, 0, 0], atol=1e-9)
    np.testing.assert_allclose(second.incentive, [0, 0, 1, 0])
    np.testing.assert_allclose(second.emission, [0.25, 0.25, 0.5, 0])


def test_subtensors_example_of_no_weights() -> None:
    """weight_activity.rs `test_zero_weights`: without weights, or with one on oneself only, the stake takes it all."""
    for rows in ([[0, 0], [0, 0]], [[0, 0], [0, U16]]):
        assert yuma.epoch(subnet(rows, [1, 0])).emission.tolist() == [1, 0]
    idle = yuma.epoch(subnet([[0, 1], [0, 0]], [3, 1], active=np.zeros(2, dtype=np.bool_)))
    assert idle.emission.tolist() == [0.75, 0.25]  # nobody is active: by everybody's stake
