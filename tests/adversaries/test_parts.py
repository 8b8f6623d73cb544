"""The parts that stand for a real miner's: places, false shards, forged receipts, copied weights."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
import torch

from model.optimizer import OptimizerConfig, OuterConfig
from model.recompute import Recompute
from model.split import split
from model.stage import build_stage
from neurons.archive import Archive
from neurons.library import Library
from neurons.quota import Uplink
from neurons.terms import Marks, Terms
from subnet.identity import verify
from subnet.messages import UnitRequest
from subnet.swarm.butterfly import reduce
from subnet.swarm.codec import codec_of, no_residual
from subnet.swarm.merge import Merged
from subnet.transport.errors import Dropped, Unavailable
from subnet.trust.ledger import Direction, UnitKey
from subnet.trust.settlement import Unpaid, settle
from tests.adversaries.copier import mean_row
from tests.adversaries.engine import SharedEngine
from tests.adversaries.evidence import SilentDesk
from tests.adversaries.forging import ForgingWorker
from tests.adversaries.holders import lying
from tests.adversaries.kinds import PROFILES, AdversaryError, Kind, Role
from tests.adversaries.places import accomplice, check, choose, fits, role_of
from tests.adversaries.program import run
from tests.neurons.swarm import SEED, Swarm, manifest, open_corpus, tiny, tokens_file

STAGES = [["a", "b"], ["c", "d"], ["e", "f"]]


# -- places --------------------------------------------------------------------------------------------------------


def test_each_kind_finds_the_last_stage_that_fits_it() -> None:
    alone = {kind: list(choose([kind], STAGES)) for kind in Kind if PROFILES[kind].role is not Role.VALIDATOR}
    assert alone[Kind.NOISE] == ["e"]
    assert alone[Kind.WRONG_DATA] == ["a"]
    assert alone[Kind.POISONED_LOSS] == ["e"]
    assert alone[Kind.FORGED_RECEIPTS] == ["c"]
    assert alone[Kind.COLLUDING_HOLDERS] == alone[Kind.SYBIL] == ["e", "f"]
    assert accomplice("c", STAGES) == "e"
    assert accomplice("e", STAGES) is None


def test_several_kinds_share_no_replica() -> None:
    chosen = choose([Kind.NOISE, Kind.SIGN_FLIP, Kind.REPLAY, Kind.WRONG_DATA], STAGES)
    assert chosen == {"e": Kind.NOISE, "f": Kind.SIGN_FLIP, "c": Kind.REPLAY, "a": Kind.WRONG_DATA}
    with pytest.raises(AdversaryError, match="'poisoned-loss' needs a tail, and none is left in 3 stages"):
        choose([Kind.NOISE, Kind.SIGN_FLIP, Kind.POISONED_LOSS], STAGES)
    with pytest.raises(AdversaryError, match="pair of siblings"):
        choose([Kind.SYBIL], [["a"], ["b"]])


@pytest.mark.parametrize(
    ("kinds", "changed", "words"),
    [
        (["signflip"], {}, "did you mean 'sign-flip'"),
        (["wrong-data"] * 3, {}, "needs a head, and none is left"),
        (["lying-holder"], {"gathers": True}, "give --codec int8"),
        (["sybil"], {"named": True}, "leave out the uid"),
        (["colluding-holders"], {"replicas": 1}, "pair of siblings"),
    ],
)
def test_a_swarm_that_has_no_place_is_refused(kinds: list[str], changed: dict[str, int], words: str) -> None:
    shape: dict[str, int] = {"stages": 2, "replicas": 2, "gathers": False, "named": False}
    check(["noise", "wrong-data"], **shape)  # type: ignore[arg-type]
    with pytest.raises(AdversaryError, match=words):
        check(kinds, **{**shape, **changed})  # type: ignore[arg-type]


def test_a_validator_holds_no_stage() -> None:
    assert not any(fits(Role.VALIDATOR, stage, 3) for stage in range(3))


# -- holders -------------------------------------------------------------------------------------------------------


def terms(codec: str) -> Terms:
    return Terms(
        number=0,
        replicas=("a", "b"),
        count=300,
        marks=Marks(cut=1, have=2, merge=3, end=4, margin=1),
        codec=codec_of(codec),
        outer=OuterConfig(lr=1.0, momentum=0.0),
        limit=lambda _: 1.0,
        clip=2.0,
        secret=b"",
    )


def test_a_lying_holder_sends_what_it_has_and_merges_something_else() -> None:
    true, false = terms("int8"), lying(terms("int8"))
    generator = torch.Generator().manual_seed(3)
    delta = 0.01 * torch.randn(300, generator=generator)
    feedback = no_residual(true.codec, 300, 0.95)
    own, said, _ = false.contribution(delta, feedback)
    expected, as_said, _ = true.contribution(delta, feedback)
    assert list(map(bytes, own)) == list(map(bytes, expected))
    assert torch.equal(said, as_said)
    before = Merged(torch.zeros(300), torch.zeros(300))
    honest, lie, again = (reduce(of.codec, before, [delta], of.outer) for of in (true, false, lying(terms("int8"))))
    assert lie.digest == again.digest != honest.digest, "two that collude publish the same"
    assert torch.equal(lie.state.theta, -honest.state.theta)


def test_an_all_gather_has_no_holders_to_lie() -> None:
    gathered = terms("topk2bit")
    assert lying(gathered) is gathered


# -- receipts ------------------------------------------------------------------------------------------------------


async def test_forged_receipts_are_sound_and_pay_nothing(tmp_path: Path) -> None:
    entry = tokens_file(tmp_path)
    loaded = manifest(tiny(), entry, stages=3, replicas=2, accumulation=2).write(tmp_path / "manifest.toml")
    corpus = open_corpus(tmp_path, loaded.manifest, entry)
    swarm = Swarm(loaded, corpus, replicas=2)
    forger, friend = swarm.stage(1)[0].identity.hotkey, swarm.stage(2)[0].identity

    class Forger(ForgingWorker):
        colluder = staticmethod(lambda _: friend)

    swarm.workers[forger] = Forger
    async with swarm:
        for head in swarm.stage(0):
            await head.worker.drive(limit=6)
        archive = swarm.rounds[forger]
        archive.seeded(0, lambda _: {})  # the seed picks no window of those that are closed: they are dropped
        archive.reach(1)
        assert len(archive.windows) == 1
        for head in swarm.stage(0):
            await head.worker.drive(limit=12)
        evidence = {hotkey: (await member.worker.close())[1] for hotkey, member in swarm.members.items()}
    samples = loaded.manifest.samples(0)
    for hotkey, table in evidence.items():
        table.check(stage=swarm.roster.stage_of(hotkey) or 0, samples=samples)
    real = {leaf.sample for leaf in evidence[forger].leaves if leaf.direction is Direction.BACKWARD}
    forged = [leaf for leaf in evidence[forger].leaves if leaf.sample not in real]
    assert len(forged) >= 4
    assert all(
        archive.unit(UnitKey(leaf.sample, leaf.direction)) is not None
        for leaf in forged
        if leaf.version in archive.windows
    )
    settlement = settle(
        loaded.run_id,
        swarm.roster,
        evidence,
        verify,
        first_sample=samples.start,
        seed=SEED,
        windows={hotkey: {head.version for head in table.heads} for hotkey, table in evidence.items()},
    )
    assert settlement.paid[forger].unpaid == {Unpaid.NOT_COMPLETED: len(forged)}
    assert settlement.paid[forger].units == 2 * len(real)
    assert not settlement.findings
    assert not settlement.paid[friend.hotkey].unpaid, "what a friend signs for costs it nothing and brings it nothing"


# -- weights -------------------------------------------------------------------------------------------------------


def test_a_copier_sets_the_mean_of_the_others() -> None:
    rows = {5: {1: 0.5, 2: 0.5}, 6: {1: 1.0}, 7: {2: 1.0}, 8: {}}
    assert mean_row(rows, own=7) == {1: 0.75, 2: 0.25}
    assert mean_row({7: {1: 1.0}}, own=7) == {}


# -- the program ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["signflip"], "did you mean 'sign-flip'"),
        (["noise", "--share", "0"], "a share of 0 of the units"),
        (["noise,replay"], "several kinds go with --first"),
        (["noise,weight-copier", "--first"], "are those of miners"),
        (["noise"], "--wallet"),
    ],
)
def test_what_cannot_be_played_is_a_usage_error(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(argv)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_kind_is_a_miners_or_a_validators() -> None:
    assert [role_of("noise"), role_of("weight-copier")] == ["miner", "validator"]


# -- desks and devices -------------------------------------------------------------------------------------------


async def test_a_silent_desk_refuses_units_while_it_is_silent(tmp_path: Path) -> None:
    loaded = manifest(tiny(), tokens_file(tmp_path), stages=2).write(tmp_path / "manifest.toml")
    shows = [True]

    class Desk(SilentDesk):
        silent = staticmethod(lambda: not shows[0])

    desk = Desk(loaded.run_id, Archive(), Library(loaded.run_id), Uplink(1e9))
    request = UnitRequest(run=loaded.run_id.hex(), round=0, sample=3, backward=False)
    with pytest.raises(Unavailable, match="round 0 has not begun here"):
        await desk.unit("a", request, {})
    shows[0] = False
    with pytest.raises(Dropped, match="sample 3 of round 0 is not shown"):
        await desk.unit("a", request, {})


def test_two_identities_on_one_device_take_turns(tmp_path: Path) -> None:
    class OneDevice(SharedEngine):
        device = tmp_path / "device"

    config = tiny()
    plan = split(config, 1)[0]
    engine = OneDevice(
        build_stage(config, plan, 1),
        OptimizerConfig(kind="adamw", lr=1e-3),
        plan,
        n_total_params=1,
        accumulation=1,
        recompute=Recompute.KEEP,
        capacity=1,
    )
    busy: list[bool] = []

    def look(*_: object) -> None:
        with OneDevice.device.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                busy.append(False)
            except BlockingIOError:
                busy.append(True)

    engine.stage.register_forward_hook(look)
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    engine.tail(0, tokens[:, :-1], tokens[:, 1:])
    look()
    assert busy == [True, False], "held while it computes, free afterwards"
