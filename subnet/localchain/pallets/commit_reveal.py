"""Weights that stay hidden until their epoch is over: timelocked commits, and the older salted hashes.

With commit-reveal on, a validator commits in one epoch and its weights take effect `RevealPeriodEpochs` later.

* Timelocked (what the SDK does): the weights are encrypted to a round of drand's quicknet and the chain opens them
  itself once it knows that round's signature. The SDK has quicknet's public key compiled in, so no other beacon can
  stand in for it: signatures come from drand (`subnet.localchain.drand`), or a commit stays sealed, is tried again in
  every block of its reveal epoch and then dropped, silently, as on the real chain.
* Hashed: the validator commits to a hash and sends the weights with their salt in the reveal epoch. Needs no beacon.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from typing import cast

import bittensor_core

from subnet.localchain import neurons, schedule
from subnet.localchain.codec import blake2_256
from subnet.localchain.dispatch import Args, Context, Function
from subnet.localchain.errors import DispatchError
from subnet.localchain.metadata import SS58_FORMAT, compact, read_compact
from subnet.localchain.pallets import weights
from subnet.localchain.state import Reader

log = logging.getLogger("orion.subnet.localchain.commit_reveal")

MAX_COMMIT = 5_000  # bytes
MAX_UNREVEALED = 10  # per hotkey and epoch
_P = "SubtensorModule."
_SIGNATURE = 48  # bytes of a quicknet signature, a point of G1


# drand ----------------------------------------------------------------------------------------------


def check_pulse(number: int, signature: bytes) -> None:
    """ValueError unless `signature` is quicknet's for round `number`: it must open what was sealed for that round."""
    probe = b"orion"
    if len(signature) == _SIGNATURE:
        sealed, _ = bittensor_core.encrypt_at_round(probe, number)
        try:
            if bytes(bittensor_core.decrypt_with_signature(sealed, signature.hex())) == probe:
                return
        except ValueError:
            pass
    raise ValueError(f"0x{signature[:8].hex()}... is not quicknet's signature of round {number}")


def store_pulse(ctx: Context, number: int, signature: bytes) -> None:
    """Write a checked pulse into the state, where the real chain's drand pallet has it."""
    pulse = {"round": number, "randomness": hashlib.sha256(signature).digest(), "signature": signature}
    ctx.state.put("Drand.Pulses", (number,), pulse)
    ctx.state.put("Drand.LastStoredRound", (), max(number, ctx.state.number("Drand.LastStoredRound")))


def wanted_rounds(state: Reader, netuid: int) -> Iterator[int]:
    """Rounds that commits of this or the reveal epoch are sealed with and whose signature is not known yet."""
    epoch = state.number(_P + "SubnetEpochIndex", netuid)
    period = state.number(_P + "RevealPeriodEpochs", netuid)
    for at in range(max(0, epoch - period), epoch + 2):
        for _, _, _, number in _timelocked(state, netuid, at):
            if not state.exists("Drand.Pulses", number):
                yield number


# timelocked -----------------------------------------------------------------------------------------

_Commit = tuple[str, int, bytes, int]  # hotkey, block, ciphertext, drand round


def _timelocked(state: Reader, netuid: int, epoch: int) -> list[_Commit]:
    stored = cast(
        "list[tuple[str, int, str | bytes, int]]", state.value(_P + "TimelockedWeightCommits", netuid, epoch) or []
    )
    return [(who, block, _bytes(sealed), number) for who, block, sealed, number in stored]


def _commit_timelocked(ctx: Context, hotkey: str, args: Args) -> None:
    netuid, state = args.number("netuid"), ctx.state
    _check_enabled(ctx, netuid)
    if args.number("commit_reveal_version") != state.number(_P + "CommitRevealWeightsVersion"):
        raise DispatchError("IncorrectCommitRevealVersion")
    sealed, number = args.blob("commit"), args.number("reveal_round")
    if len(sealed) > MAX_COMMIT:
        raise DispatchError("Exhausted", pallet=None)
    uid = _check_committer(ctx, netuid, hotkey)
    epoch = schedule.index(state, netuid, ctx.number)
    commits = _timelocked(state, netuid, epoch)
    if sum(who == hotkey for who, *_ in commits) >= MAX_UNREVEALED:
        raise DispatchError("TooManyUnrevealedCommits")
    state.put(_P + "TimelockedWeightCommits", (netuid, epoch), [*commits, (hotkey, ctx.number, sealed, number)])
    weights.touch(ctx, netuid, uid)
    ctx.emit("SubtensorModule", "TimelockedWeightsCommitted", (hotkey, netuid, _hex(blake2_256(sealed)), number))


