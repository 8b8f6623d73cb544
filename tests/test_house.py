"""The house: four floors, imports only downward, rooms of a size one can survey."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("model", "subnet", "neurons", "scripts")
LINES = 600
MODULES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> frozenset[str]:
    """Names of the modules a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return frozenset(names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    above = FLOORS[floor + 1 :]
    names = imported(path)
    if "bench" in path.parts:
        names -= {name for name in names if name.startswith("tests.adversaries.")}  # they are measured, not shipped
    assert not {name for name in names if name.split(".")[0] in (*above, "tests")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_are_surveyable(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= LINES, f"{path.name} has {lines} lines: is it two rooms?"
    assert ast.get_docstring(parsed(path)), f"{path.name} has no docstring"


def test_model_knows_no_network_and_no_chain() -> None:
    for path in (ROOT / "model").rglob("*.py"):
        assert not imported(path) & {"asyncio", "aiohttp", "bittensor", "bittensor_core", "socket"}, path


def test_one_file_talks_to_the_chain_client() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if "bittensor" in imported(path) and "localchain" not in path.parts
    }
    assert users <= {"subnet/chain.py", "subnet/transport/auth.py", "subnet/transport/admission.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    names = imported(path)
    assert not names & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    calls = {ast.unparse(node.func) for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)}
    assert not calls & {"torch.load", "torch.save", "eval", "exec"}
