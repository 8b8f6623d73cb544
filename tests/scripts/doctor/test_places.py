"""Keys, chain, run and reach: each fault is told apart from the others, with its own fix."""

from dataclasses import replace
from pathlib import Path

import pytest

from model.devices import DEVICES
from model.split import split
from neurons.machine import Card
from scripts.doctor import facts
from scripts.doctor.ask import Answer, Port
from scripts.doctor.chain import (
    BEHIND,
    GENESIS,
    LATE,
    OnChain,
    check_chain,
    check_clock,
    check_protocol,
    check_registration,
    check_subnet,
)
from scripts.doctor.keys import check_coldkey, check_hotkey
from scripts.doctor.machine import Work
from scripts.doctor.options import DoctorOptions, parse
from scripts.doctor.reach import check_address, check_port, check_reach, check_round_trip
from scripts.doctor.report import Finding, Report, Word, fail, ok, skipped, text, warn
from scripts.doctor.run import Shards, check_data, check_manifest, check_uplink, look_at_shards
from scripts.doctor.speed import Crossing, Measured, check_bandwidth
from subnet.manifest import Announcement, LoadedManifest, load_manifest
from subnet.messages import CalledBack
from subnet.transport.knock import Outcome
from subnet.wallets import create_wallet, look_at_keys
from tests.neurons.swarm import manifest, tiny, tokens_file
from tests.subnet.swarm.histories import name, neuron, state


def options(*flags: str) -> DoctorOptions:
    return parse(["--network", "test", "--wallet", "w", "--hotkey", "h", *flags], {})


CHAIN = OnChain(
    seconds=0.4,
    genesis="0x" + "ab" * 32,
    state=state([neuron(0), neuron(1, permit=True)]),
    immunity=4096,
    ahead=0.8,
    waited=6.0,
)
PORT = Port(number=8091)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_keys_as_they_should_be(tmp_path: Path) -> None:
    wallet = create_wallet("w", "h", tmp_path)
    (tmp_path / "w" / "coldkey").unlink()
    keys = look_at_keys("w", "h", tmp_path)
    found = check_hotkey(keys, options("--wallet-path", str(tmp_path)))
    assert found.word is Word.OK
    assert wallet.hotkey.ss58_address in found.found
    assert check_coldkey(keys).word is Word.OK
    assert check_hotkey(None, options()).word is Word.SKIPPED
    assert check_coldkey(None).word is Word.SKIPPED


def test_a_missing_hotkey_names_those_that_are_there(tmp_path: Path) -> None:
    nothing = check_hotkey(look_at_keys("w", "h", tmp_path), options("--wallet-path", str(tmp_path)))
    assert nothing.word is Word.FAIL
    assert "no hotkey of this wallet is here" in nothing.found
    assert f"btcli wallet regen-hotkey -w w -H h --wallet-path {tmp_path}" in nothing.fix
    create_wallet("w", "other", tmp_path)
    found = check_hotkey(look_at_keys("w", "h", tmp_path), options("--wallet-path", str(tmp_path)))
    assert "other" in found.found
    assert found.fix.startswith("--hotkey other, or ")


def test_a_coldkey_on_the_machine_is_warned_of_and_why(tmp_path: Path) -> None:
    create_wallet("w", "h", tmp_path)
    found = check_coldkey(look_at_keys("w", "h", tmp_path))
    assert found.word is Word.WARN
    assert "takes all funds" in found.found
    assert str(tmp_path / "w" / "coldkey") in found.fix


def test_an_encrypted_hotkey_is_named_and_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wallet = create_wallet("w", "h", tmp_path)
    keypair, file = wallet.hotkey, Path(wallet.hotkey_file.path)
    file.unlink()
    wallet.hotkey_file.set_keypair(keypair, encrypt=True, password="secret")  # noqa: S106
    keys = look_at_keys("w", "h", tmp_path)
    assert keys.encrypted
    assert keys.address == wallet.hotkey.ss58_address  # from its public file
    found = check_hotkey(keys, options())
    assert found.word is Word.WARN
    assert "type the password" in found.fix
    assert facts.identity(keys, options()) == (None, "")
    monkeypatch.setenv(keys.password, "not what the SDK writes there")
    given = options("--wallet-path", str(tmp_path))
    keys = look_at_keys("w", "h", tmp_path)
    signer, unusable = facts.identity(keys, given)
    assert signer is None
    wrong = check_hotkey(keys, given, unusable=unusable)
    assert wrong.word is Word.FAIL
    assert "check its password" in wrong.found
    assert "not what" not in wrong.found + wrong.fix