def reveal(ctx: Context, netuid: int) -> None:
    """Open the timelocked commits whose epoch has come; run it before the epoch of the same block."""
    state = ctx.state
    epoch = schedule.index(state, netuid, ctx.number)
    period = state.number(_P + "RevealPeriodEpochs", netuid)
    if epoch < period:
        return
    if epoch > period and state.exists(_P + "TimelockedWeightCommits", netuid, epoch - period - 1):
        state.delete(_P + "TimelockedWeightCommits", netuid, epoch - period - 1)
    commits = _timelocked(state, netuid, epoch - period)
    if not commits:
        return
    sealed = [commit for commit in commits if not _reveal_one(ctx, netuid, commit)]
    if not sealed:
        state.delete(_P + "TimelockedWeightCommits", netuid, epoch - period)
    elif len(sealed) < len(commits):
        state.put(_P + "TimelockedWeightCommits", (netuid, epoch - period), sealed)


def _reveal_one(ctx: Context, netuid: int, commit: _Commit) -> bool:
    """Open one commit and set its weights. True when it is done with, for better or worse."""
    hotkey, block, sealed, number = commit
    pulse = ctx.state.struct("Drand.Pulses", number)
    if pulse is None:
        return False
    envelope = compact(len(sealed)) + sealed + number.to_bytes(8, "little")
    try:
        opened = bytes(bittensor_core.decrypt_with_signature(envelope, _bytes(pulse["signature"]).hex()))
        uids, values, version = _payload(opened, hotkey)
        with ctx.transaction():
            weights.apply(ctx, hotkey, netuid=netuid, dests=uids, values=values, version_key=version)
    except (ValueError, DispatchError) as error:
        log.info("the weights that %s committed in block %d are void: %s", hotkey, block, error)
    else:
        ctx.emit("SubtensorModule", "TimelockedWeightsRevealed", (netuid, hotkey))
    return True


def _payload(data: bytes, hotkey: str) -> tuple[list[int], list[int], int]:
    """(uids, weights, version key) of an opened commit. ValueError when it is another hotkey's or malformed."""
    length, at = read_compact(data, 0)
    if data[at : at + length] != _public_key(hotkey):
        raise ValueError("it was sealed for another hotkey")
    uids, at = _u16s(data, at + length)
    values, at = _u16s(data, at)
    if len(data) != at + 8:
        raise ValueError(f"its version key has {len(data) - at} bytes, not 8")
    return uids, values, int.from_bytes(data[at:], "little")


def _u16s(data: bytes, at: int) -> tuple[list[int], int]:
    count, at = read_compact(data, at)
    end = at + 2 * count
    if end > len(data):
        raise ValueError(f"a vector of {count} numbers ends beyond its {len(data)} bytes")
    return [int.from_bytes(data[i : i + 2], "little") for i in range(at, end, 2)], end


# hashed ---------------------------------------------------------------------------------------------


def _commit_hash(ctx: Context, hotkey: str, args: Args) -> None:
    netuid, state, digest = args.number("netuid"), ctx.state, args.blob("commit_hash")
    _check_enabled(ctx, netuid)
    uid = _check_committer(ctx, netuid, hotkey)
    epoch = schedule.index(state, netuid, ctx.number)
    commits, _ = _hashed(ctx, netuid, hotkey, epoch)
    if len(commits) >= MAX_UNREVEALED:
        raise DispatchError("TooManyUnrevealedCommits")
    # The fourth field is a legacy of the runtime's, unused and 0.
    state.put(_P + "WeightCommits", (netuid, hotkey), [*commits, (_hex(digest), epoch, ctx.number, 0)])
    weights.touch(ctx, netuid, uid)
    ctx.emit("SubtensorModule", "WeightsCommitted", (hotkey, netuid, _hex(digest)))


def _reveal_hash(ctx: Context, hotkey: str, args: Args) -> None:
    netuid, state = args.number("netuid"), ctx.state
    _check_enabled(ctx, netuid)
    if not state.exists(_P + "WeightCommits", netuid, hotkey):
        raise DispatchError("NoWeightsCommitFound")
    uids, values, version = args.numbers("uids"), args.numbers("values"), args.number("version_key")
    digest = commit_hash(hotkey, netuid, uids, values, args.numbers("salt"), version)
    epoch = schedule.index(state, netuid, ctx.number)
    commits, expired = _hashed(ctx, netuid, hotkey, epoch)
    if _hex(digest) in expired:
        raise DispatchError("ExpiredWeightCommit")
    if not commits:
        raise DispatchError("NoWeightsCommitFound")
    hashes = [found for found, *_ in commits]
    if _hex(digest) not in hashes:
        raise DispatchError("InvalidRevealCommitHashNotMatch")
    at = hashes.index(_hex(digest))
    if epoch != commits[at][1] + state.number(_P + "RevealPeriodEpochs", netuid):
        raise DispatchError("RevealTooEarly")
    if commits[at + 1 :]:
        state.put(_P + "WeightCommits", (netuid, hotkey), commits[at + 1 :])
    else:
        state.delete(_P + "WeightCommits", netuid, hotkey)
    weights.apply(ctx, hotkey, netuid=netuid, dests=uids, values=values, version_key=version)
    ctx.emit("SubtensorModule", "WeightsRevealed", (hotkey, netuid, _hex(digest)))


