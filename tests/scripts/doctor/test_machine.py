"""What is wrong with a machine is named with the value, and the fix is a command or an option."""

from dataclasses import replace
from pathlib import Path

import pytest

from model.config import preset
from model.layout import Layout
from model.recompute import Recompute
from model.relief import Holding
from model.split import split
from neurons.machine import Card
from neurons.needs import Needs, miner_needs
from scripts.doctor import facts
from scripts.doctor.disk import Disk, check_disk
from scripts.doctor.machine import (
    Tcp,
    Work,
    check_buffers,
    check_card,
    check_card_memory,
    check_cores,
    check_files,
    check_memory,
    check_packages,
    check_python,
    check_tcp,
    check_validators_memory,
    down,
    numbers,
)
from scripts.doctor.report import Word
from subnet.manifest import Manifest
from subnet.quantities import parse_size
from tests.neurons.swarm import manifest, tiny, tokens_file

CARD = Card(name="test card", capability=(9, 0), memory=160 * 10**9, free=160 * 10**9)
TCP = Tcp(default="cubic", allowed=("reno", "cubic"), send=(4096, 16384, 4 << 20), receive=(4096, 131072, 6 << 20))


@pytest.fixture
def small(tmp_path: Path) -> Manifest:
    return manifest(tiny(), tokens_file(tmp_path), stages=2)


@pytest.fixture
def needs(small: Manifest) -> Needs:
    config = small.model.config()
    plan = split(config, 2)[0]
    return miner_needs(small, plan, Layout.planned(config, plan, "adamw"), None)


def large(tmp_path: Path, *, batch: int) -> Manifest:
    content = manifest(preset("8b"), tokens_file(tmp_path), stages=2)
    return content.model_copy(update={"data": content.data.model_copy(update={"batch": batch})})


def test_python_and_packages_are_held_against_their_bounds() -> None:
    assert check_python("3.11.7", ">=3.11").word is Word.OK
    old = check_python("3.9.1", ">=3.11")
    assert (old.word, "3.9.1" in old.found) == (Word.FAIL, True)

    wanted = ["torch<3,>=2.8", "numpy<3,>=2.1", 'ruff>=99; extra == "dev"']
    versions = {"torch": "2.13.0+cpu", "numpy": "2.2"}
    fine = check_packages(wanted, versions.get)
    assert (fine.word, fine.found) == (Word.OK, "2 of 2 within their bounds")
    wrong = check_packages(wanted, {"torch": "2.1.0"}.get)
    assert wrong.word is Word.FAIL
    assert "torch is 2.1.0" in wrong.found
    assert "numpy is missing" in wrong.found
    assert wrong.fix == 'pip install "torch<3,>=2.8" "numpy<3,>=2.1"'
    assert check_packages(None, versions.get).word is Word.FAIL


def test_this_python_has_what_it_needs() -> None:
    found = facts.software()
    assert check_python(found.python, found.bounds).word is Word.OK
    assert check_packages(found.requirements, facts.installed).word is Word.OK


def test_cores() -> None:
    assert check_cores(8).word is Word.OK
    assert check_cores(0.5).word is Word.WARN


def test_no_gpu_is_enough_for_small_runs_and_a_failure_for_large_ones(small: Manifest, tmp_path: Path) -> None:
    easy = check_card(None, "", driver="", work=Work.of(small, split(small.model.config(), 2)[0]), cores=2)
    assert easy.word is Word.WARN
    assert "enough" in easy.found
    content = large(tmp_path, batch=1)
    hard = check_card(None, "", driver="", work=Work.of(content, split(content.model.config(), 2)[0]), cores=64)
    assert hard.word is Word.FAIL
    assert "rent a machine with a GPU" in hard.fix
    assert "nvidia-smi" in hard.fix
    unwanted = check_card(None, "", driver="", work=None, cores=2, wanted=False)
    assert unwanted.word is Word.WARN
    assert "--device is cpu" in unwanted.found


def test_a_gpu_is_described_or_its_fault_is() -> None:
    found = check_card(CARD, "", driver="driver 550.1", work=None, cores=2)
    assert found.word is Word.OK
    assert found.found == "test card, compute capability 9.0, driver 550.1, 160gb of 160gb free"
    assert check_card(replace(CARD, capability=(7, 5)), "", driver="", work=None, cores=2).word is Word.WARN
    broken = check_card(None, "CUDA driver version is insufficient", driver="", work=None, cores=2)
    assert broken.word is Word.FAIL
    assert "insufficient" in broken.found


def test_a_stage_too_large_for_the_card_names_what_would_do(small: Manifest, tmp_path: Path) -> None:
    plan = split(small.model.config(), 2)[0]
    fits = check_card_memory(CARD, small, plan)
    assert fits.word is Word.OK
    assert "recompute keep with" in fits.found
    assert check_card_memory(None, small, plan).word is Word.SKIPPED
    assert check_card_memory(CARD, None, None).word is Word.SKIPPED

    content = large(tmp_path, batch=8)
    big = split(content.model.config(), 2)[0]
    found = check_card_memory(CARD, content, big)
    assert found.word is Word.FAIL
    assert "stage 0 needs" in found.found
    assert "data.batch 2 or less" in found.fix
    assert "more than 2 swarm.stages" in found.fix
    crowded = check_card_memory(replace(CARD, free=20 * 10**9), large(tmp_path, batch=1), big)
    assert crowded.word is Word.FAIL
    assert "stop what else uses the card" in crowded.fix


