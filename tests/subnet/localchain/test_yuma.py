"""Yuma: worked examples, and what must hold for every subnet."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet.localchain.yuma import Outcome, Subnet, epoch, top_validators, weighted_median


def subnet(
    weights: list[list[float]],
    stake: list[float],
    *,
    bonds: list[list[float]] | None = None,
    active: list[bool] | None = None,
    kappa: float = 0.5,
    owner: int | None = None,
    registered_at: list[int] | None = None,
) -> Subnet:
    size = len(stake)
    return Subnet(
        weights=np.array(weights, dtype=np.float64),
        bonds=np.zeros((size, size)) if bonds is None else np.array(bonds, dtype=np.float64),
        stake=np.array(stake, dtype=np.float64),
        permits=np.array(stake) > 0,
        active=np.ones(size, dtype=np.bool_) if active is None else np.array(active),
        last_update=np.full(size, 10),
        registered_at=np.array(registered_at or [0] * size),
        bonds_since=5,
        owner=owner,
        kappa=kappa,
        bonds_rate=0.1,
        bonds_penalty=1.0,
    )


def test_one_validator_pays_by_its_weights() -> None:
    outcome = epoch(subnet([[0, 1, 3], [0, 0, 0], [0, 0, 0]], [100, 0, 0]))
    assert outcome.consensus.tolist() == [0, 0.25, 0.75]
    assert outcome.incentive.tolist() == [0, 0.25, 0.75]
    assert outcome.dividends.tolist() == [1, 0, 0]
    assert outcome.trust.tolist() == [1, 0, 0]


def test_a_minority_is_clipped_to_the_majority() -> None:
    """Two validators of three agree on miner 3; the third puts all on its friend 4 and moves nothing."""
    rows = [[0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0] * 5, [0] * 5]
    outcome = epoch(subnet(rows, [40, 40, 20, 0, 0]))
    assert outcome.incentive.tolist() == [0, 0, 0, 1, 0]
    assert outcome.trust.tolist() == [1, 1, 0, 0, 0]
    assert outcome.dividends.tolist() == [0.5, 0.5, 0, 0, 0]


def test_exactly_half_of_the_stake_is_enough() -> None:
    weights = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert weighted_median(weights, np.array([0.5, 0.5]), 0.5).tolist() == [1, 1]
    assert weighted_median(weights, np.array([0.5, 0.5]), 0.51).tolist() == [0, 0]


def test_bonds_are_a_moving_average_and_early_support_pays_more() -> None:
    """Validator 0 has backed miner 2 for long, validator 1 starts now with the same weights and stake."""
    rows = [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    outcome = epoch(subnet(rows, [1, 1, 0], bonds=[[0, 0, 1], [0, 0, 0], [0, 0, 0]]))
    np.testing.assert_allclose(outcome.bonds[:, 2], [1.0, 0.1, 0.0])
    np.testing.assert_allclose(outcome.dividends, [1 / 1.1, 0.1 / 1.1, 0.0])


def test_self_weights_count_for_the_owner_only() -> None:
    rows = [[1.0, 1.0], [0.0, 0.0]]
    assert epoch(subnet(rows, [1, 0])).incentive.tolist() == [0, 1]
    assert epoch(subnet(rows, [1, 0], owner=0)).incentive.tolist() == [0.5, 0.5]


def test_weights_and_bonds_on_a_uid_that_changed_hands_do_not_count() -> None:
    rows = [[0, 1, 1], [0, 0, 0], [0, 0, 0]]
    outcome = epoch(subnet(rows, [1, 0, 0], bonds=[[0, 1, 1]] + [[0] * 3] * 2, registered_at=[0, 0, 10]))
    assert outcome.incentive.tolist() == [0, 1, 0]
    assert outcome.bonds[0].tolist() == [0, 1, 0]


def test_an_inactive_validator_has_no_say() -> None:
    outcome = epoch(subnet([[0, 1], [0, 0]], [1, 0], active=[False, True]))
    assert not outcome.incentive.any()
    assert not outcome.dividends.any()


def test_permits_go_to_the_largest_stakes_and_to_the_owner() -> None:
    stake = np.array([0.0, 5.0, 3.0, 5.0, 0.0])
    assert top_validators(stake, 2, None).tolist() == [False, True, False, True, False]
    assert top_validators(stake, 64, 4).tolist() == [False, True, True, True, True]


@st.composite
def subnets(draw: st.DrawFn) -> Subnet:
    """Any subnet of up to eight neurons, zeros and extremes included."""
    size = draw(st.integers(1, 8))
    number = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
    row = st.lists(number, min_size=size, max_size=size)
    share = st.floats(0, 1)
    flags = st.lists(st.booleans(), min_size=size, max_size=size)
    blocks = st.lists(st.integers(0, 20), min_size=size, max_size=size)
    return Subnet(
        weights=np.array(draw(st.lists(row, min_size=size, max_size=size))),
        bonds=np.clip(np.array(draw(st.lists(row, min_size=size, max_size=size))), 0, 1),
        stake=np.array(draw(row)),
        permits=np.array(draw(flags)),
        active=np.array(draw(flags)),
        last_update=np.array(draw(blocks)),
        registered_at=np.array(draw(blocks)),
        bonds_since=draw(st.integers(0, 20)),
        owner=draw(st.none() | st.integers(0, size - 1)),
        kappa=draw(st.floats(0.01, 0.99)),
        bonds_rate=draw(share),
        bonds_penalty=draw(share),
    )


def sums_to_one_or_nothing(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> bool:
    return not values.any() or bool(np.isclose(values.sum(), 1.0))


@settings(max_examples=300, deadline=None)
@given(subnets())
def test_an_epoch_is_bounded_and_conserves(given: Subnet) -> None:
    outcome = epoch(given)
    for values in (outcome.consensus, outcome.trust, outcome.incentive, outcome.dividends, outcome.bonds):
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        assert (values <= 1 + 1e-9).all()
    assert sums_to_one_or_nothing(outcome.incentive)
    assert sums_to_one_or_nothing(outcome.dividends)
    assert not outcome.dividends[~(given.permits & given.active)].any()


@settings(max_examples=150, deadline=None)
@given(subnets(), st.randoms(use_true_random=False))
def test_uids_are_only_names(given: Subnet, random: object) -> None:
    """Renumbering the neurons renumbers the outcome and changes nothing else."""
    size = len(given.stake)
    order = np.array(random.sample(range(size), size))  # type: ignore[attr-defined]
    shuffled = Subnet(
        weights=given.weights[np.ix_(order, order)],
        bonds=given.bonds[np.ix_(order, order)],
        stake=given.stake[order],
        permits=given.permits[order],
        active=given.active[order],
        last_update=given.last_update[order],
        registered_at=given.registered_at[order],
        bonds_since=given.bonds_since,
        owner=None if given.owner is None else int(np.flatnonzero(order == given.owner)[0]),
        kappa=given.kappa,
        bonds_rate=given.bonds_rate,
        bonds_penalty=given.bonds_penalty,
    )
    one, other = epoch(given), epoch(shuffled)
    np.testing.assert_allclose(other.incentive, one.incentive[order], atol=1e-9)
    np.testing.assert_allclose(other.dividends, one.dividends[order], atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(subnets(), st.floats(1e-3, 1e3))
def test_the_unit_of_stake_does_not_matter(given: Subnet, unit: float) -> None:
    scaled = {name: getattr(given, name) for name in Subnet.__slots__} | {"stake": given.stake * unit}
    one, other = epoch(given), epoch(Subnet(**scaled))
    assert isinstance(other, Outcome)
    np.testing.assert_allclose(other.dividends, one.dividends, atol=1e-9)


@settings(max_examples=200, deadline=None)
@given(subnets())
def test_the_median_is_the_largest_weight_with_enough_stake_behind_it(given: Subnet) -> None:
    """Against the definition, tried weight by weight."""
    total = given.stake.sum()
    stake = given.stake / total if total else given.stake
    found = weighted_median(given.weights, stake, given.kappa)
    for column in range(given.weights.shape[1]):
        weights = given.weights[:, column]
        enough = [w for w in weights if stake[weights >= w].sum() >= given.kappa - 1e-12]
        assert found[column] == max(enough, default=0.0)
