"""What a validator reads from a closed ledger alone: which windows pay, and that heads trained on their own samples."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from neurons.auditing import payable, wrong_data
from subnet.identity import Identity
from subnet.trust.finding import Check, Grade
from subnet.trust.heads import Ack, ack_message, chain
from subnet.trust.ledger import Direction, Evidence
from tests.neurons.swarm import Swarm, manifest, open_corpus, tiny, tokens_file

RUN = b"a run id"
VALIDATORS = [Identity.from_uri(f"//validator-{index}") for index in range(3)]
STAKES = {identity.hotkey: 1.0 for identity in VALIDATORS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Swarm, str, Evidence]:
    """A head's closed ledger of a few windows."""
    folder = tmp_path_factory.mktemp("run")
    entry = tokens_file(folder)
    loaded = manifest(tiny(), entry, stages=2, replicas=1, accumulation=2).write(folder / "manifest.toml")
    swarm = Swarm(loaded, open_corpus(folder, loaded.manifest, entry), replicas=1)

    async def whole() -> tuple[Swarm, str, Evidence]:
        async with swarm:
            head = swarm.stage(0)[0]
            await head.worker.drive(limit=6)
            _, evidence = await head.worker.close()
            return swarm, head.identity.hotkey, evidence

    return asyncio.run(whole())


def ack(validator: Identity, evidence: Evidence, hotkey: str, count: int, *, slot: int = 0, number: int = 0) -> Ack:
    digest = chain(evidence.heads)[count]
    said = ack_message(RUN, number, hotkey=hotkey, count=count, digest=digest, slot=slot)
    return Ack(validator.hotkey, count, slot, validator.sign(said))


def test_windows_pay_by_the_word_of_most_of_the_stake_or_ones_own(trained: tuple[Swarm, str, Evidence]) -> None:
    _, hotkey, evidence = trained
    every = frozenset(head.version for head in evidence.heads)
    count = len(evidence.heads)
    assert count > 2
    first, second, third = VALIDATORS

    def pays(*acks: Ack, own: Identity = third) -> frozenset[int]:
        return payable(replace(evidence, acks=acks), RUN, 0, hotkey, STAKES, own.hotkey)

    whole = [ack(validator, evidence, hotkey, count) for validator in VALIDATORS]
    assert pays(*whole[:2]) == every
    assert pays(whole[0]) == frozenset()
    assert pays(whole[2]) == every
    assert pays(ack(first, evidence, hotkey, 1), whole[1]) == {evidence.heads[0].version}
    assert pays(whole[0], whole[0], whole[0]) == frozenset()
    late = [ack(validator, evidence, hotkey, count, slot=1) for validator in (first, second)]
    assert pays(*late) == frozenset()
    other_round = [ack(validator, evidence, hotkey, count, number=1) for validator in (first, second)]
    assert pays(*other_round) == frozenset()
    forged = replace(whole[0], validator=second.hotkey)
    assert pays(whole[0], forged) == frozenset()
    beyond = replace(whole[1], count=count + 1)
    assert pays(whole[0], beyond) == frozenset()
    stranger = ack(Identity.from_uri("//stranger"), evidence, hotkey, count)
    assert pays(whole[0], stranger) == frozenset()


def test_a_head_that_trained_on_other_tokens_is_proven(trained: tuple[Swarm, str, Evidence]) -> None:
    swarm, hotkey, evidence = trained
    assert wrong_data(hotkey, 0, evidence, swarm.corpus) == []
    forward = [leaf for leaf in evidence.leaves if leaf.direction is Direction.FORWARD]
    cheated = replace(forward[1], input=forward[0].input)
    leaves = tuple(cheated if leaf.key == cheated.key else leaf for leaf in evidence.leaves)
    (finding,) = wrong_data(hotkey, 0, replace(evidence, leaves=leaves), swarm.corpus)
    assert (finding.check, finding.grade, finding.sample) == (Check.DATA, Grade.PROOF, cheated.sample)
    assert not finding.passed
