"""Rounds of evidence with real keys and signatures, for tests to bend before they are settled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from subnet.identity import Identity, verify
from subnet.swarm.roster import Roster
from subnet.swarm.routing import hops
from subnet.trust.heads import WindowHead
from subnet.trust.ledger import (
    NO_DIGEST,
    NO_PEER,
    Closing,
    Direction,
    Evidence,
    Leaf,
    digest,
    receipt_message,
    units_hash,
)
from subnet.trust.settlement import Settlement, settle

RUN = b"run-0001"
SEED = b"a lottery's seed"
LANE = 3
CLOSING = Closing(NO_DIGEST, NO_DIGEST, NO_DIGEST)
Route = Callable[[int, int], int]
"""(sample, stage) -> index of the replica."""


def tag(*parts: object) -> bytes:
    return digest("/".join(map(str, parts)).encode())


def head(version: int, leaves: Sequence[Leaf]) -> WindowHead:
    """The head of a window with these units; its states are nobody's."""
    backward = sum(leaf.direction is Direction.BACKWARD for leaf in leaves)
    return WindowHead(
        version=version,
        steps=version,
        slot=0,
        forward=len(leaves) - backward,
        backward=backward,
        merged=0,
        weights=NO_DIGEST,
        optimizer=NO_DIGEST,
        units=units_hash(leaves),
        next_weights=NO_DIGEST,
        next_optimizer=NO_DIGEST,
    )


def sound(leaves: Iterable[Leaf]) -> Evidence:
    """Evidence with the window table that an honest ledger would have."""
    rows = tuple(leaves)
    versions = sorted({leaf.version for leaf in rows})
    heads = tuple(head(version, [leaf for leaf in rows if leaf.version == version]) for version in versions)
    return Evidence(rows, heads, (), CLOSING)


class Book:
    """What every replica of stages x replicas writes down in round 0. `leaves` are there to be bent."""

    def __init__(self, *, stages: int = 3, replicas: int = 2, samples: int = 8, route: Route | None = None) -> None:
        self.keys = {key.hotkey: key for key in (Identity.from_uri(f"//book-{i}") for i in range(stages * replicas))}
        hotkeys = list(self.keys)
        self.roster = Roster.of([hotkeys[s * replicas : (s + 1) * replicas] for s in range(stages)])
        self.hotkeys = [hotkey for stage in self.roster.stages for hotkey in stage]
        self.samples = range(samples)
        self.leaves: dict[str, list[Leaf]] = {hotkey: [] for hotkey in self.hotkeys}
        for sample in self.samples:
            self.enter(sample, [(route or self.planned)(sample, stage) for stage in range(stages)])

    def planned(self, sample: int, stage: int) -> int:
        """Where the lottery sends a sample."""
        heads = self.roster.stages[0]
        replicas = self.roster.stages[stage]
        if stage == 0:
            return sample % len(heads)
        index, head = divmod(sample, len(heads))
        first = hops(replicas, seed=SEED, stage=stage, head=head, heads=len(heads), index=index, lane=LANE)[0]
        return replicas.index(first)

    def enter(
        self,
        sample: int,
        path: Sequence[int],
        *,
        only: Collection[int] | None = None,
        signers: Collection[str] | None = None,
        lie: str = "",
    ) -> None:
        """One microbatch that went through replica `path[stage]` of every stage, as all of them write it down.

        `only` some stages write it; for who is not among the `signers` its producer signs itself; with `lie` its
        activations and gradients are other ones.
        """

        def signed(leaf: Leaf, producer: str, consumer: str) -> Leaf:
            if signers is None or consumer in signers:
                return self.receipted(leaf, producer, consumer)
            return replace(leaf, receipt=self.keys[producer].sign(b"as if it were another's"))

        tail = len(path) - 1
        holders = [self.roster.stages[stage][index] for stage, index in enumerate(path)]
        for stage, hotkey in enumerate(holders):
            if only is not None and stage not in only:
                continue
            x = tag("tokens", sample) if stage == 0 else tag("y", stage - 1, sample, lie)
            if stage < tail:
                forward = Leaf(
                    direction=Direction.FORWARD,
                    stage=stage,
                    sample=sample,
                    version=0,
                    source=NO_PEER if stage == 0 else path[stage - 1],
                    sink=path[stage + 1],
                    input=x,
                    output=tag("y", stage, sample, lie),
                )
                self.leaves[hotkey].append(signed(forward, hotkey, holders[stage + 1]))
            backward = Leaf(
                direction=Direction.BACKWARD,
                stage=stage,
                sample=sample,
                version=0,
                source=path[stage - 1] if stage == tail else path[stage + 1],
                sink=NO_PEER if stage == 0 else path[stage - 1],
                loss=1.5,
                input=x,
                gradient=NO_DIGEST if stage == tail else tag("dx", stage + 1, sample, lie),
                output=NO_DIGEST if stage == 0 else tag("dx", stage, sample, lie),
            )
            self.leaves[hotkey].append(backward if stage == 0 else signed(backward, hotkey, holders[stage - 1]))

    def receipted(self, leaf: Leaf, producer: str, consumer: str) -> Leaf:
        message = receipt_message(RUN, 0, producer=producer, key=leaf.key, stage=leaf.stage, output=leaf.output)
        return replace(leaf, receipt=self.keys[consumer].sign(message))

    def change(self, hotkey: str, change: Callable[[Leaf], Leaf | None]) -> None:
        """Replace every leaf of a replica; None leaves it out."""
        self.leaves[hotkey] = [new for leaf in self.leaves[hotkey] if (new := change(leaf)) is not None]

    def settle(
        self, *, without: Collection[str] = (), windows: Mapping[str, Collection[int]] | None = None
    ) -> Settlement:
        """`windows`: all count unless given."""
        evidence = {hotkey: sound(leaves) for hotkey, leaves in self.leaves.items() if hotkey not in without}
        every = {hotkey: {head.version for head in table.heads} for hotkey, table in evidence.items()}
        return settle(
            RUN,
            self.roster,
            evidence,
            verify,
            first_sample=0,
            seed=SEED,
            lane=LANE,
            windows=every if windows is None else windows,
        )


def units(settlement: Settlement, hotkey: str) -> int:
    return settlement.paid[hotkey].units if hotkey in settlement.paid else 0