def test_too_little_memory_names_how_much_and_the_option(needs: Needs) -> None:
    assert check_memory(None, 10**12, ring=0).word is Word.SKIPPED
    assert check_memory(needs, 10**12, ring=10**9).word is Word.OK
    held = check_memory(needs, 10**12, held=Holding(Recompute.KEEP, 8), ring=10**9)
    assert held.found.endswith("recompute keep with 8 graphs")
    short = check_memory(needs, needs.host - 10**8, ring=10**9)
    assert short.word is Word.FAIL
    assert "100mb short" in short.found
    narrow = check_memory(needs, 10**12, ring=needs.ring - 1)
    assert narrow.word is Word.FAIL
    assert parse_size("ring", narrow.fix.removeprefix("--ring ")) >= needs.ring
    spare = needs.host + 3 * 10**9
    wide = check_memory(needs, spare, ring=16 * 10**9)
    assert wide.word is Word.WARN
    lowered = parse_size("ring", wide.fix.removeprefix("--ring "))
    assert needs.ring <= lowered <= spare - (needs.host - needs.ring)
    assert check_memory(needs, spare, ring=lowered).word is Word.OK
    assert check_validators_memory(2 * 10**9, 10**9).word is Word.FAIL
    assert check_validators_memory(2 * 10**9, 10**10).word is Word.OK


def test_a_low_file_limit_names_ulimit_where_it_can_be_raised() -> None:
    assert check_files(1024, 4096, least=352).word is Word.OK
    low = check_files(256, 524_288, least=352)
    assert (low.word, low.fix) == (Word.FAIL, "ulimit -n 65536 (in the shell that starts the node)")
    capped = check_files(256, 256, least=352)
    assert capped.word is Word.FAIL
    assert "limits.conf" in capped.fix
    assert "--ulimit nofile" in capped.fix
    assert "1024 needed by most runs" in check_files(256, 4096, least=None).found


def test_tcp_settings_are_warned_of_with_the_line_that_changes_them() -> None:
    assert check_tcp(replace(TCP, default="bbr")).word is Word.OK
    assert check_tcp(replace(TCP, allowed=("cubic", "bbr"))).word is Word.OK
    plain = check_tcp(TCP)
    assert plain.word is Word.WARN
    assert "net.ipv4.tcp_congestion_control=bbr" in plain.fix
    assert check_tcp(replace(TCP, default="")).word is Word.SKIPPED

    assert check_buffers(TCP, uplink=100e6).word is Word.OK
    small = check_buffers(TCP, uplink=1e9)
    assert small.word is Word.WARN
    most = numbers(small.fix.partition("tcp_wmem=")[2].partition(" net")[0])[2]
    assert check_buffers(replace(TCP, send=(1, 1, most), receive=(1, 1, most)), uplink=1e9).word is Word.OK
    assert check_buffers(replace(TCP, send=()), uplink=1e9).word is Word.SKIPPED


def test_a_full_disk_and_a_small_one(needs: Needs, tmp_path: Path) -> None:
    def found(free: int, evidence_disk: int = 10**11, *, here: bool = True, role: str = "miner") -> tuple[Word, str]:
        disk = Disk(out=tmp_path, free=free)
        finding = check_disk(disk, needs, evidence_disk=evidence_disk, checkpoints_here=here, role=role)
        return finding.word, finding.fix

    assert found(10**12) == (Word.OK, "")
    word, fix = found(0)
    assert word is Word.FAIL
    assert "--out" in fix
    assert "--checkpoints" in fix
    assert found(needs.evidence + 1)[0] is Word.FAIL
    assert found(needs.evidence + 1, needs.evidence, here=False)[0] is Word.OK
    word, fix = found(10**12, 1)
    assert word is Word.FAIL
    assert parse_size("evidence-disk", fix.removeprefix("--evidence-disk ")) >= needs.evidence
    word, fix = found(10**10)
    assert word is Word.WARN
    assert parse_size("evidence-disk", fix.removeprefix("--evidence-disk ")) <= 10**10
    assert found(10**8, role="validator")[0] is Word.FAIL


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        disk = facts.disk(out)
        finding = check_disk(disk, None, evidence_disk=0, checkpoints_here=True, role="miner")
        assert finding.word is Word.FAIL
        assert finding.fix == "--out with a folder of your own"
        assert str(out) in finding.found
    assert facts.disk(tmp_path / "new").problem == ""
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("size", [1, 10**6, 999_999_999, 10**9, 123_456_789_012])
def test_a_size_that_is_offered_is_never_larger(size: int) -> None:
    assert parse_size("ring", down(size)) <= size


def test_this_machine_is_read() -> None:
    found = facts.hardware("auto")
    assert found.cores > 0
    assert found.memory > 0
    assert found.files[0] <= found.files[1]
