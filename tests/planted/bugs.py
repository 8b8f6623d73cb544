"""Bugs that a hurried change could bring, each with the test that has to see it.

`python -m tests.planted` plants them one by one in a copy of the checkout and runs that test there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Planted:
    """One change of one file. `old` stands there exactly `times`; the first of them is changed."""

    name: str
    file: str
    old: str
    new: str
    caught_by: str
    """What pytest is told, or `orion sim` with its options."""
    times: int = 1


BUGS = (
    Planted(
        "a gradient that comes twice is computed twice",
        "neurons/pipeline.py",
        "        if key in current.receipts:\n            first, receipt",
        "        if key not in current.receipts and not caller:\n            first, receipt",
        "tests/neurons/test_pipeline.py",
    ),
    Planted(
        "acknowledgements of windows are lost",
        "neurons/rounds.py",
        "return replace(evidence, acks=await journal.settle())",
        "return replace(evidence, acks=(await journal.settle())[:0])",
        "sim --seed 1 --calm --minutes 9 --stages 2 --replicas 2",
    ),
    Planted(
        "a round's base is off by one",
        "neurons/rounds.py",
        "return max(0, roster.round - self.overlapped)",
        "return roster.round",
        "sim --seed 1 --calm --minutes 9 --stages 2 --replicas 2",
    ),
    Planted(
        "the seed of a slot is known before the slot ends",
        "neurons/slots.py",
        "slot_end(slot, rules.slot) + rules.seed_delay",
        "slot_end(slot, rules.slot) - rules.slot",
        "tests/neurons/test_slots.py",
    ),
    Planted(
        "unsigned receipts are taken",
        "subnet/trust/settlement.py",
        "self._signed[key] = consumer is not None and self.verify(",
        "self._signed[key] = consumer is not None or self.verify(",
        "tests/subnet/trust/test_settlement.py",
    ),
    Planted(
        "evidence need not hash to its root",
        "neurons/fetching.py",
        "        if bind_roots(bytes.fromhex(reply.payload), tables.root) != record.root:",
        "        if not bind_roots(bytes.fromhex(reply.payload), tables.root):",
        "tests/neurons/test_auditing.py",
    ),
    Planted(
        "a request may be sent twice",
        "subnet/transport/admission.py",
        "        if key in self._young or key in self._old:",
        "        if key in self._old:",
        "tests/subnet/transport",
    ),
    Planted(
        "a body need not be the one that was signed",
        "subnet/transport/axon.py",
        "if running.digests() != ticket.digests:",
        "if running.digests() is ticket.digests:",
        "tests/subnet/transport/test_axon.py",
    ),
    Planted(
        "graphs survive a step",
        "model/engine.py",
        "        self._drop_graphs()  # they end with these weights,",
        "        # they end with these weights,",
        "tests/model/test_engine.py",
    ),
    Planted(
        "a checkpoint is read without its proof",
        "model/checkpoint.py",
        "    if found != header.digest:",
        "    if not found:",
        "tests/model/test_checkpoint.py",
    ),
    Planted(
        "a newcomer is held to a state that it cannot have had",
        "neurons/follower.py",
        "self._public[stage], self._before[stage] = found, None",
        "self._public[stage] = self._before[stage] = found",
        "tests/neurons/test_follower.py",
    ),
    Planted(
        "a validator with a dead line condemns everybody",
        "neurons/auditing.py",
        "            if len(absent) > answered:",
        "            if len(absent) < answered:",
        "tests/neurons/test_auditing.py",
    ),
    Planted(
        "weights may change without a merge",
        "subnet/trust/continuity.py",
        "if not head.merged and head.weights != before.next_weights:",
        "if head.merged and head.weights != before.next_weights:",
        "tests/subnet/trust",
    ),
    Planted(
        "heads start one sample twice",
        "subnet/swarm/routing.py",
        "    return base + index * heads + head\n",
        "    return base + index * (heads - 1) + head\n",
        "tests/subnet/swarm",
    ),
    Planted(
        "a unit may be in a ledger twice",
        "subnet/trust/ledger.py",
        "if leaf.stage != stage or leaf.sample not in samples or leaf.key in seen:",
        "if leaf.stage != stage or leaf.sample not in samples:",
        "tests/subnet/trust",
    ),
    Planted(
        "windows that nobody acknowledged are paid",
        "subnet/trust/heads.py",
        "return tuple(sum(stakes[name] for name in names) * 2 > whole for names in have)",
        "return tuple(sum(stakes[name] for name in names) * 2 >= 0 for names in have)",
        "tests/neurons/test_notary.py",
    ),
    Planted(
        "the replay cache forgets a generation too early",
        "subnet/transport/admission.py",
        "            self._old, self._young = self._young, set()\n",
        "            self._old, self._young = set(), set()\n",
        "tests/machines/test_replay_cache.py",
    ),
    Planted(
        "what was forgotten may come again after a clock that stepped back",
        "subnet/transport/admission.py",
        "max(self._floor, max((nonce + 1 for _, nonce in self._old), default=0))",
        "max((nonce + 1 for _, nonce in self._old), default=self._floor)",
        "tests/subnet/transport/test_admission.py",
    ),
    Planted(
        "validators cannot afford to look at steps of small stages",
        "subnet/trust/quota.py",
        "        return 2 * self.state + self.looks + previous",
        "        return 2 * self.state + previous",
        "tests/neurons/test_quota.py",
    ),
    Planted(
        "who is asked after a copy of the request is held for silent",
        "neurons/fetching.py",
        "TRY_AGAIN = (Busy, Unavailable, Unreachable, ReplayedRequest)",
        "TRY_AGAIN = (Busy, Unavailable, Unreachable)",
        "tests/neurons/test_auditing.py",
    ),
    Planted(
        "leavers are shut out before their merge is over",
        "neurons/node.py",
        "hotkey in self.validators or hotkey in self.left or",
        "hotkey in self.validators or",
        "tests/neurons/test_node.py",
    ),
    Planted(
        "strikes are forgotten by going away",
        "subnet/swarm/membership.py",
        "                elif member.strikes:\n                    self._wait_out",
        "                elif member.strikes > MAX_STRIKES:\n                    self._wait_out",
        "tests/subnet/swarm/test_membership.py",
    ),
    Planted(
        "an activation is offered again to a replica that is full",
        "neurons/delivery.py",
        "                    self._full[hop] = asyncio.get_running_loop().time() + _pause(refusal)\n",
        "                    self._full[hop] = asyncio.get_running_loop().time() + _pause(refusal) / 2\n",
        "tests/machines/test_routing.py",
    ),
    Planted(
        "a checkpoint too many is deleted",
        "neurons/vault.py",
        "        oldest = whole[: self._keep][-1] if len(whole) >= self._keep else 0",
        "        oldest = whole[0] if whole else 0",
        "tests/machines/test_vault.py",
    ),
    Planted(
        "who speaks and does not answer counts as back",
        "neurons/reach.py",
        "        if not found.deaf:\n            found.down_until",
        "        if found.heard:\n            found.down_until",
        "tests/machines/test_reach.py",
    ),
    Planted(
        "records are charged too little",
        "subnet/localchain/pallets/commitments.py",
        "used += max(MIN_CHARGE, sum(",
        "used += min(MIN_CHARGE, sum(",
        "tests/machines/test_chain.py",
    ),
    Planted(
        "a unit that is computed twice replaces the first",
        "subnet/trust/ledger.py",
        "        if leaf.key in self._leaves:",
        "        if leaf in self._leaves:",
        "tests/machines/test_ledger.py",
    ),
    Planted(
        "what was kept of a round is emptied and never let go",
        "neurons/archive.py",
        "old = [number for number in self._rounds if number <= newest]",
        "old = list({number: entry.clear() for number, entry in self._rounds.items() if number <= newest})[:0]",
        "tests/simulation/test_memory.py",
    ),
)
