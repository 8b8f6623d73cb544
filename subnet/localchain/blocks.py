"""The chain itself: a pool of transactions, and blocks made from it. No sockets, no clock.

A block runs in the runtime's order: initialisation (where a due epoch runs), the timestamp inherent, then
extrinsics in the order of the pool. There is one author and therefore no fork. Headers are real Substrate
headers, hashed with blake2-256; their state root is a hash chain over the changes of each block rather than
the root of a trie, since nobody asks this chain for proofs.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from subnet.localchain import epoch, errors, extrinsic, genesis, metadata, schedule
from subnet.localchain.block import Block, next_root
from subnet.localchain.codec import Codec, blake2_256
from subnet.localchain.dispatch import Context
from subnet.localchain.errors import DispatchError, InvalidTransaction, RpcError
from subnet.localchain.extrinsic import Extrinsic
from subnet.localchain.pallets import TABLE, balances, commit_reveal, registration, shield
from subnet.localchain.state import History, Snapshot, Working
from subnet.localchain.store import Identity, Store

log = logging.getLogger("orion.subnet.localchain.blocks")

POOL_LIMIT = 4_096
POOL_BYTES = 32 * 1024 * 1024
POOL_PER_SIGNER = 512
POOL_LIFE = 512  # blocks after which a transaction that is still not due is dropped, whatever its era says
MAX_EXTRINSIC = 256 * 1024
MAX_BLOCK_EXTRINSICS = 512
_ALREADY_IMPORTED = 1013
_TOO_LOW_PRIORITY = 1014
_IMMEDIATELY_DROPPED = 1016
_P = "SubtensorModule."
_DISPATCH_INFO = {"weight": {"ref_time": 0, "proof_size": 0}, "class": "Normal", "pays_fee": "Yes"}

# Calls of SubtensorModule, and one of Commitments, that a hotkey signs and its owner's coldkey pays for: the runtime's
# fee filter, as in the SDK.
_COLDKEY_PAYS = frozenset(
    {("Commitments", "set_commitment")}
    | {
        ("SubtensorModule", name)
        for name in (
            "set_weights",
            "set_mechanism_weights",
            "commit_weights",
            "commit_mechanism_weights",
            "commit_timelocked_weights",
            "commit_timelocked_mechanism_weights",
            "reveal_weights",
            "reveal_mechanism_weights",
            "serve_axon",
            "serve_axon_tls",
            "serve_prometheus",
        )
    }
)


class Chain:
    """All blocks, their state and the transaction pool.

    state: a folder to keep the chain in, and to continue it from when it holds one (`store`). Each block is then
    durable before `produce` returns it. StoreError when the folder cannot be used. Close the chain to release it.
    """

    def __init__(self, config: genesis.ChainConfig, *, state: Path | None = None) -> None:
        self.config = config
        self.codec = Codec(slot_ms=round(config.block_time * 1000))
        self.history = History(keep=config.history)
        self._hashes: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._pool: dict[bytes, tuple[Extrinsic, int]] = {}  # with the block from which it is too late
        self._waiting: dict[tuple[str, int], Extrinsic] = {}
        self._pool_bytes = 0
        self._per_signer: Counter[str] = Counter()
        self._pulses: dict[int, bytes] = {}
        self._store: Store | None = None
        first = Working(self.codec, self.history)
        genesis.build(self.codec, config, first)
        # The metadata is part of the genesis state, so that chains with different ones have different hashes.
        root = next_root(blake2_256(self.codec.metadata_option), first.changes)
        block = Block.seal(number=0, parent=bytes(32), state_root=root, extrinsics=())
        if state is None or not self._continue(Store(state, self._identity(block))):
            self._append(block, first)

    def _identity(self, first: Block) -> Identity:
        """What makes this chain that one and no other: the configuration, the runtime and the first block."""
        return {**asdict(self.config), "runtime": metadata.SPEC_VERSION, "genesis": "0x" + first.hash.hex()}

    def _continue(self, store: Store) -> bool:
        """Take `store` as this chain's own, and go on from what it holds; False when it holds nothing yet."""
        try:
            saved = store.load()
        except BaseException:
            store.close()
            raise
        self._store = store
        if saved is None:
            return False
        self.history.restore(len(saved.hashes) - 1, saved.versions)
        self._hashes = saved.hashes
        self._numbers = {block_hash: number for number, block_hash in enumerate(saved.hashes)}
        self._blocks = OrderedDict((block.number, block) for block in saved.blocks)
        return True

    def close(self) -> None:
        """Release the state folder. The chain can still be read; it makes no more blocks."""
        if self._store is not None:
            self._store.close()

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
        if len(raw) > MAX_EXTRINSIC:
            raise InvalidTransaction(errors.TOO_LARGE)
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
        full = len(self._pool) >= POOL_LIMIT or self._pool_bytes + len(raw) > POOL_BYTES
        if full or self._per_signer[tx.signer] >= POOL_PER_SIGNER:
            raise RpcError(_IMMEDIATELY_DROPPED, "Immediately Dropped", "The transaction pool is full")
        death = tx.era.death(following)
        life = following + POOL_LIFE
        self._pool[tx.hash] = (tx, life if death is None else min(death, life))
        self._waiting[tx.signer, tx.nonce] = tx
        self._pool_bytes += len(raw)
        self._per_signer[tx.signer] += 1
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

    # drand ----------------------------------------------------------------------------------------

    def wanted_rounds(self) -> Iterator[int]:
        """The drand rounds that timelocked commits wait for."""
        return commit_reveal.wanted_rounds(self.snapshot(self.history.head), self.config.netuid)

    def add_pulse(self, number: int, signature: bytes) -> None:
        """Take drand quicknet's signature of round `number` into the next block. ValueError for another one."""
        commit_reveal.check_pulse(number, signature)
        self._pulses[number] = signature

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
            state_root=next_root(parent.state_root, state.changes),
            extrinsics=(inherent, *(tx.raw for tx in included)),
        )
        self._append(block, state)
        return block, included, dropped

    def _initialise(self, ctx: Context) -> None:
        netuid = self.config.netuid
        registration.begin_block(ctx, netuid)
        for number, signature in self._pulses.items():
            commit_reveal.store_pulse(ctx, number, signature)
        self._pulses.clear()
        commit_reveal.reveal(ctx, netuid)
        if schedule.is_due(ctx.state, netuid, ctx.number):
            epoch.run(ctx, netuid)
        since = ctx.number - ctx.state.number(_P + "LastEpochBlock", netuid)
        ctx.state.put(_P + "BlocksSinceLastStep", (netuid,), since)

    def _apply_pool(self, ctx: Context) -> tuple[list[Extrinsic], list[Extrinsic]]:
        included: list[Extrinsic] = []
        dropped: list[Extrinsic] = []
        for tx, death in sorted(self._pool.values(), key=_by_nonce):
            nonce = balances.nonce_of(ctx.state, tx.signer)
            expired = ctx.number >= death
            if not expired and (tx.nonce > nonce or len(included) >= MAX_BLOCK_EXTRINSICS):
                continue
            self._remove(tx)
            ctx.phase = {"ApplyExtrinsic": len(included) + 1}
            if self._attempt(ctx, tx, nonce):
                included.append(tx)
                self._unshield(ctx, tx, included)
            else:
                dropped.append(tx)
        return included, dropped

    def _attempt(self, ctx: Context, tx: Extrinsic, nonce: int) -> bool:
        """Run one extrinsic, or leave no trace of it; False when it may not be in this block."""
        try:
            with ctx.transaction():
                before = len(ctx.events)
                self._apply(ctx, tx, nonce)
                self.codec.encode_events(ctx.events[before:])  # what cannot be told must not have happened
        except InvalidTransaction as refusal:
            log.debug("%s.%s was left out: %s", tx.call.pallet, tx.call.function, refusal)
            return False
        except Exception:
            # Where the real runtime would panic, its block builder drops the transaction and goes on; so here.
            log.exception("%s.%s failed in a way that no call may", tx.call.pallet, tx.call.function)
            return False
        return True

    def _unshield(self, ctx: Context, carrier: Extrinsic, included: list[Extrinsic]) -> None:
        """The author's part of the MEV shield: what a carrier holds runs right behind it, if it is valid.

        An invalid one is left out, as on the real chain, and its sender sees that no block ever has it.
        """
        ctx.phase = {"ApplyExtrinsic": len(included) + 1}
        try:
            raw = shield.unseal(carrier.call)
            if raw is None:
                return
            inner = extrinsic.parse(self.codec, raw)
        except (RpcError, ValueError) as refusal:
            log.info("a shielded extrinsic was left out: %s", refusal)
            return
        if self._attempt(ctx, inner, balances.nonce_of(ctx.state, inner.signer)):
            included.append(inner)

    def _remove(self, tx: Extrinsic) -> None:
        del self._pool[tx.hash]
        del self._waiting[tx.signer, tx.nonce]
        self._pool_bytes -= len(tx.raw)
        self._per_signer[tx.signer] -= 1
        if not self._per_signer[tx.signer]:
            del self._per_signer[tx.signer]

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
        if self._store is not None:
            self._store.append(block, state.changes, oldest=max(0, block.number - self.history.keep))
        self.history.commit(block.number, state.changes)
        self._hashes.append(block.hash)
        self._numbers[block.hash] = block.number
        self._blocks[block.number] = block
        if len(self._blocks) > self.config.history + 1:
            self._blocks.popitem(last=False)


def _by_nonce(entry: tuple[Extrinsic, int]) -> int:
    return entry[0].nonce
