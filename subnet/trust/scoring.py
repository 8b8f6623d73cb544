"""Scoring: from evidence and audits to weights, every term named, recomputable by anyone.

    score = verified useful FLOPs x correctness

averaged over the last closed rounds. A unit's FLOPs are verified when the unit is *paid* (`settle`): its microbatch
came back to its head, the consumer of its output signed for it, and its input is what the upstream leaf says it put
out, its gradient what the downstream leaf sent. Where a neighbour served no evidence the receipts alone decide, so
nobody loses pay through another's silence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from subnet.swarm.roster import Roster
from subnet.swarm.routing import head_of
from subnet.trust.ledger import NO_DIGEST, Direction, Evidence, Leaf, receipt_message

Verify = Callable[[str, bytes, bytes], bool]
"""(hotkey, message, signature) -> whether the signature is the hotkey's."""


@dataclass(frozen=True, slots=True)
class Paid:
    """Units of one miner in one round that count."""

    forward: int
    backward: int
    claimed: int
    """Leaves in its evidence, paid or not."""


@dataclass(frozen=True, slots=True)
class Pathway:
    """Who a completed microbatch went through, head first, and the loss its tail reported."""

    sample: int
    hotkeys: tuple[str, ...]
    loss: float


@dataclass(frozen=True, slots=True)
class Settlement:
    paid: dict[str, Paid]
    pathways: tuple[Pathway, ...]


_Unit = tuple[int, int, Direction]
"""(stage, sample, direction)."""


class _Book:
    """Leaves of all miners of a round, with the neighbours' view of each."""

    def __init__(
        self, run: bytes, roster: Roster, evidence: Mapping[str, Evidence], verify: Verify, first_sample: int
    ) -> None:
        self.run, self.roster, self.verify, self.first_sample = run, roster, verify, first_sample
        self.tail = len(roster.stages) - 1
        self.units: dict[str, dict[_Unit, Leaf]] = {
            hotkey: {
                (leaf.stage, leaf.sample, leaf.direction): leaf
                for leaf in table.leaves
                if leaf.stage == roster.stage_of(hotkey)
            }
            for hotkey, table in evidence.items()
        }

    def peer(self, stage: int, index: int) -> str | None:
        if not 0 <= stage < len(self.roster.stages) or index >= len(self.roster.stages[stage]):
            return None
        return self.roster.stages[stage][index]

    def leaf(self, hotkey: str, stage: int, leaf: Leaf, direction: Direction) -> Leaf | None:
        return self.units.get(hotkey, {}).get((stage, leaf.sample, direction))

    def signed(self, hotkey: str, leaf: Leaf) -> bool:
        """Whether the sink signed for this unit's output."""
        consumer = self.peer(leaf.stage + (1 if leaf.direction is Direction.FORWARD else -1), leaf.sink)
        if consumer is None:
            return False
        message = receipt_message(
            self.run, self.roster.round, producer=hotkey, key=leaf.key, stage=leaf.stage, output=leaf.output
        )
        return self.verify(consumer, message, leaf.receipt)

    def assigned(self, hotkey: str, leaf: Leaf) -> bool:
        """Whether the sample was this head's to train."""
        heads = self.roster.stages[0]
        return head_of(leaf.sample, base=self.first_sample, heads=len(heads)) == heads.index(hotkey)

    def linked(self, hotkey: str, leaf: Leaf) -> bool:
        """Whether what came in is what its sender says it sent; a sender without evidence contradicts nothing.

        A gradient must have been sent to this replica; an activation may have been fetched to take over a dead
        sibling's unit, so there the digest decides.
        """
        upstream = leaf.direction is Direction.FORWARD or leaf.stage == self.tail
        stage = leaf.stage - 1 if upstream else leaf.stage + 1
        if stage < 0:
            return self.assigned(hotkey, leaf) or self.inherited(leaf, leaf.sink)
        sender = self.peer(stage, leaf.source)
        if sender is None or (leaf.stage == 0 and not self.started(hotkey, leaf)):
            return False
        if sender not in self.units:
            return True
        sent = self.leaf(sender, stage, leaf, Direction.FORWARD if upstream else Direction.BACKWARD)
        if sent is None or sent.output != (leaf.input if upstream else leaf.gradient):
            return False
        return upstream or self.peer(leaf.stage, sent.sink) == hotkey

    def started(self, hotkey: str, leaf: Leaf) -> bool:
        """Whether a head may count this backward: its own sample, forwarded with a receipt, or one it took over from a
        head that served no evidence."""
        if self.assigned(hotkey, leaf):
            forward = self.leaf(hotkey, 0, leaf, Direction.FORWARD)
            return forward is not None and self.signed(hotkey, forward)
        return self.inherited(leaf, leaf.source)

    def inherited(self, leaf: Leaf, neighbour: int) -> bool:
        """Whether a unit of another head's sample counts for the head that took it over: only if the owner served no
        evidence, so that nobody can take a living head's pay, and the neighbour in the next stage did."""
        heads = self.roster.stages[0]
        owner = heads[head_of(leaf.sample, base=self.first_sample, heads=len(heads))]
        return owner not in self.units and self.peer(1, neighbour) in self.units

    def consumed(self, hotkey: str, leaf: Leaf) -> bool:
        """Whether the consumer's own leaf, if it shows one, names this replica as the source of exactly this output.

        It signed for the output, so a leaf that it leaves out costs only itself.
        """
        forward = leaf.direction is Direction.FORWARD
        stage = leaf.stage + 1 if forward else leaf.stage - 1
        consumer = self.peer(stage, leaf.sink)
        if consumer not in self.units:
            return True
        direction = Direction.BACKWARD if not forward or stage == self.tail else Direction.FORWARD
        used = self.leaf(consumer, stage, leaf, direction)
        if used is None:
            return True
        return (used.input if forward else used.gradient) == leaf.output and self.peer(
            leaf.stage, used.source
        ) == hotkey

    def completed(self) -> set[int]:
        """Samples of the microbatches that came back to their head, in its own words or by its receipt."""
        done: set[int] = set()
        for hotkey, units in self.units.items():
            for (stage, sample, direction), leaf in units.items():
                if direction is not Direction.BACKWARD:
                    continue
                head = self.peer(0, leaf.sink) if stage == 1 else None
                back = stage == 0 and self.linked(hotkey, leaf)
                if back or (stage == 1 and head not in self.units and self.signed(hotkey, leaf)):
                    done.add(sample)
        return done


