"""Heads that do not go on from each other are found without fetching anything."""

from dataclasses import replace

import pytest

from subnet.trust.continuity import breaks
from subnet.trust.heads import WindowHead


def tag(text: str) -> bytes:
    return text.encode().ljust(32, b".")


def honest() -> list[WindowHead]:
    """Four windows with a merge before the third and a last one without a step."""
    rows = [
        # version, steps, merged, backward, weights, next
        (10, 5, 0, 2, "w0", "w1"),
        (11, 6, 0, 2, "w1", "w2"),
        (12, 7, 4, 2, "w2 merged", "w3"),
        (13, 8, 0, 0, "w3", "w3"),
    ]
    return [
        WindowHead(
            version=version,
            steps=steps,
            slot=0,
            forward=2,
            backward=backward,
            merged=merged,
            weights=tag(weights),
            optimizer=tag(f"m{steps}"),
            units=tag("units"),
            next_weights=tag(after),
            next_optimizer=tag(f"m{steps + (backward > 0)}"),
        )
        for version, steps, merged, backward, weights, after in rows
    ]


def test_an_honest_chain_has_no_break() -> None:
    assert not list(breaks(honest()))
    assert not list(breaks(()))
    assert not list(breaks(honest()[:1]))


def test_a_step_whose_gradient_was_not_finite_changes_nothing_and_does_not_count() -> None:
    heads = honest()
    first = replace(heads[0], next_weights=heads[0].weights, next_optimizer=heads[0].optimizer)
    after = replace(heads[1], steps=5, weights=first.weights, optimizer=first.optimizer)
    assert not list(breaks([first, after]))
    assert list(breaks([first, replace(after, steps=7)]))


@pytest.mark.parametrize(
    ("index", "change", "version"),
    [
        (1, {"weights": tag("others")}, 11),
        (1, {"merged": 4}, 12),
        (2, {"merged": 0}, 12),
        (1, {"optimizer": tag("others")}, 11),
        (2, {"steps": 9}, 12),
        (3, {"next_weights": tag("moved")}, 13),
        (3, {"next_optimizer": tag("moved")}, 13),
        (0, {"next_weights": tag("others")}, 11),
    ],
)
def test_each_kind_of_break_is_named(index: int, change: dict[str, object], version: int) -> None:
    heads = honest()
    heads[index] = replace(heads[index], **change)  # type: ignore[arg-type]
    found = list(breaks(heads))
    assert version in {one.version for one in found}
