"""Evidence that no honest replica can have written is refused; its root binds every byte."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from subnet.trust.heads import WindowHead
from subnet.trust.ledger import Direction, Evidence, Leaf, LedgerError, Tables
from tests.subnet.trust.books import CLOSING, Book, head, sound

BOOK = Book()
SAMPLES = range(len(BOOK.samples))
LEAVES = BOOK.leaves[BOOK.roster.stages[1][0]]


def test_honest_evidence_is_sound() -> None:
    for stage, replicas in enumerate(BOOK.roster.stages):
        for hotkey in replicas:
            sound(BOOK.leaves[hotkey]).check(stage=stage, samples=SAMPLES)
    Evidence((), (), (), CLOSING).check(stage=0, samples=SAMPLES)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda leaves: [replace(leaves[0], stage=2), *leaves[1:]],
        lambda leaves: [replace(leaves[0], sample=2**63), *leaves[1:]],
        lambda leaves: [*leaves, leaves[0]],
        lambda leaves: [replace(leaves[0], loss=float("nan")), *leaves[1:]],
        lambda leaves: [replace(leaves[0], loss=1e38), *leaves[1:]],
    ],
)
def test_evidence_that_cannot_be_is_refused(spoil: Callable[[list[Leaf]], list[Leaf]]) -> None:
    with pytest.raises(LedgerError):
        sound(spoil(LEAVES)).check(stage=1, samples=SAMPLES)


GOOD = head(0, LEAVES)


@pytest.mark.parametrize(
    "heads",
    [
        (),
        (replace(GOOD, backward=99),),
        (replace(GOOD, units=bytes(32)),),
        (GOOD, GOOD),
        (GOOD, replace(GOOD, version=1, forward=0, backward=0)),
        (replace(GOOD, version=7),),
    ],
)
def test_windows_are_those_of_the_leaves(heads: tuple[WindowHead, ...]) -> None:
    assert sum(leaf.direction is Direction.BACKWARD for leaf in LEAVES) == GOOD.backward == 4
    with pytest.raises(LedgerError, match="window"):
        Evidence(tuple(LEAVES), heads, (), CLOSING).check(stage=1, samples=SAMPLES)


def test_tables_round_trip_and_their_root_binds_every_byte() -> None:
    table = sound(LEAVES)
    tables = table.tables()
    assert Evidence.parse(tables) == table
    assert Evidence.parse(tables).root == table.root == tables.root
    for name in ("leaves", "heads", "closing"):
        part = getattr(tables, name)
        for position in range(0, len(part), 37):
            altered = bytearray(part)
            altered[position] ^= 1
            assert replace(tables, **{name: bytes(altered)}).root != table.root
    with pytest.raises(LedgerError, match="whole rows"):
        Evidence.parse(replace(tables, leaves=tables.leaves[:-1]))
    with pytest.raises(LedgerError, match="direction 9"):
        Evidence.parse(replace(tables, leaves=b"\x09" + tables.leaves[1:]))
    with pytest.raises(LedgerError, match="heads"):
        Evidence.parse(Tables(tables.leaves, tables.heads[:-1], tables.acks, tables.closing))