def settle(
    run: bytes, roster: Roster, evidence: Mapping[str, Evidence], verify: Verify, *, first_sample: int
) -> Settlement:
    """Which units of a round count, per miner, and the pathways they form.

    `first_sample` is the round's first sample id: it decides which head each sample belongs to.

    `evidence` holds the tables that were served and matched their root on chain; miners missing from it earn nothing.
    """
    book = _Book(run, roster, evidence, verify, first_sample)
    done = book.completed()
    paid: dict[str, Paid] = {}
    for hotkey, units in book.units.items():
        counts = {Direction.FORWARD: 0, Direction.BACKWARD: 0}
        for leaf in units.values():
            counts[leaf.direction] += _pays(book, hotkey, leaf, done)
        paid[hotkey] = Paid(counts[Direction.FORWARD], counts[Direction.BACKWARD], len(units))
    return Settlement(paid, tuple(_pathways(book, done)))


def _pays(book: _Book, hotkey: str, leaf: Leaf, done: set[int]) -> bool:
    if leaf.sample not in done or not book.linked(hotkey, leaf):
        return False
    return leaf.output == NO_DIGEST or (book.signed(hotkey, leaf) and book.consumed(hotkey, leaf))


def _pathways(book: _Book, done: Iterable[int]) -> Iterable[Pathway]:
    tail = len(book.roster.stages) - 1
    holders: dict[int, dict[int, tuple[str, float]]] = defaultdict(dict)
    for hotkey, units in book.units.items():
        for (stage, sample, direction), leaf in units.items():
            if direction is Direction.BACKWARD:
                holders[sample][stage] = (hotkey, leaf.loss)
    for sample in sorted(done):
        path = holders[sample]
        if len(path) == tail + 1:
            yield Pathway(sample, tuple(path[stage][0] for stage in range(tail + 1)), path[tail][1])


@dataclass(frozen=True, slots=True)
class Score:
    """One miner's score in one round, term by term."""

    hotkey: str
    flops: float
    """Forward and backward FLOPs of its paid units; recompute is not paid."""
    correctness: float

    @property
    def value(self) -> float:
        return self.flops * self.correctness


def score(
    settlement: Settlement, *, forward_flops: Mapping[str, float], correctness: Mapping[str, float]
) -> dict[str, Score]:
    """Scores of a round, for every member of its roster: who served no evidence earned nothing.

    `forward_flops` is a member's stage's forward cost of one microbatch; a backward counts twice that.
    """
    nothing = Paid(0, 0, 0)
    scores = {}
    for hotkey in forward_flops:
        paid = settlement.paid.get(hotkey, nothing)
        flops = (paid.forward + 2.0 * paid.backward) * forward_flops[hotkey]
        scores[hotkey] = Score(hotkey, flops, correctness.get(hotkey, 1.0))
    return scores


def weights(history: Sequence[Mapping[str, Score]], *, rounds: int) -> dict[str, float]:
    """Normalised weights by hotkey: mean score over the last `rounds` closed rounds, newcomers over those present."""
    recent = history[-rounds:]
    sums: dict[str, list[float]] = defaultdict(list)
    for scores in recent:
        for hotkey, entry in scores.items():
            sums[hotkey].append(entry.value)
    means = {hotkey: sum(values) / len(values) for hotkey, values in sums.items()}
    total = sum(means.values())
    return {hotkey: value / total for hotkey, value in means.items() if value > 0} if total > 0 else {}
