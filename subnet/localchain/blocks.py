"""The chain itself: a pool of transactions, and blocks made from it. No sockets, no clock.

A block runs in the runtime's order: initialisation (where a due epoch runs), the timestamp inherent, then
extrinsics in the order of the pool. There is one author and therefore no fork. Headers are real Substrate
headers, hashed with blake2-256; their state root is a hash chain over the changes of each block rather than
the root of a trie, since nobody asks this chain for proofs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from subnet.localchain import epoch, errors, extrinsic, genesis
from subnet.localchain.codec import Codec, blake2_256
from subnet.localchain.dispatch import Context
from subnet.localchain.errors import DispatchError, InvalidTransaction, RpcError
from subnet.localchain.extrinsic import Extrinsic
from subnet.localchain.metadata import compact
from subnet.localchain.pallets import TABLE, balances
from subnet.localchain.state import History, Snapshot, Working

POOL_LIMIT = 4_096
MAX_BLOCK_EXTRINSICS = 512
_ALREADY_IMPORTED = 1013
_TOO_LOW_PRIORITY = 1014
_IMMEDIATELY_DROPPED = 1016
_P = "SubtensorModule."
_DISPATCH_INFO = {"weight": {"ref_time": 0, "proof_size": 0}, "class": "Normal", "pays_fee": "Yes"}

# Calls signed by a hotkey whose fee its owner's coldkey pays: the runtime's fee filter, as in the SDK.
_COLDKEY_PAYS = frozenset(
    {
        ("SubtensorModule", "set_weights"),
        ("SubtensorModule", "set_mechanism_weights"),
        ("SubtensorModule", "serve_axon"),
        ("Commitments", "set_commitment"),
    }
)


@dataclass(frozen=True, slots=True)
class Block:
    """A block: its header's parts, its hash and its extrinsics as they were submitted."""

    number: int
    parent: bytes
    state_root: bytes
    extrinsics_root: bytes
    extrinsics: tuple[bytes, ...]
    timestamp_ms: int
    hash: bytes

    @classmethod
    def seal(
        cls,
        *,
        number: int,
        parent: bytes,
        state_root: bytes,
        extrinsics: tuple[bytes, ...],
        timestamp_ms: int,
    ) -> Block:
        root = blake2_256(b"".join(extrinsics))
        header = parent + compact(number) + state_root + root + compact(0)
        return cls(number, parent, state_root, root, extrinsics, timestamp_ms, blake2_256(header))


