"""Rows, grids and results: what is trained, once, and what is kept of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from model.accounting import total_parameters
from model.config import BoundaryForm, ConfigError, preset
from model.corpora.folder import read_manifest
from scripts.bench.boundary import GRIDS, RESULTS, fingerprint, main, tables
from scripts.bench.learning.grid import GridError, Results, read_grid
from scripts.bench.learning.rows import Form, Row
from scripts.bench.learning.tables import boundary_table, cost, pages, summaries
from scripts.bench.learning.training import Curve
from scripts.bench.report import marks
from tests.model.corpora.making import made, recipe, texts, write_jsonl

BEGIN, END = marks("tables")
GRID = """
[[block]]
forms = ["none", "none+", "t"]
ratios = [16, 64]
optimizers = ["muon", "adamw"]
boundaries = [3, 7]
seeds = [0, 1]
"""


def _curve(final: float) -> Curve:
    return Curve(losses=((100, final + 1), (200, final)), parameters=1_000_000, seconds=1.0)


def test_a_ratio_says_how_wide_the_boundary_is() -> None:
    config = Row(form="t", ratio=16).config()
    assert config.boundary.form is BoundaryForm.T
    assert (config.hidden, config.boundary_width) == (128, 8)
    assert Row(form="none+").config().boundary.rank == config.boundary.rank
    assert Row(form="linear", ratio=16).config().boundary.rank == 0


@pytest.mark.parametrize("hidden", [128, 256])
@pytest.mark.parametrize(("form", "ratio", "like"), [("subspace", 16, "none"), ("wide", 1, "none+")])
def test_some_forms_have_the_parameters_of_what_they_are_held_against(
    form: Form, ratio: int, like: Form, hidden: int
) -> None:
    own, others = (
        total_parameters(row.config(), 4)
        for row in (Row(form=form, ratio=ratio, hidden=hidden), Row(form=like, hidden=hidden))
    )
    assert 0.99 * others < own <= others


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "none", "ratio": 16}, "ratio is 16, form is 'none'"),
        ({"form": "t"}, "ratio is 1, form is 't'"),
        ({"form": "t", "ratio": 7}, "ratio is 7, hidden 128"),
        ({"form": "t", "ratio": 128, "bits": 8}, "2 bytes a token"),
        ({"form": "t", "ratio": 16, "bits": 4}, "bits is 4"),
        ({"form": "t", "ratio": 16, "depth": 0}, "depth is 0"),
        ({"form": "cut", "depth": 7}, "form 'cut' sends nothing to wait for"),
    ],
)
def test_rows_that_cannot_be(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Row(**values)  # type: ignore[arg-type]


def test_a_grid_lists_every_combination_once(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    rows = read_grid(path)
    # For 2 optimizers and 2 seeds: none once, none+ for each number of boundaries, t for each of them and each ratio.
    assert len(rows) == len(set(rows)) == 2 * 2 * (1 + 2 + 2 * 2)
    assert rows[0].seed == 0
    assert rows[-1].seed == 1


def test_a_block_may_vary_what_a_form_is_made_of(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        "[[block]]\nforms = ['t']\nratios = [16, 64]\noptimizers = ['muon']\n"
        "ranks = [8, 16]\npairs = [0, 99]\nbits = [8]"
    )
    rows = read_grid(path)
    assert {(r.ratio, r.rank, r.pairs) for r in rows} == {(a, b, c) for a in (16, 64) for b in (8, 16) for c in (0, 99)}
    assert {r.bits for r in rows} == {8}
    assert {r.config().boundary.width for r in rows} == {14, 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[block", "is not TOML"),
        ("[[block]]\nforms = ['t']", "block.0.optimizers: Field required"),
        ("[[block]]\nforms = ['x']\noptimizers = ['muon']", "block.0.forms.0"),
        ("[[block]]\nforms = ['t']\nratios = [3]\noptimizers = ['muon']", "ratio is 3, hidden 128"),
    ],
)
def test_grids_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(GridError, match=message):
        read_grid(path)
    with pytest.raises(GridError, match="cannot be read"):
        read_grid(tmp_path / "none.toml")


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    results = Results(tmp_path / "made" / "results.jsonl")
    assert results.read() == {}
    first, second = Row(form="t", ratio=16), Row(form="none", seed=1)
    results.add(first, _curve(3.5))
    results.add(second, _curve(float("inf")))
    assert results.read() == {first: _curve(3.5), second: _curve(float("inf"))}
    with results.path.open("a") as file:
        file.write('{"row": {"form"\n')
    with pytest.raises(GridError, match="line 3 of"):
        results.read()


def test_a_boundary_is_held_against_its_own_control() -> None:
    results = {
        Row(form="none", boundaries=1): _curve(4.0),
        Row(form="none+"): _curve(3.9),
        Row(form="none+", seed=1): _curve(3.7),
        Row(form="t", ratio=16): _curve(3.8),
        Row(form="t", ratio=16, seed=1): _curve(4.18),
        Row(form="a", ratio=16): _curve(4.4),
        Row(form="none", boundaries=1, seed=2): _curve(9.0),  # of another seed than all others: changes no comparison
    }
    found = summaries(results)
    assert cost(Row(form="t", ratio=16), found) == pytest.approx(3.99 / 3.8 - 1)
    assert cost(Row(form="a", ratio=16), found) == pytest.approx(0.1)
    lines = boundary_table(results, boundaries=3, optimizer="muon", steps=400)
    assert lines[0] == "| form | parameters | 1x | 16x |"
    assert lines[2:] == [
        "| none | 1.00 M | 6.500 ± 3.536 |  |",
        "| none+ | 1.00 M | 3.800 ± 0.141 |  |",
        "| a | 1.00 M |  | 4.400 (+10.0 %) |",
        "| t | 1.00 M |  | 3.990 ± 0.269 (+5.0 %) |",
    ]


def test_a_row_may_have_another_model_s_shape() -> None:
    config = Row(form="t", ratio=16, model="100m", hidden=640).config()
    shape = preset("100m")
    assert replace(config, boundary=shape.boundary) == shape
    assert (config.boundary.width, config.boundary.rank) == (40, shape.boundary.rank)
    with pytest.raises(ConfigError, match="hidden is 192; query heads of 100m that share keys take 128"):
        Row(form="none", model="100m", hidden=192)
    rows = read_grid(GRIDS / "100m.toml")
    assert {(row.model, row.hidden) for row in rows} == {("100m", 640)}


def test_a_row_learns_from_prepared_data_and_is_named_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, results = tmp_path / "shards", Results(tmp_path / "results.jsonl")
    made(folder, [write_jsonl(tmp_path / "a.jsonl", texts(900))], recipe(shard_tokens=20_000))
    given = ["--results", str(results.path), "--model", "pico", "--row", "form=t", "ratio=16", "steps=27"]
    assert main([*given, "--data", str(folder)]) == 0
    (row,) = results.read()
    assert (row.model, row.hidden, row.data) == (
        "pico",
        preset("pico").hidden,
        fingerprint(read_manifest(folder).shards),
    )
    (title, _), *_ = pages(results.read())
    assert title == f"pico, width 64, data {row.data}: muon, 3 boundaries, 27 steps"
    for words, said in (
        ([], f"row learns from data {row.data}: say with --data"),
        (["--data", str(folder)], f"the row asks for {'0' * 12}"),
    ):
        data = row.data if not words else "0" * 12
        assert main([*given, f"data={data}", *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["--model", "none", "--list"]) == 2
    assert len(results.read()) == 1


def test_widths_stand_beside_each_other() -> None:
    results = {
        Row(form="none+"): _curve(4.0),
        Row(form="t", ratio=8): _curve(4.1),
        Row(form="t", ratio=16): _curve(4.2),
        Row(form="none+", hidden=256): _curve(3.0),
        Row(form="t", ratio=16, hidden=256): _curve(2.7),
        Row(form="a", ratio=16, hidden=256): _curve(9.9),
    }
    title, lines = list(pages(results))[-1]
    assert title == "nano: widths, muon, 3 boundaries, 400 steps"
    assert lines[0] == "| width | none+ | t 16x |"
    assert lines[2:] == ["| 128 | 4.000 | 4.200 (+5.0 %) |", "| 256 | 3.000 | 2.700 (-10.0 %) |"]
    alone = {row: curve for row, curve in results.items() if row.hidden == 128}
    assert all("widths" not in title for title, _ in pages(alone))


@pytest.mark.parametrize("words", [["form=x"], ["form=t", "ratio=two"], ["form=t", "ratio=3"], ["width=3"]])
def test_a_row_that_cannot_be_is_one_line_and_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--row", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --row: ")
    assert error.count("\n") == 1


def test_a_page_s_tables_are_replaced_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, page = Results(tmp_path / "results.jsonl"), tmp_path / "page.md"
    results.add(Row(form="t", ratio=16), _curve(3.5))
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        assert main(["--results", str(results.path), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n### ")
    assert text.endswith(f"|\n\n{END}\nafter\n")
    assert "old" not in text
    assert text.count("| t | 1.00 M |  | 3.500 |") == 1
    page.write_text("no marks\n")
    assert main(["--results", str(results.path), "--page", str(page)]) == 2
    assert "has no lines" in capsys.readouterr().err
    assert page.read_text() == "no marks\n"


def test_the_committed_page_shows_the_committed_results() -> None:
    page = Path(__file__).parents[3] / "docs" / "learning.md"
    _, _, rest = page.read_text().partition(BEGIN)
    assert rest.partition(END)[0].strip() == tables(Results(RESULTS).read())
