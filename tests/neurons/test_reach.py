"""Who is down: for a while, or until there is a sign of life that our own failing call does not contradict."""

from neurons.reach import DOWN_SECONDS, Reach

A, B = "a", "b"


def test_who_was_not_reached_is_down_for_a_while() -> None:
    reach = Reach()
    assert not reach.is_down(A, now=0.0)
    reach.failed(A, since=9.0, now=10.0)
    assert reach.is_down(A, now=10.0 + DOWN_SECONDS - 0.01)
    assert not reach.is_down(A, now=10.0 + DOWN_SECONDS)
    assert not reach.is_down(B, now=10.0)
    assert reach.missing(now=10.0) == [A]
    assert reach.missing(now=10.0 + DOWN_SECONDS) == []


def test_an_answer_ends_it_at_once() -> None:
    reach = Reach()
    reach.failed(A, since=9.0, now=10.0)
    reach.answered(A)
    assert not reach.is_down(A, now=10.0)


def test_so_does_a_call_of_its_own() -> None:
    reach = Reach()
    reach.heard(A, now=8.0)  # it lived, then
    reach.failed(A, since=9.0, now=10.0)
    assert reach.is_down(A, now=10.5)
    reach.heard(A, now=11.0)
    assert not reach.is_down(A, now=11.0)


def test_one_that_calls_and_does_not_answer_stays_down() -> None:
    reach = Reach()
    reach.heard(A, now=9.5)
    reach.failed(A, since=9.0, now=10.0)
    reach.heard(A, now=11.0)
    assert reach.is_down(A, now=11.0)
    reach.answered(A)
    assert not reach.is_down(A, now=11.0)


def test_who_is_set_aside_stays_so_whatever_it_says() -> None:
    reach = Reach()
    reach.set_aside(A, now=10.0)
    reach.answered(A)
    reach.heard(A, now=11.0)
    assert reach.is_down(A, now=11.0)
    assert reach.missing(now=11.0) == []  # nobody needs to look for it
    assert not reach.is_down(A, now=10.0 + DOWN_SECONDS)