class Chain:
    """All blocks, their state and the transaction pool."""

    def __init__(self, config: genesis.ChainConfig) -> None:
        self.config = config
        self.codec = Codec(slot_ms=round(config.block_time * 1000))
        self.history = History(keep=config.history)
        self._hashes: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._pool: dict[bytes, tuple[Extrinsic, int | None]] = {}  # with the block at which its era ends
        self._waiting: dict[tuple[str, int], Extrinsic] = {}
        state = Working(self.codec, self.history)
        genesis.build(self.codec, config, state)
        # The metadata is part of the genesis state, so that chains with different ones have different hashes.
        root = _next_root(blake2_256(self.codec.metadata_option), state.changes)
        self._append(Block.seal(number=0, parent=bytes(32), state_root=root, extrinsics=(), timestamp_ms=0), state)

    # reading --------------------------------------------------------------------------------------

    @property
    def head(self) -> Block:
        return self._blocks[self.history.head]

    @property
    def finalized(self) -> Block:
        return self._blocks[max(0, self.history.head - self.config.finality_lag)]

    def hash_of(self, number: int) -> bytes | None:
        """The hash of block `number`, however old; None for one that is not there yet."""
        return self._hashes[number] if 0 <= number < len(self._hashes) else None

    def number_of(self, block_hash: bytes) -> int | None:
        return self._numbers.get(block_hash)

    def block(self, number: int) -> Block | None:
        """A block, None when it is unknown or older than the history."""
        return self._blocks.get(number)

    def snapshot(self, number: int) -> Snapshot:
        return Snapshot(self.codec, self.history, number)

    # the pool -------------------------------------------------------------------------------------

    def next_nonce(self, who: str) -> int:
        """The first nonce of `who` that is neither used nor waiting in the pool."""
        nonce = balances.nonce_of(self.snapshot(self.history.head), who)
        while (who, nonce) in self._waiting:
            nonce += 1
        return nonce

    def pending(self) -> list[bytes]:
        return [tx.raw for tx, _ in self._pool.values()]

    def submit(self, raw: bytes) -> Extrinsic:
        """Take a signed extrinsic into the pool.

        RpcError as a Substrate node words it when it may not enter.
        """
        tx = extrinsic.parse(self.codec, raw)
        if tx.hash in self._pool:
            raise RpcError(_ALREADY_IMPORTED, "Transaction is already imported", "0x" + tx.hash.hex())
        state = self.snapshot(self.history.head)
        if tx.nonce < balances.nonce_of(state, tx.signer):
            raise InvalidTransaction(errors.STALE)
        following = self.history.head + 1
        extrinsic.check_signature(self.codec, tx, current=following, block_hash=self._recent_hash)
        self._check_payment(Working(self.codec, self.history), tx)
        if (tx.signer, tx.nonce) in self._waiting:
            raise RpcError(
                _TOO_LOW_PRIORITY,
                "Priority is too low: (0 vs 0)",
                "The transaction has too low priority to replace another transaction already in the pool.",
            )
        if len(self._pool) >= POOL_LIMIT:
            raise RpcError(_IMMEDIATELY_DROPPED, "Immediately Dropped", "The transaction pool is full")
        self._pool[tx.hash] = (tx, tx.era.death(following))
        self._waiting[tx.signer, tx.nonce] = tx
        return tx

    def _recent_hash(self, number: int) -> bytes | None:
        """Block hashes as the runtime knows them: genesis, and those not older than the history."""
        return self.hash_of(number) if number == 0 or number >= self.history.oldest else None

    def _payer(self, state: Working, tx: Extrinsic) -> str | None:
        """Who pays the fee; None for a hotkey that no coldkey owns (its call will fail by itself)."""
        if (tx.call.pallet, tx.call.function) in _COLDKEY_PAYS:
            return state.account(_P + "Owner", tx.signer)
        return tx.signer

    def _check_payment(self, state: Working, tx: Extrinsic) -> None:
        payer = self._payer(state, tx)
        if payer is not None and balances.free_of(state, payer) < balances.fee_of(len(tx.raw)) + tx.tip:
            raise InvalidTransaction(errors.PAYMENT)

    # making blocks --------------------------------------------------------------------------------

    def produce(self, now_ms: int) -> tuple[Block, list[Extrinsic], list[Extrinsic]]:
        """Make the next block, dated `now_ms` (or just after its parent).

        Returns it, what it includes, what was dropped.
        """
        parent = self.head
        number = parent.number + 1
        timestamp = max(now_ms, parent.timestamp_ms + 1)
        state = Working(self.codec, self.history)
        ctx = Context(codec=self.codec, state=state, table=TABLE, number=number)
        state.put("System.Number", (), number)
        state.put("System.ParentHash", (), parent.hash)
        self._initialise(ctx)
        ctx.phase = {"ApplyExtrinsic": 0}
        state.put("Timestamp.Now", (), timestamp)
        ctx.emit("System", "ExtrinsicSuccess", {"dispatch_info": _DISPATCH_INFO | {"class": "Mandatory"}})
        included, dropped = self._apply_pool(ctx)
        state.put("System.Events", (), ctx.events)
        inherent = self.codec.timestamp_inherent(timestamp)
        block = Block.seal(
            number=number,
            parent=parent.hash,
            state_root=_next_root(parent.state_root, state.changes),
            extrinsics=(inherent, *(tx.raw for tx in included)),
            timestamp_ms=timestamp,
        )
        self._append(block, state)
        return block, included, dropped

    def _initialise(self, ctx: Context) -> None:
        netuid = self.config.netuid
        if ctx.state.number(_P + "RegistrationsThisBlock", netuid):
            ctx.state.put(_P + "RegistrationsThisBlock", (netuid,), 0)
        last = ctx.state.number(_P + "LastEpochBlock", netuid)
        if ctx.number >= last + ctx.state.number(_P + "Tempo", netuid):
            epoch.run(ctx, netuid)
            last = ctx.number
        ctx.state.put(_P + "BlocksSinceLastStep", (netuid,), ctx.number - last)

    def _apply_pool(self, ctx: Context) -> tuple[list[Extrinsic], list[Extrinsic]]:
        included: list[Extrinsic] = []
        dropped: list[Extrinsic] = []
        for tx, death in sorted(self._pool.values(), key=_by_nonce):
            nonce = balances.nonce_of(ctx.state, tx.signer)
            expired = death is not None and ctx.number >= death
            if not expired and (tx.nonce > nonce or len(included) >= MAX_BLOCK_EXTRINSICS):
                continue
            self._remove(tx)
            ctx.phase = {"ApplyExtrinsic": len(included) + 1}
            try:
                self._apply(ctx, tx, nonce)
            except InvalidTransaction:
                dropped.append(tx)
            else:
                included.append(tx)
        return included, dropped

    def _remove(self, tx: Extrinsic) -> None:
        del self._pool[tx.hash]
        del self._waiting[tx.signer, tx.nonce]

    def _apply(self, ctx: Context, tx: Extrinsic, nonce: int) -> None:
        """Run one extrinsic: checked again in this block, its fee and nonce kept even if its call fails."""
        if tx.nonce != nonce:
            raise InvalidTransaction(errors.STALE)
        extrinsic.check_signature(self.codec, tx, current=ctx.number, block_hash=self._recent_hash)
        self._check_payment(ctx.state, tx)
        payer, fee = self._payer(ctx.state, tx), balances.fee_of(len(tx.raw))
        if payer is not None:
            balances.withdraw(ctx, payer, fee + tx.tip)
        balances.set_account(ctx, tx.signer, nonce=nonce + 1)
        try:
            ctx.dispatch(tx.signer, tx.call)
        except DispatchError as error:
            failure = {"dispatch_error": ctx.error_value(error), "dispatch_info": _DISPATCH_INFO}
            outcome, fields = "ExtrinsicFailed", failure
        else:
            outcome, fields = "ExtrinsicSuccess", {"dispatch_info": _DISPATCH_INFO}
        if payer is not None:
            paid = {"who": payer, "actual_fee": fee, "tip": tx.tip}
            ctx.emit("TransactionPayment", "TransactionFeePaid", paid)
        ctx.emit("System", outcome, fields)

    def _append(self, block: Block, state: Working) -> None:
        self.history.commit(block.number, state.changes)
        self._hashes.append(block.hash)
        self._numbers[block.hash] = block.number
        self._blocks[block.number] = block
        if len(self._blocks) > self.config.history + 1:
            self._blocks.popitem(last=False)


def _by_nonce(entry: tuple[Extrinsic, int | None]) -> int:
    return entry[0].nonce


def _next_root(root: bytes, changes: Mapping[bytes, bytes | None]) -> bytes:
    """The state root after `changes`: the last one and every key that changed, in order."""
    parts = [root]
    for key in sorted(changes):
        value = changes[key]
        parts += [compact(len(key)), key, b"\0" if value is None else b"\1" + compact(len(value)) + value]
    return blake2_256(b"".join(parts))