def test_a_damaged_hotkey_is_a_failure(tmp_path: Path) -> None:
    wallet = create_wallet("w", "h", tmp_path)
    Path(wallet.hotkey_file.path).write_text("{}")
    found = check_hotkey(look_at_keys("w", "h", tmp_path), options())
    assert found.word is Word.FAIL
    assert "regen-hotkey" in found.fix


# -- chain ------------------------------------------------------------------------------------------------------------


def test_a_chain_that_is_there_one_that_is_not_and_one_that_stands_still() -> None:
    assert check_chain(CHAIN, "", options()).word is Word.OK
    gone = check_chain(None, "no answer within 15 s", options())
    assert (gone.word, gone.found) == (Word.FAIL, "no answer within 15 s")
    assert "--network" in gone.fix
    still = check_chain(replace(CHAIN, ahead=None, waited=40.0), "", options())
    assert still.word is Word.FAIL
    assert "no new block in 40 s" in still.found
    assert check_chain(replace(CHAIN, seconds=9.0), "", options()).word is Word.WARN
    other = check_chain(CHAIN, "", options("--network", "finney"))
    assert other.word is Word.FAIL
    assert GENESIS["finney"][:10] in other.found


def test_a_subnet_that_does_not_exist() -> None:
    assert "2 neurons, 1 with a validator permit" in check_subnet(CHAIN, "", options()).found
    assert check_subnet(None, "", options()).word is Word.SKIPPED
    found = check_subnet(None, "network test has no subnet 77", options())
    assert found.word is Word.FAIL
    assert "btcli subnets list -n test" in found.fix


@pytest.mark.parametrize(
    ("ahead", "word", "words"),
    [
        (0.5, Word.OK, "0.5 s after its own time"),
        (LATE + BEHIND - 0.1, Word.OK, ""),
        (-BEHIND + 0.1, Word.OK, ""),
        (-BEHIND - 0.1, Word.FAIL, "behind"),
        (-60.0, Word.FAIL, "60.0 s or more behind"),
        (42.0, Word.FAIL, "ahead by some 40 s"),
    ],
)
def test_a_clock_that_is_off_by_more_than_peers_allow(ahead: float, word: Word, words: str) -> None:
    found = check_clock(replace(CHAIN, ahead=ahead))
    assert found.word is word
    assert words in found.found
    assert ("set-ntp" in found.fix) == (word is Word.FAIL)


def test_no_clock_without_blocks() -> None:
    assert check_clock(None).word is Word.SKIPPED
    assert check_clock(replace(CHAIN, ahead=None)).word is Word.SKIPPED


def test_registration_permit_and_immunity() -> None:
    stranger = check_registration(CHAIN, name(7), options("--netuid", "9"))
    assert stranger.word is Word.FAIL
    assert "btcli subnets register --netuid 9 -w w -H h -n test" in stranger.fix
    new = check_registration(CHAIN, name(0), options())
    assert new.word is Word.OK
    assert f"immune for {1 + 4096 - CHAIN.state.head.number} blocks more" in new.found
    old = check_registration(replace(CHAIN, immunity=0), name(0), options())
    assert old.word is Word.WARN
    assert "any newcomer may take its place" in old.found
    assert check_registration(CHAIN, name(1), options("--role", "validator")).word is Word.OK
    poor = check_registration(CHAIN, name(0), options("--role", "validator"))
    assert poor.word is Word.FAIL
    assert "btcli stake add --netuid 9" in poor.fix
    assert check_registration(None, name(0), options()).found == "needs the chain"
    assert check_registration(None, None, options()).found == "needs the chain and a hotkey"


def announcing(*versions: int) -> OnChain:
    return replace(CHAIN, state=state([replace(neuron(uid), protocol=one) for uid, one in enumerate(versions)]))


