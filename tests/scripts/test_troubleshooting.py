"""Every heading of the page is a message that the code has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("model", "subnet", "neurons", "scripts")
HEADINGS = re.findall(r"^### (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


def texts(tree: ast.AST) -> Iterator[str]:
    """All texts of a file, `…` standing for what is filled in, by `{}` or by `%`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sdg]|%\.\df", "…", node.value)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


@pytest.fixture(scope="module")
def messages() -> list[str]:
    files = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
    return [text for path in files for text in texts(ast.parse(path.read_text()))]


def test_there_are_headings() -> None:
    assert len(HEADINGS) == len(set(HEADINGS)) > 20


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_heading_is_a_message(heading: str, messages: list[str]) -> None:
    assert any(message.startswith(heading) for message in messages)
