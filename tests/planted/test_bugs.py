"""The list of planted bugs fits the code that it is about, and docs/reliability.md has it."""

from pathlib import Path

import pytest

from tests.planted.__main__ import plant
from tests.planted.bugs import BUGS, Planted

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_be_planted_and_its_test_exists(bug: Planted, tmp_path: Path) -> None:
    copy = tmp_path / bug.file
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / bug.file).read_text())
    plant(bug, tmp_path)
    compile(copy.read_text(), bug.file, "exec")
    assert bug.caught_by.startswith("sim ") or (ROOT / bug.caught_by).exists()
    assert bug.name in (ROOT / "docs" / "reliability.md").read_text()


def test_a_bug_for_other_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"a\.py has 'y' 0 times"):
        plant(Planted("none", "a.py", "y", "z", "tests"), tmp_path)