def test_which_protocol_the_others_speak() -> None:
    assert check_protocol(None).word is Word.SKIPPED
    assert check_protocol(announcing(1, 1)).found == "1 is spoken here, and by all 2 nodes of Orion on this subnet"
    assert check_protocol(announcing(1, 2)).word is Word.OK
    newer = check_protocol(announcing(1, 4, 2**32 - 1, 4))
    assert newer.word is Word.WARN
    assert newer.found == "1 is spoken here, and not by 3 of 4 nodes, which announce 4, 4294967295"
    assert "upgrade Orion" in newer.fix
    assert not check_protocol(announcing(0, 1)).fix
    stranger = replace(CHAIN, state=state([replace(neuron(0), record=b"another's", protocol=1234)]))
    assert check_protocol(stranger).word is Word.SKIPPED


# -- run --------------------------------------------------------------------------------------------------------------


def published(folder: Path) -> tuple[LoadedManifest, OnChain]:
    """A manifest whose authority, uid 0, has announced it."""
    content = manifest(tiny(), tokens_file(folder / "data"), stages=2)
    content = content.model_copy(update={"run": content.run.model_copy(update={"authority": name(0)})})
    loaded = content.write(folder / "manifest.toml")
    authority = replace(neuron(0), record=Announcement(0, loaded.digest).encode())
    return loaded, replace(CHAIN, state=state([authority, neuron(1)]))


def test_a_manifest_must_be_the_announced_one(tmp_path: Path) -> None:
    loaded, chain = published(tmp_path)
    assert check_manifest(loaded, "", chain, name(1), options()).word is Word.OK
    (tmp_path / "altered.toml").write_bytes((tmp_path / "manifest.toml").read_bytes() + b"\n")
    altered = load_manifest(tmp_path / "altered.toml")
    wrong = check_manifest(altered, "", chain, name(1), options())
    assert wrong.word is Word.FAIL
    assert loaded.digest.hex()[:16] in wrong.found
    assert altered.digest.hex()[:16] in wrong.found
    assert wrong.fix.startswith("--manifest with the file")
    assert check_manifest(loaded, "", CHAIN, name(1), options()).word is Word.FAIL  # nothing announced
    assert check_manifest(loaded, "", None, name(1), options()).word is Word.SKIPPED
    assert check_manifest(None, "", chain, None, options()).word is Word.SKIPPED
    unread = check_manifest(None, "manifest x cannot be read", chain, None, options())
    assert unread.word is Word.FAIL


def test_a_manifest_for_somebody_else(tmp_path: Path) -> None:
    loaded, chain = published(tmp_path)
    assert check_manifest(loaded, "", chain, name(1), options("--netuid", "8")).fix == "--netuid 9"
    assert check_manifest(loaded, "", chain, name(1), options("--stage", "2")).fix == "--stage 0 to 1"
    authority = check_manifest(loaded, "", chain, name(0), options())
    assert authority.word is Word.FAIL
    assert authority.fix.startswith("--hotkey")
    crowded = check_manifest(loaded, "", replace(chain, space_limit=10), name(1), options())
    assert crowded.word is Word.FAIL


def test_shards_are_there_whole_and_the_right_ones(tmp_path: Path) -> None:
    loaded, _ = published(tmp_path)
    given = options("--data", str(tmp_path / "data"))
    quick = check_data(look_at_shards(loaded, tmp_path / "data", deep=False), given)
    assert quick.word is Word.OK
    assert "--deep" in quick.found
    assert "hashes as in the manifest" in check_data(look_at_shards(loaded, tmp_path / "data", deep=True), given).found
    (tmp_path / "data" / "tokens.bin").write_bytes(bytes(80_000))
    broken = check_data(look_at_shards(loaded, tmp_path / "data", deep=True), given)
    assert broken.word is Word.FAIL
    assert "tokens.bin" in broken.found
    missing = check_data(look_at_shards(loaded, tmp_path / "elsewhere", deep=True), given)
    assert missing.word is Word.FAIL
    assert "1 of 1 shards missing" in missing.found
    assert check_data(None, given).word is Word.SKIPPED
    assert check_data(Shards(count=3, bytes=0, missing=("a", "b")), given).found.endswith("a and 1 more")


