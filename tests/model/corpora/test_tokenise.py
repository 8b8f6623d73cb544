"""What a tokenizer.json must have, and that nothing of a document is lost or taken for a mark."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from model.corpora import tokenise
from model.corpora.tokenise import DocumentTokenizer
from model.data import DataError
from tests.model.corpora.making import texts, tokenizer, tokenizer_json


def test_documents_come_back_whole_each_behind_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Tokenizer.from_buffer(tokenizer_json())
    whole = Tokenizer.from_buffer(tokenizer_json())
    plain.enable_truncation(4)
    plain.enable_padding()
    cutting = DocumentTokenizer(plain.to_str().encode(), "t", None)
    documents = [*texts(40), "a <|endoftext|> in a text", "<|endoftext|>"]
    monkeypatch.setattr(tokenise, "BATCH", 500)
    encoded = list(cutting.encode(documents))
    assert [whole.decode(ids[1:].tolist()) for ids in encoded] == documents
    assert all(ids[0] == cutting.end and cutting.end not in ids[1:] for ids in encoded)
    assert all(ids.dtype == np.uint32 for ids in encoded)
    assert list(cutting.encode([])) == []


def test_the_mark_is_known_or_named() -> None:
    assert (tokenizer().mark, tokenizer().vocab, tokenizer().dtype) == ("<|endoftext|>", 283, "uint16")
    assert DocumentTokenizer(tokenizer_json(mark="</s>"), "t", None).mark == "</s>"
    odd = tokenizer_json(mark="<end>")
    assert DocumentTokenizer(odd, "t", "<end>").mark == "<end>"
    with pytest.raises(DataError, match=r"^t has no end-of-text token \(none of <\|endoftext\|>, .*name its own with"):
        DocumentTokenizer(odd, "t", None)
    with pytest.raises(DataError, match=r"^t has no token '<ende>': did you mean '<end>'\? Change --end-of-text or"):
        DocumentTokenizer(odd, "t", "<ende>")


def test_ids_above_16_bits_take_32() -> None:
    content = json.loads(tokenizer_json())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 1 << 16, "content": "<last>"})
    # Added tokens are numbered behind the vocabulary, so that has to be as large.
    content["model"]["vocab"] |= {f"<{number}>": number for number in range(300, (1 << 16) + 1)}
    large = DocumentTokenizer(json.dumps(content).encode(), "t", None)
    assert large.dtype == "uint32"
    assert large.vocab > 1 << 16


@pytest.mark.parametrize("raw", [b"{}", b"\xff", b"[]"])
def test_what_is_no_tokenizer_is_named(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(raw)
    with pytest.raises(DataError, match=r"t\.json is no tokenizer\.json \(.*\): give one with --tokenizer$"):
        DocumentTokenizer.open(tmp_path / "t.json", None)
    with pytest.raises(DataError, match=r"cannot be read \(No such file.*\): check --tokenizer"):
        DocumentTokenizer.open(tmp_path / "missing.json", None)
