"""The pair-shard butterfly: a merge in which every replica reduces a part, and every part has two holders. Pure.

The flat vector of a stage with N replicas is cut into S = N(N-1)/2 contiguous shards, one per unordered pair (one
replica: a single shard of its own). Which pair holds which shard is drawn from a seed that nobody knew at CUT, so no
source can aim at a holder. A holder takes the shard's piece of every source, and returns the merged shard: the mean
change, encoded like a payload. Everybody, holders included, applies the decoded value, so all end on the same bits and
the way back costs as much as the way there. Its rounding is not fed back: a codec with error feedback goes all-gather.

A holder's record carries the digests of its shards. At the MERGE block a shard is accepted iff at least one of its
holders published a digest in time and all published ones are equal; confirmed if both did. Two unequal ones contest
it. A shard that is not accepted keeps its old value and contributions to it carry over, on every replica alike,
because the chain decides and not what a replica holds. Whoever recomputes a shard names the holders whose digest is
another (`liars`); an accepted shard stands all the same, or replicas would part.

Two holders can lie alike about the one shard they share, and no comparison of digests shows it. So each replica
rechecks one accepted shard it does not hold, of its own secret choice, unconfirmed ones first. With all confirmed, each
of the N-2 others picks the pair's shard out of S-(N-1) with equal chance: a colluding pair is caught in a round with
probability 1 - (1 - 1/(S-(N-1)))^(N-2), see `caught`: 1 at N = 3, 0.42 at 5, 0.25 at 8, 0.17 at 12.

Traffic per replica and merge, each way, for W payload bytes: (N-1)·2W/N of pieces and (N-2)·W/N of merged shards, in
all W(3N-4)/N, below 3W for any N. The recheck adds the pieces of one shard, 2W/N; N = 2 has nothing to recheck. An
all-gather moves (N-1)·W.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from torch import Tensor

from model import hashing
from model.optimizer import OuterConfig
from subnet.swarm.codec import Codec, Raw
from subnet.swarm.merge import Merged, Source, mean, step
from subnet.swarm.record import SHARD_DIGEST_BYTES, SHARDS_LIMIT, Phase, Record
from subnet.transport.synapse import tensor_bytes

MOST_REPLICAS = SHARDS_LIMIT // SHARD_DIGEST_BYTES + 1
"""17: a record has room for the digests of 16 shards, and a replica holds one with each of the others."""
NO_DIGEST = bytes(SHARD_DIGEST_BYTES)
"""In a record: its owner has not merged this shard."""


class ButterflyError(Exception):
    """A stage that cannot be cut into pair shards: one line with the value, the limit and what to change."""


def ranges(replicas: int, count: int) -> tuple[range, ...]:
    """The shards of `count` values, sizes differing by one at most; known before anybody knows their holders.

    Raises `ButterflyError` for more than 17 replicas and for fewer values than shards.
    """
    if replicas > MOST_REPLICAS:
        raise ButterflyError(
            f"stage has {replicas} replicas, a record has room for the shards of {MOST_REPLICAS}: use codec topk2bit"
        )
    shards = max(1, replicas * (replicas - 1) // 2)
    if count < shards:
        raise ButterflyError(f"stage has {count} parameters for {shards} shards: use codec topk2bit or fewer replicas")
    marks = [count * shard // shards for shard in range(shards + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(marks))


@dataclass(frozen=True, slots=True)
class Butterfly:
    """Who holds what in one round's merge of one stage."""

    replicas: tuple[str, ...]
    """In hotkey order."""
    pairs: tuple[tuple[str, ...], ...]
    """The holders of each shard, in hotkey order."""
    parts: tuple[range, ...]
    """Where each shard lies in the flat vector."""

    @classmethod
    def draw(cls, replicas: Sequence[str], count: int, seed: bytes) -> Butterfly:
        """The pairs in the order of H(seed ‖ pair) hold the shards. Raises `ButterflyError`, as `ranges`."""
        parts = ranges(len(replicas), count)
        pairs: list[tuple[str, ...]] = list(combinations(replicas, 2)) or [tuple(replicas)]
        pairs.sort(key=lambda pair: hashlib.sha256(b"orion/pair/1" + seed + " ".join(pair).encode()).digest())
        return cls(tuple(replicas), tuple(pairs), parts)

    def holders(self, shard: int) -> tuple[str, ...]:
        return self.pairs[shard]

    def shards_of(self, hotkey: str) -> tuple[int, ...]:
        """The shards this replica holds, N-1 of them, ascending: the order of the digests in its record."""
        return tuple(shard for shard, pair in enumerate(self.pairs) if hotkey in pair)

    def provider(self, shard: int, asker: str) -> str:
        """The holder that `asker` takes the merged shard from: the next one round the circle of replicas.

        Turning the circle changes nothing in this rule, so every replica is asked equally often. Who only watches
        asks from a place of its own.
        """
        place = {hotkey: index for index, hotkey in enumerate(self.replicas)}
        here = place.get(asker, int.from_bytes(hashlib.sha256(asker.encode()).digest()[:8], "little"))
        return min(self.pairs[shard], key=lambda holder: (place[holder] - here) % len(self.replicas))