def commit_hash(
    hotkey: str, netuid: int, uids: list[int], values: list[int], salt: list[int], version_key: int
) -> bytes:
    """What a hashed commit commits to: blake2-256 of the SCALE tuple of all of these."""
    parts = [_public_key(hotkey), netuid.to_bytes(2, "little")]
    for numbers in (uids, values, salt):
        parts += [compact(len(numbers)), *(number.to_bytes(2, "little") for number in numbers)]
    return blake2_256(b"".join(parts) + version_key.to_bytes(8, "little"))


def _hashed(ctx: Context, netuid: int, hotkey: str, epoch: int) -> tuple[list[tuple[str, int, int, int]], list[str]]:
    """A hotkey's hashed commits, oldest first, and the hashes of those before them that have expired."""
    stored = ctx.state.value(_P + "WeightCommits", netuid, hotkey) or []
    commits = list(cast("list[tuple[str, int, int, int]]", stored))
    period = ctx.state.number(_P + "RevealPeriodEpochs", netuid)
    expired = [digest for digest, committed, *_ in commits if epoch > committed + period]
    return commits[len(expired) :], expired


# both -----------------------------------------------------------------------------------------------


def oldest_commits(state: Reader, netuid: int, hotkeys: list[str], number: int) -> dict[int, int]:
    """By uid, the block of its oldest commit that has not expired."""
    epoch = schedule.index(state, netuid, number)
    period = state.number(_P + "RevealPeriodEpochs", netuid)
    uids = {hotkey: uid for uid, hotkey in enumerate(hotkeys)}
    oldest: dict[int, int] = {}
    for at in range(max(0, epoch - period), epoch + 1):
        for hotkey, block, _, _ in _timelocked(state, netuid, at):
            if hotkey in uids:
                oldest[uids[hotkey]] = min(block, oldest.get(uids[hotkey], block))
    for hotkey, uid in uids.items():
        stored = state.value(_P + "WeightCommits", netuid, hotkey) or []
        for _, committed, block, _ in cast("list[tuple[str, int, int, int]]", stored):
            if epoch <= committed + period:
                oldest[uid] = min(block, oldest.get(uid, block))
    return oldest


def _check_enabled(ctx: Context, netuid: int) -> None:
    if not neurons.subnet_exists(ctx.state, netuid):
        raise DispatchError("SubnetNotExists")
    if not ctx.state.flag(_P + "CommitRevealWeightsEnabled", netuid):
        raise DispatchError("CommitRevealDisabled")


def _check_committer(ctx: Context, netuid: int, hotkey: str) -> int:
    uid = neurons.uid_of(ctx.state, netuid, hotkey)
    if uid is None:
        raise DispatchError("HotKeyNotRegisteredInSubNet")
    if weights.too_soon(ctx, netuid, uid):
        raise DispatchError("CommittingWeightsTooFast")
    return uid


def _on_mechanism(call: Function) -> Function:
    def checked(ctx: Context, hotkey: str, args: Args) -> None:
        weights.check_mechanism(ctx, args)
        call(ctx, hotkey, args)

    return checked


def _public_key(hotkey: str) -> bytes:
    return bytes(bittensor_core.Keypair(ss58_address=hotkey, ss58_format=SS58_FORMAT).public_key)


def _bytes(value: object) -> bytes:
    """A stored byte string, which the codec gives as it gives arguments (`Args.blob`)."""
    return Args({"value": value}).blob("value")


def _hex(data: bytes) -> str:
    return "0x" + data.hex()


CALLS: Mapping[str, Function] = {
    "commit_weights": _commit_hash,
    "commit_mechanism_weights": _on_mechanism(_commit_hash),
    "reveal_weights": _reveal_hash,
    "reveal_mechanism_weights": _on_mechanism(_reveal_hash),
    "commit_timelocked_weights": _commit_timelocked,
    "commit_timelocked_mechanism_weights": _on_mechanism(_commit_timelocked),
}
