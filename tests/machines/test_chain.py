"""The local chain's state against dictionaries: registrations, records and their space, weights, epochs."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from subnet.localchain import neurons
from subnet.localchain.genesis import OWNER_HOTKEY_URI, address
from tests.subnet.localchain.test_localchain_blocks import Bench

NETUID = 9
TEMPO = 60
SPACE = 3_100
"""Bytes that a hotkey may commit in an epoch, as the metadata has it."""
RECORDS = st.sampled_from((b"", b"small", bytes(108), bytes(range(128))))
HOTKEYS = ("//Bob//hotkey", "//Bob//second", "//Bob//third")


class Subnet(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.bench = Bench(tempo=TEMPO)
        self.uids = {OWNER_HOTKEY_URI: 0}
        self.records: dict[str, bytes] = {}
        self.used: dict[str, tuple[int, int]] = {}
        """Epoch and bytes."""
        self.register(HOTKEYS[0])

    @property
    def epoch(self) -> int:
        chain = self.bench.chain
        return chain.snapshot(chain.head.number).number("SubtensorModule.SubnetEpochIndex", NETUID)

    @rule(hotkey=st.sampled_from(HOTKEYS))
    def register(self, hotkey: str) -> None:
        failed = self.bench.register(hotkey=hotkey)
        if hotkey in self.uids:
            assert failed == "HotKeyAlreadyRegisteredInSubNet"
        else:
            assert failed is None
            self.uids[hotkey] = len(self.uids)

    @rule(hotkey=st.sampled_from(HOTKEYS), data=RECORDS, times=st.sampled_from((1, 35)))
    def commit(self, hotkey: str, data: bytes, times: int) -> None:
        for _ in range(times):
            self.commit_once(hotkey, data)

    def commit_once(self, hotkey: str, data: bytes) -> None:
        failed = self.bench.commit(hotkey, {f"Raw{len(data)}": data})
        if hotkey not in self.uids:
            assert failed is not None
            return
        epoch, charged = self.epoch, max(100, len(data))
        known, used = self.used.get(hotkey, (epoch, 0))
        used = used if known == epoch else 0
        if used + charged > SPACE:
            assert failed == "SpaceLimitExceeded"
        else:
            assert failed is None
            self.used[hotkey] = epoch, used + charged
            self.records[hotkey] = data

    @rule(count=st.integers(1, 2 * TEMPO))
    def blocks(self, count: int) -> None:
        before = self.epoch, self.bench.chain.head.number
        for _ in range(count):
            self.bench.block()
        assert count // TEMPO <= self.epoch - before[0] <= -(-count // TEMPO)
        assert self.bench.chain.head.number == before[1] + count

    @invariant()
    def state_is_what_was_done(self) -> None:
        if not hasattr(self, "bench"):
            return
        chain = self.bench.chain
        state = chain.snapshot(chain.head.number)
        assert neurons.hotkeys(state, NETUID) == [address(uri) for uri in self.uids]
        for uri in HOTKEYS:
            found = state.struct("Commitments.CommitmentOf", NETUID, address(uri))
            if uri not in self.records:
                assert found is None
                continue
            assert found is not None
            ((kind, value),) = found["info"]["fields"][0].items()  # type: ignore[index]
            data = bytes.fromhex(value[2:]) if isinstance(value, str) else bytes(value)
            assert (kind, data) == (f"Raw{len(self.records[uri])}", self.records[uri])

    @invariant()
    def the_past_stays(self) -> None:
        if hasattr(self, "bench"):
            chain = self.bench.chain
            hashes = [chain.hash_of(number) for number in range(chain.head.number + 1)]
            assert len({*hashes}) == len(hashes)
            assert None not in hashes


TestChain = Subnet.TestCase
TestChain.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
