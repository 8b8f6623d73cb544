"""The standard library corpus: the same bytes every time, verified when reused, and fit to learn from."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from model.config import preset
from model.corpus import END_OF_TEXT, standard_library_corpus
from model.data import Corpus, DataError
from model.engine import StageEngine
from model.optimizer import nano_optimizer
from model.recompute import Recompute
from model.split import split
from model.stage import build_stage


def test_the_corpus_is_deterministic_reused_and_decodes_to_python(tmp_path: Path) -> None:
    def build(cache: str):  # type: ignore[no-untyped-def] # noqa: ANN202
        return standard_library_corpus(tmp_path / cache, vocab=300, cap_bytes=200_000, training_bytes=100_000)

    one, two = build("one"), build("two")
    assert one.entries == two.entries
    assert (one.tokenizer_sha256, one.source_sha256) == (two.tokenizer_sha256, two.source_sha256)
    made = (one.folder / "tokens.bin").stat().st_mtime_ns
    assert build("one") == one
    assert (one.folder / "tokens.bin").stat().st_mtime_ns == made
    assert [path.name for path in (tmp_path / "one").iterdir()] == [one.folder.name]

    tokenizer = Tokenizer.from_file(str(one.folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    corpus = Corpus.open(one.folder, one.entries, seed=0, batch=1, tokens=256, vocab=one.vocab)
    text = tokenizer.decode(corpus.sample(0)[0].tolist(), skip_special_tokens=False)
    assert any(word in text for word in ("self", "def", "import", "return"))
    raw = (one.folder / "tokens.bin").read_bytes()
    assert int.from_bytes(raw[:2], "little") == tokenizer.token_to_id(END_OF_TEXT)


def test_an_altered_or_incomplete_cache_is_named(tmp_path: Path) -> None:
    arguments = {"vocab": 300, "cap_bytes": 100_000, "training_bytes": 50_000}
    files = standard_library_corpus(tmp_path, **arguments)
    tokens = files.folder / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"tokens.bin has SHA-256 \w+, expected \w+: delete .* rebuilt"):
        standard_library_corpus(tmp_path, **arguments)
    (files.folder / "corpus.json").write_text("{}")
    with pytest.raises(DataError, match=r"is incomplete \(KeyError"):
        standard_library_corpus(tmp_path, **arguments)
    with pytest.raises(DataError, match="vocab is 256"):
        standard_library_corpus(tmp_path, vocab=256)


def test_a_small_model_learns_from_it(tmp_path: Path) -> None:
    files = standard_library_corpus(tmp_path, cap_bytes=1_500_000, training_bytes=300_000)
    corpus = Corpus.open(files.folder, files.entries, seed=1, batch=8, tokens=64, vocab=files.vocab)
    config = preset("pico")
    stage = build_stage(config, split(config, 1)[0], seed=1)
    engine = StageEngine(
        stage,
        nano_optimizer(),
        stage.plan,
        n_total_params=sum(p.numel() for p in stage.parameters()),
        accumulation=1,
        recompute=Recompute.KEEP,
        capacity=1,
    )

    def validation() -> float:
        with torch.no_grad():
            rows = [corpus.validation_sample(i) for i in (0, 5)]
            return sum(float(stage.loss(x[:, :-1], x[:, 1:])) for x in rows) / len(rows)

    first = validation()
    for step in range(40):
        x = corpus.sample(step)
        engine.tail(step, x[:, :-1], x[:, 1:])
        assert engine.step().finite
    assert 6.8 < first < 7.1
    assert validation() < first - 1.2