def test_an_uplink_below_what_validators_count_on() -> None:
    assert check_uplink(options("--uplink", "200mbit"), least=80e6).word is Word.OK
    assert check_uplink(options("--uplink", "50mbit"), least=80e6).word is Word.FAIL
    assert check_uplink(options("--uplink", "50mbit", "--role", "validator"), least=80e6).word is Word.OK


# -- reach ------------------------------------------------------------------------------------------------------------


def answer(outcome: Outcome | None = Outcome.ANSWERED, *, source: str = "198.51.100.7", uid: int = 3) -> Answer:
    called = CalledBack(source=source, outcome=outcome, seconds=0.04)
    return Answer(uid=uid, ip="8.8.8.8", round_trip=0.02, called=called)


def test_the_port() -> None:
    assert check_port(PORT, options()).word is Word.OK
    taken = check_port(Port(number=8091, problem="cannot listen on 0.0.0.0 port 8091"), options())
    assert taken.word is Word.FAIL
    assert "ss -ltnp 'sport = :8091'" in taken.fix
    assert (
        "running node of this hotkey" in check_port(Port(number=8091, problem="taken", running=True), options()).found
    )
    assert check_port(PORT, options("--port", "0")).word is Word.WARN
    assert check_port(None, options()).word is Word.SKIPPED


def test_reached_by_all_by_some_and_by_none() -> None:
    yes = check_reach([answer(), answer(uid=5)], "", PORT, options())
    assert yes.word is Word.OK
    assert "uid 3, 5 reached 198.51.100.7 port 8091" in yes.found
    some = check_reach([answer(), answer(Outcome.SILENT, uid=5)], "", PORT, options())
    assert some.word is Word.WARN
    assert "uid 5 did not" in some.found
    cases: list[tuple[Outcome | None, str, str]] = [
        (Outcome.SILENT, "get no answer", "sudo ufw allow 8091/tcp"),
        (Outcome.REFUSED, "refuses connections", "docker run -p 8091:8091"),
        (Outcome.OTHER, "something else answers", "forward TCP 8091"),
        (None, "private address", "no VPN or proxy"),
    ]
    for outcome, found, fix in cases:
        no = check_reach([answer(outcome)], "", PORT, options())
        assert no.word is Word.FAIL
        assert found in no.found
        assert fix in no.fix


def test_nobody_who_could_be_asked() -> None:
    none = check_reach([], "no other neuron of netuid 9 serves an axon", PORT, options())
    assert none.word is Word.SKIPPED
    busy = [Answer(uid=1, ip="8.8.8.8", round_trip=0.1, problem="its version cannot call back")]
    assert "uid 1: its version cannot call back" in check_reach(busy, "", PORT, options()).found
    unknown = [Answer(uid=1, ip="8.8.8.8", round_trip=0.1, problem="may not use callback", unknown=True)]
    assert "run this again in half an hour" in check_reach(unknown, "", PORT, options()).found
    stale = [Answer(uid=1, ip="8.8.8.8", round_trip=0.1, problem="signed -60.0 s ago", clock=True)]
    skewed = check_reach(stale, "", PORT, options())
    assert skewed.word is Word.FAIL
    assert "set-ntp" in skewed.fix


def test_the_announced_address_is_held_against_what_peers_see() -> None:
    good = check_address([answer()], "", options("--announce", "198.51.100.7"))
    assert good.word is Word.OK
    missing = check_address([answer()], "", options())
    assert (missing.word, missing.fix) == (Word.FAIL, "--announce 198.51.100.7")
    private = check_address([answer()], "", options("--announce", "192.168.1.4"))
    assert (private.word, private.fix) == (Word.FAIL, "--announce 198.51.100.7")
    other = check_address([answer()], "", options("--announce", "8.8.4.4"))
    assert other.word is Word.WARN
    assert other.fix.startswith("--announce 198.51.100.7, unless")
    name_given = check_address([], "needs the chain", options("--announce", "my.example"))
    assert name_given.word is Word.FAIL
    assert check_address([], "needs the chain", options("--announce", "8.8.4.4")).word is Word.SKIPPED
    assert check_address([], "needs a hotkey", parse([], {})).found == "needs --announce"


