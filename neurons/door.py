"""The door of a stage worker: which pushes it lets in, from whom, and what it signs for.

Transport has checked who speaks; here the roster decides whether that hotkey may say this: the right run and round, a
replica of the neighbouring stage, a sample that is the head's own, a gradient from whoever signed for the activation.

A replica takes no more work than covers the time in which more can arrive. So at saturation, when every replica of a
stage always has some waiting and senders offer the rest to its siblings, each gets what it computes and no more: one at
half the speed half as much. Without that limit the lottery's equal shares would make all as fast as the slowest.
"""

from __future__ import annotations

from model.split import StagePlan
from neurons.delivery import LONGEST_PAUSE, RETRY_PAUSE, Delivery, Spawn
from neurons.training import TrainingRound
from subnet.identity import Identity
from subnet.manifest import LoadedManifest
from subnet.messages import HolderRequest, InputRequest, Notice, Push
from subnet.swarm.routing import room, sample_id
from subnet.transport.errors import Busy, Dropped, Full, Unavailable, UnknownHotkey, UnknownRun
from subnet.trust.ledger import Direction, UnitKey, receipt_message

SHORTEST_PAUSE = 0.005
"""Seconds."""


def full_pause(unit_seconds: float) -> float:
    """After how many seconds a full replica, whose units take so long, has room again."""
    return min(LONGEST_PAUSE, max(SHORTEST_PAUSE, unit_seconds))


class Door:
    """Checks for one replica of one stage."""

    def __init__(self, identity: Identity, loaded: LoadedManifest, plan: StagePlan, delivery: Delivery) -> None:
        self._identity = identity
        self._run = loaded.run_id
        self._manifest = loaded.manifest
        self._plan = plan
        self._delivery = delivery

    def admit(
        self,
        current: TrainingRound | None,
        push: Push | HolderRequest | InputRequest | Notice,
        caller: str,
        *,
        neighbour: int,
    ) -> TrainingRound:
        """The round a push belongs to, if `caller` is the neighbour it must come from. Raises a `Refused`."""
        if push.run != self._run.hex():
            raise UnknownRun(f"run {push.run} is not {self._run.hex()}", "start with the manifest that is on chain")
        if current is None or push.round > current.number:
            # Unlike BUSY this tells a sender who was served before that the replica it knew is no more.
            raise Unavailable(
                f"round {push.round} has not begun here", "push again after the pause", retry_after=RETRY_PAUSE
            )
        if push.round < current.number or not current.accepting:
            raise Dropped(f"round {push.round} is closed here", "drop what belongs to it")
        stray = isinstance(push, Push) and push.head not in current.roster.stages[0]
        if current.roster.stage_of(caller) != neighbour or stray:
            raise UnknownHotkey(
                f"{caller} does not hold stage {neighbour} in round {push.round}",
                "compare the roster digest in your round_started event with the one in its record",
            )
        self._delivery.heard(caller)
        return current

    def belongs(self, current: TrainingRound, push: Push) -> bool:
        """Whether the sample is the one that the roster gives to this head at this index."""
        heads = current.roster.stages[0]
        quota = self._manifest.data.samples_per_round
        return push.index < quota // len(heads) and push.sample == sample_id(
            base=current.number * quota, heads=len(heads), head=heads.index(push.head), index=push.index
        )

    def require_room(self, current: TrainingRound, *, capacity: int, unit_seconds: float) -> None:
        """Take an activation only while there is need of it. Raises `Full`.

        Args:
            capacity: most inputs that may be open.
            unit_seconds: mean time of a unit, forward or backward.
        """
        if len(current.open) >= capacity:
            raise Full(
                f"stage {self._plan.index} holds {len(current.open)} inputs of {capacity}",
                "push again after the pause or to a sibling replica",
                retry_after=RETRY_PAUSE,
            )
        limit = room(
            stages=self._manifest.swarm.stages,
            unit_seconds=unit_seconds,
            push_seconds=self._delivery.push_seconds.value,
            limit=capacity,
        )
        if len(current.work) >= limit:
            raise Full(
                f"stage {self._plan.index} has {len(current.work)} units waiting, limit {limit}",
                "push again after the pause or to a sibling replica",
                retry_after=full_pause(unit_seconds),
            )

    def require_sink(self, current: TrainingRound, sample: int, caller: str) -> None:
        """Only who signed for this replica's forward may send its gradient or, if they are gone, who took over."""
        sinks = current.sinks.get(sample)
        if sinks is not None and caller in sinks:
            return
        claimed = caller in current.claims.get(sample, ())
        if claimed and sinks is not None and all(self._delivery.is_down(sink) for sink in sinks):
            return
        if claimed or sinks is None:
            raise Busy(f"sample {sample} is with somebody else so far", "push again", retry_after=RETRY_PAUSE)
        raise Dropped(f"sample {sample} was not sent to {caller}", "send gradients of what was received")

    def require_gone(self, current: TrainingRound, push: Push, spawn: Spawn) -> None:
        """A head sends another's sample: let it, once the owner cannot be reached from here. Raises `Busy` till then.

        That is safe: the sample id is the roster's, so nothing can be invented; while the owner is there nobody can
        put an activation in the place of its own; and the sender is paid only if the owner serves no evidence.
        """
        if not self._delivery.is_down(push.head):
            spawn(current.sends, self._delivery.look(current, push.head, push.sample))
            raise Busy(f"head {push.head} may be there: it is asked", "push again", retry_after=RETRY_PAUSE)

    def sign_receipt(self, current: TrainingRound, key: UnitKey, producer: str, output: bytes) -> str:
        """Sign for the output of `producer`'s unit and remember it, so that a repeated push gets the same receipt."""
        stage = self._plan.index + (-1 if key.direction is Direction.FORWARD else 1)
        message = receipt_message(self._run, current.number, producer=producer, key=key, stage=stage, output=output)
        receipt = self._identity.sign(message).hex()
        current.receipts[key] = (producer, receipt)
        return receipt
