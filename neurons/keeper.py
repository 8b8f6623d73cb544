"""What a miner writes down so that a kill costs it one round at most, and how it goes on from there.

Public: a stage's state after each merge, before anybody is told that it is held. Private: at each cut the inner
optimizer, what error feedback owes, and the contribution itself with its evidence, so that a merge which began before
the kill ends after it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from model.checkpoint import CheckpointError
from neurons.node import Node
from neurons.replica import Replica
from neurons.stores import StoreError
from neurons.vault import Vault, stage_file
from neurons.wire import byte_tensor
from subnet.trust.ledger import TABLES, Evidence, Tables

log = logging.getLogger("orion.neurons.keeper")


@dataclass(frozen=True, slots=True)
class KeptCut:
    """A replica at the cut of `round`, as it was written down."""

    round: int
    stage: int
    sent: torch.Tensor
    residual: torch.Tensor
    pieces: tuple[bytes, ...]
    evidence: Evidence
    optimizer: Mapping[str, torch.Tensor]


class Keeper:
    """A miner's checkpoints. What cannot be written is said and costs nothing else."""

    def __init__(self, node: Node, vault: Vault) -> None:
        self._hotkey = node.identity.hotkey
        self._vault = vault

    async def keep_stage(self, stage: int, held: int, tensors: Mapping[str, torch.Tensor], version: int) -> str | None:
        """Write a public state; where it lies, None if it could not be written."""
        try:
            await self._vault.put_stage(stage, held, tensors, version)
        except (StoreError, CheckpointError) as error:
            log.error("no checkpoint of stage %d after %d rounds: %s", stage, held, error)  # noqa: TRY400
            return None
        return self._vault.place(stage_file(stage, held))

    async def keep_cut(
        self,
        stage: int,
        number: int,
        replica: Replica,
        pieces: Sequence[bytes | memoryview],
        evidence: Evidence,
        optimizer: Mapping[str, torch.Tensor],
    ) -> None:
        """Write what this replica alone has at its cut."""
        assert replica.pending is not None  # noqa: S101 - it has just cut
        tensors = {
            "stage": torch.tensor(stage),
            "sent": replica.pending.sent,
            "residual": replica.feedback.residual,
            "pieces": byte_tensor(b"".join(pieces)),
            "sizes": torch.tensor([len(piece) for piece in pieces], dtype=torch.int64),
        }
        tensors |= {name: byte_tensor(data) for name, data in asdict(evidence.tables()).items()}
        tensors |= {f"engine.{name}": tensor for name, tensor in optimizer.items()}
        try:
            await self._vault.put_replica(self._hotkey, number, tensors)
        except (StoreError, CheckpointError) as error:
            log.error("the cut of round %d is not kept: %s", number, error)  # noqa: TRY400 - a line for a person

    async def stage_state(
        self, stage: int, *, at_most: int | None = None
    ) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The newest public state of a stage that is sound."""
        try:
            return await self._vault.newest(stage, at_most=at_most)
        except StoreError as error:
            log.error("no checkpoint of stage %d can be read: %s", stage, error)  # noqa: TRY400
            return None

    async def last_cut(self) -> KeptCut | None:
        """This replica at its last cut."""
        try:
            found = await self._vault.newest_replica(self._hotkey)
        except StoreError as error:
            log.error("what this replica had cannot be read: %s", error)  # noqa: TRY400
            return None
        if found is None:
            return None
        number, tensors = found
        return await asyncio.to_thread(_parse, number, tensors)


def _parse(number: int, tensors: Mapping[str, torch.Tensor]) -> KeptCut:
    sizes = tensors["sizes"].tolist()
    raw = tensors["pieces"].numpy().tobytes()
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    prefix = "engine."
    return KeptCut(
        round=number,
        stage=int(tensors["stage"]),
        sent=tensors["sent"],
        residual=tensors["residual"],
        pieces=tuple(raw[start : start + size] for start, size in zip(starts, sizes, strict=True)),
        evidence=Evidence.parse(Tables(*(tensors[name].numpy().tobytes() for name in TABLES))),
        optimizer={name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)},
    )