def test_round_trips() -> None:
    near = [replace(answer(), round_trip=ms / 1000) for ms in (10, 20, 30)]
    assert check_round_trip(near, "").found.startswith("20.0 ms to 3 peers")
    assert check_round_trip([replace(answer(), round_trip=0.5)], "").word is Word.WARN
    assert check_round_trip([], "needs the chain").word is Word.SKIPPED


# -- all of it --------------------------------------------------------------------------------------------------------


def test_bandwidth_is_held_against_what_a_stage_moves_and_what_is_declared() -> None:
    fast, slow = Measured(uid=3, up=200e6, down=400e6), Measured(uid=5, up=90e6, down=300e6)
    crossing = Crossing(bytes=2_000_000, seconds=0.2)
    enough = check_bandwidth([slow, fast], "", crossing, options("--uplink", "150mbit"))
    assert enough.word is Word.OK
    assert enough.found == (
        "200.0 Mbit/s up and 400.0 down, with uid 5, 3 in 4.2 MB each way; a stage here moves 2.0 MB each way per "
        "microbatch of 0.2 s: 80.0 Mbit/s"
    )
    narrow = check_bandwidth([fast], "", Crossing(bytes=2_000_000, seconds=0.05), options("--uplink", "150mbit"))
    assert (narrow.word, narrow.fix[:28]) == (Word.WARN, "a line with 320 Mbit/s each ")
    declared = check_bandwidth([slow], "", None, options("--uplink", "150mbit"))
    assert (declared.word, declared.fix) == (Word.WARN, "--uplink 90mbit")


def test_bandwidth_that_nobody_measured_says_why() -> None:
    assert check_bandwidth([], "needs the chain", None, options()).found == "needs the chain"
    refused = check_bandwidth([Measured(uid=3, problem="over_quota: later")], "", None, options())
    assert (refused.word, refused.found) == (Word.SKIPPED, "no peer measured (uid 3: over_quota: later)")


def test_what_a_stage_moves_follows_from_the_manifest_and_the_machine(tmp_path: Path) -> None:
    run = manifest(tiny(), tokens_file(tmp_path), stages=2)
    plans = split(run.model.config(), run.swarm.stages)
    work = Work.of(run, plans[0])
    one, two = (Crossing.of(run, work, None, cores) for cores in (1, 2))
    assert one is not None
    assert two is not None
    assert two.rate == pytest.approx(2 * one.rate)
    card = Card(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory=80 * 10**9, free=80 * 10**9)
    quick = Crossing.of(run, work, card, 1)
    assert quick is not None
    assert quick.seconds == work.unit_flops / DEVICES["h100"].flops
    assert Crossing.of(run, work, replace(card, name="NVIDIA T4"), 1) is None


def test_a_report_is_numbered_marked_and_summed_up() -> None:
    findings: tuple[Finding, ...] = (ok("one", "fine"), warn("two", "so so", "--b"), skipped("three", "needs two"))
    report = Report("miner", "here", findings)
    assert report.status == 0
    lines = list(text(report))
    assert lines[2].split() == ["1", "+", "ok", "one", "fine"]
    assert lines[4].strip() == "fix: --b"
    assert lines[-1].startswith("1 ok, 1 warn, 1 skipped: nothing that was checked keeps this machine from")
    assert list(text(replace(report, findings=findings[:2])))[-1] == "1 ok, 1 warn: this machine can mine."
    failed = replace(report, findings=(*findings, fail("four", "x" * 300 + " y", "do it")))
    assert failed.status == 1
    assert "this machine cannot mine yet" in list(text(failed))[-1]
    assert failed.as_json()["counts"] == {"ok": 1, "warn": 1, "fail": 1, "skipped": 1}
    checks = failed.as_json()["checks"]
    assert isinstance(checks, list)
    assert checks[3] == {"number": 4, "check": "four", "word": "fail", "found": "x" * 300 + " y", "fix": "do it"}


@pytest.mark.parametrize("flags", [["--port", "70000"], ["--stage", "-1"], ["--role", "owner"], ["--ring", "much"]])
def test_usage_errors_exit_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(flags, {})
    assert caught.value.code == 2
