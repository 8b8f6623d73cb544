"""Swarms on paper: nodes that work, die, freeze, leave and lie, and the chain states that they leave behind."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field

from subnet.metagraph import ChainState, Endpoint, Head, Neuron
from subnet.swarm.membership import Closed, Refreshed, close, refresh
from subnet.swarm.record import Flags, Phase, Record
from subnet.swarm.roster import NO_WEIGHTS, Anchor, Roster, Standing, gather

RUN = b"run-0001"
LENGTH, CUT, HAVE = 20, 12, 14


def name(uid: int) -> str:
    return f"hotkey-{uid:03d}"


def neuron(
    uid: int,
    *,
    record: Record | None = None,
    run: bytes = RUN,
    served: bool = True,
    registered_at: int = 1,
    record_block: int = 5,
    stake: float = 0.0,
    permit: bool = False,
) -> Neuron:
    return Neuron(
        uid=uid,
        hotkey=name(uid),
        coldkey="cold",
        stake=stake,
        validator_permit=permit,
        endpoint=Endpoint("127.0.0.1", 8000 + uid) if served else None,
        registered_at=registered_at,
        last_update=0,
        incentive=0.0,
        dividends=0.0,
        record=(record or Record(run=run, round=0, phase=Phase.READY)).encode(),
        record_block=record_block,
        shards=record.shards if record is not None else b"",
    )


def state(neurons: list[Neuron], *, block: int = 10) -> ChainState:
    digest = hashlib.sha256(block.to_bytes(8, "little")).hexdigest()
    return ChainState(Head(block, f"0x{digest}", 0), 9, "owner", 20, tuple(neurons))


@dataclass
class Node:
    """One miner. What it has on disk survives its death."""

    uid: int
    alive: bool = True
    frozen: bool = False
    leaving: bool = False
    lying: bool = False
    registered: bool = True
    always_well: bool = True
    disk: list[tuple[int, Anchor]] = field(default_factory=list)
    """(stage, state) of its last checkpoints, newest last."""
    record: Record | None = None
    record_block: int = 0

    @property
    def hotkey(self) -> str:
        return name(self.uid)

    @property
    def works(self) -> bool:
        return self.alive and not self.frozen and not self.leaving and self.registered

    def saved(self, stage: int, anchor: Anchor) -> Anchor | None:
        """What it would offer for a stage: the anchor if it has it, else its newest."""
        held = [found for index, found in self.disk if index == stage]
        return anchor if anchor in held else (held[-1] if held else None)


@dataclass
class World:
    """A swarm whose merges end with the round: at a round's first block records still speak of the last one."""

    stages: int
    nodes: list[Node]
    roster: Roster
    now: list[Anchor | None]
    """The state that the replicas of each stage hold at the start of the round."""
    closed: Closed | None = None
    last: Refreshed | None = None

    @classmethod
    def start(cls, *, stages: int, nodes: int) -> World:
        miners = [Node(uid) for uid in range(nodes)]
        for miner in miners:
            miner.record = Record(run=RUN, round=0, phase=Phase.READY)
        world = cls(stages, miners, Roster.of([[] for _ in range(stages)]), [None] * stages)
        roster = gather(world.state(0), RUN, stages=stages, replicas=1)
        assert roster is not None
        world.roster = roster
        world.now = [Anchor(0, digest("seed", stage)) for stage in range(stages)]
        return world

    def node(self, hotkey: str) -> Node:
        return self.nodes[int(hotkey.removeprefix("hotkey-"))]

    def arrive(self) -> None:
        self.nodes.append(Node(len(self.nodes)))

    def state(self, block: int) -> ChainState:
        return state(
            [
                neuron(node.uid, record=node.record, record_block=node.record_block, registered_at=0)
                if node.record is not None
                else dataclasses.replace(neuron(node.uid), record=None, record_block=None)
                for node in self.nodes
                if node.registered
            ],
            block=block,
        )

    def play(self) -> Refreshed:
        """One round and the refresh after it."""
        roster, number, start = self.roster, self.roster.round, self.roster.block
        for node in self.nodes:
            if node.alive and node.registered:
                self._publish(node, start + 2, self._idle(node))
        at_cut = self._phase(Phase.CUT, start + CUT)
        at_have = self._phase(Phase.HAVE, start + HAVE)
        closed = close(roster, RUN, at_cut, at_have)
        after = self.state(start + LENGTH)
        refreshed = refresh(roster, after, RUN, fresh_from=start, closed=closed)
        self._merge(closed)
        self.closed, self.roster, self.last = closed, refreshed.roster, refreshed
        assert refreshed.roster.round == number + 1
        for stage in range(self.stages):
            self._settle(stage)
        return refreshed

    # -- one round ------------------------------------------------------------------------------------------------

    def _publish(self, node: Node, block: int, record: Record) -> None:
        node.record = dataclasses.replace(record, roster=self.roster.digest, flags=Flags.LEAVING if node.leaving else 0)
        node.record_block = block

    def _idle(self, node: Node) -> Record:
        """READY, with the state of the stage it joins if that can be had."""
        stage = self.roster.target_of(node.hotkey)
        held: Anchor | None = None
        if self.roster.state_of(node.hotkey) is Standing.JOIN and stage is not None:
            serving = any(self.node(hotkey).works for hotkey in self.roster.stages[stage])
            held = self.now[stage] if serving else node.saved(stage, self.roster.anchors[stage])
        elif self.roster.state_of(node.hotkey) is not Standing.ACTIVE and node.disk:
            known = [anchor for _, anchor in node.disk if anchor in self.roster.anchors]
            held = known[-1] if known else None
        if node.frozen or held is None:
            return Record(run=RUN, round=self.roster.round, phase=Phase.READY)
        return Record(run=RUN, round=held.held, phase=Phase.READY, weights=held.weights)

    def _phase(self, phase: Phase, block: int) -> ChainState:
        for stage, replicas in enumerate(self.roster.stages):
            serving = [index for index, hotkey in enumerate(replicas) if self.node(hotkey).works]
            for hotkey in replicas:
                node, held = self.node(hotkey), self.now[stage]
                if not node.alive or not node.registered or (node.frozen and phase is Phase.HAVE):
                    continue
                weights = held.weights if held is not None else NO_WEIGHTS
                record = Record(
                    run=RUN,
                    round=self.roster.round,
                    phase=phase,
                    root=digest("root", hotkey, self.roster.round),
                    weights=digest("lie", hotkey) if node.lying else weights,
                    have=sum(1 << index for index in serving) if phase is Phase.HAVE else 0,
                )
                self._publish(node, block, record)
        return self.state(block)

    def _merge(self, closed: Closed) -> None:
        for stage, listed in enumerate(closed.listed):
            held = self.now[stage]
            if held is None:
                continue
            weights = digest(held.weights, *sorted(listed)) if listed else held.weights
            self.now[stage] = Anchor(closed.round + 1, weights)
            for hotkey in self.roster.stages[stage]:
                if self.node(hotkey).works:
                    node = self.node(hotkey)
                    node.disk = [*node.disk, (stage, held)][-3:]

    def _settle(self, stage: int) -> None:
        """What the replicas of the new round hold: what went on, or the anchor that a dark stage restarts from."""
        replicas = self.roster.stages[stage]
        stayed = any(
            (row := self.roster.member(hotkey)) is not None and row.since < self.roster.round for hotkey in replicas
        )
        joined_others = any(
            "restarts" not in self._why(hotkey) and "came back" not in self._why(hotkey) for hotkey in replicas
        )
        if not replicas:
            self.now[stage] = None
        elif not stayed and not (joined_others and self.now[stage] is not None):
            anchor = self.roster.anchors[stage]
            weights = anchor.weights if anchor.weights != NO_WEIGHTS else digest("seed", stage)
            self.now[stage] = Anchor(self.roster.round, weights)

    def _why(self, hotkey: str) -> str:
        return self.last.reasons.get(hotkey, "") if self.last is not None else ""


def digest(*parts: object) -> bytes:
    return hashlib.sha256("/".join(map(str, parts)).encode()).digest()