def shard_sources(
    plan: Butterfly, shard: int, listed: Sequence[Source], records: Mapping[str, Record | None], number: int
) -> tuple[Source, ...]:
    """The listed sources that count in `shard`, from the records at the HAVE block.

    A bit says that its owner holds the source's pieces of all its own shards. A source counts in a shard iff one of the
    shard's holders says so: a piece that neither could get must not hold up the others. Two holders can so leave a
    source out of the shard they share; everybody sees it, and its contribution carries over.
    """
    have = 0
    for holder in plan.holders(shard):
        record = records.get(holder)
        if record is not None and record.round == number and record.phase >= Phase.HAVE:
            have |= record.have
    return tuple(source for source in listed if (have >> source.index) & 1)


@dataclass(frozen=True, slots=True)
class Shard:
    """One merged shard."""

    payload: bytes
    """The mean change, encoded: what a holder returns."""
    state: Merged
    """The shard of the next public state."""
    digest: bytes
    """First 8 bytes of the hash of that: θ, then momentum."""


def part_of(state: Merged, part: range) -> Merged:
    """The shard's part of a public state, views of it."""
    return Merged(state.theta[part.start : part.stop], state.momentum[part.start : part.stop])


def reduce(codec: Codec, before: Merged, contributions: Iterable[Tensor], outer: OuterConfig) -> Shard:
    """Merge one shard, fp32 (m,) each, in hotkey order. Raises `DeltaError` if their sum is beyond what is encoded."""
    return opened(codec, before, codec.encode(mean(contributions)), outer)


def opened(codec: Codec, before: Merged, payload: Raw, outer: OuterConfig) -> Shard:
    """The shard that a holder's reply stands for; the caller compares its digest. Raises `PayloadError`."""
    state = step(before, codec.decode(payload, before.theta.numel()), outer)
    digest = hashing.digest(tensor_bytes(state.theta), tensor_bytes(state.momentum))
    return Shard(bytes(payload), state, digest[:SHARD_DIGEST_BYTES])


def digests_of(plan: Butterfly, records: Mapping[str, Record | None], number: int) -> tuple[dict[str, bytes], ...]:
    """Per shard, what its holders published for round `number`, from the records at the MERGE block."""
    published: tuple[dict[str, bytes], ...] = tuple({} for _ in plan.pairs)
    for hotkey in plan.replicas:
        record, mine = records.get(hotkey), plan.shards_of(hotkey)
        if record is None or record.round != number or record.phase < Phase.HAVE:
            continue
        if len(record.shards) != len(mine) * SHARD_DIGEST_BYTES:
            continue
        for place, shard in enumerate(mine):
            digest = record.shards[place * SHARD_DIGEST_BYTES : (place + 1) * SHARD_DIGEST_BYTES]
            if digest != NO_DIGEST:
                published[shard][hotkey] = digest
    return published


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the chain says of one shard. Neither accepted nor contested: nobody published it."""

    published: Mapping[str, bytes]
    """Digest by holder."""
    holders: int

    @property
    def accepted(self) -> bytes | None:
        """The digest that stands, None if the shard carries over."""
        digests = set(self.published.values())
        return digests.pop() if len(digests) == 1 else None

    @property
    def confirmed(self) -> bool:
        return self.accepted is not None and len(self.published) == self.holders

    @property
    def contested(self) -> bool:
        return len(set(self.published.values())) > 1

    def liars(self, truth: bytes) -> tuple[str, ...]:
        """Holders whose digest is not the recomputed one, in hotkey order."""
        return tuple(sorted(holder for holder, digest in self.published.items() if digest != truth))


def verdicts(plan: Butterfly, records: Mapping[str, Record | None], number: int) -> tuple[Verdict, ...]:
    """Every shard's verdict from the records at the MERGE block."""
    published = digests_of(plan, records, number)
    return tuple(Verdict(digests, len(pair)) for digests, pair in zip(published, plan.pairs, strict=True))


def recheck(plan: Butterfly, judged: Sequence[Verdict], hotkey: str, secret: bytes) -> int | None:
    """The accepted shard that `hotkey` recomputes though it does not hold it; None if there is none.

    Unconfirmed ones come first. `secret` is its owner's and new in every round: who could predict the choice would lie
    about another shard.
    """
    foreign = [
        shard
        for shard, verdict in enumerate(judged)
        if verdict.accepted is not None and hotkey not in plan.holders(shard)
    ]
    choice = [shard for shard in foreign if not judged[shard].confirmed] or foreign
    if not choice:
        return None
    draw = hashlib.sha256(b"orion/recheck/1" + secret).digest()
    return choice[int.from_bytes(draw, "little") % len(choice)]


def caught(replicas: int) -> float:
    """Probability that a colluding pair is caught in a round by the N-2 others' rechecks, all shards confirmed."""
    foreign = replicas * (replicas - 1) // 2 - (replicas - 1)
    return 1 - (1 - 1 / foreign) ** (replicas - 2) if foreign > 0 else 0.0


def butterfly_bytes(replicas: int, payload: int) -> float:
    """Bytes each replica sends, and as many it receives, for `payload` bytes in all shards; without its recheck."""
    return payload * (3 * replicas - 4) / replicas if replicas > 1 else 0.0


def recheck_bytes(replicas: int, payload: int) -> float:
    """What one recheck adds, each way: the pieces of one shard from the N-1 others."""
    return payload * 2 / replicas if replicas > 2 else 0.0


def gather_bytes(replicas: int, payload: int) -> int:
    """Bytes each replica receives in an all-gather."""
    return (replicas - 1) * payload
