"""Tokenizers inside, beside and apart from the encoder's file."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autorefiner.refiner.wan.text import load_text_encoder
from autorefiner.refiner.wan.tokenizer import Tokenizer

from tiny_umt5 import (
    PROMPTS,
    TEXT_LEN,
    VOCABULARY,
    WORDS,
    error,
    expected,
    make_tokenizer,
    sentencepiece,
)

State = dict[str, Tensor]


def test_a_sentencepiece_model_inside_or_beside_the_file(
    spiece: bytes, state: State, tmp_path: Path
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    ids, count = Tokenizer(spiece, "it")("a red circle", 40)
    right = [*processor.encode("a red circle"), 1]
    assert ids.tolist() == [right + [0] * (40 - len(right))] and count == len(right)

    embedded = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    (tmp_path / "in").mkdir()
    save_file(state | {"spiece_model": embedded}, tmp_path / "in" / "umt5.safetensors")
    save_file(state, tmp_path / "umt5.safetensors")
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece)
    inside = load_text_encoder(tmp_path / "in" / "umt5.safetensors", text_len=40).encode(
        ["a red circle"]
    )
    beside = load_text_encoder(tmp_path / "umt5.safetensors", text_len=40).encode(["a red circle"])
    assert torch.equal(inside, beside)
    assert int((inside[0] != 0).any(1).sum()) == count


def test_a_given_tokenizer_wins(spiece: bytes, folder: Path, state: State, tmp_path: Path) -> None:
    embedded = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    save_file(state | {"spiece_model": embedded}, tmp_path / "umt5.safetensors")
    right = expected(folder, PROMPTS)
    for tokenizer in (folder, folder / "tokenizer.json"):
        encoder = load_text_encoder(tmp_path / "umt5.safetensors", tokenizer, text_len=TEXT_LEN)
        assert torch.equal(encoder.encode(PROMPTS), right)


def test_padding_and_truncation_of_the_tokenizer_file_are_not_used() -> None:
    stated = make_tokenizer()
    stated.enable_truncation(2)
    stated.enable_padding(length=9)
    given = Tokenizer(stated.to_str().encode(), "it")("a red circle", 6)
    assert (given[0].tolist(), given[1]) == ([[3, 4, 5, 1, 0, 0]], 4)


def test_tokenizers_that_do_not_serve(folder: Path, state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "umt5.safetensors")
    path = tmp_path / "umt5.safetensors"
    assert "no tokenizer" in error(path)
    assert "none.json" in error(path, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    assert "bad.json" in error(path, tmp_path / "bad.json")
    (tmp_path / "bad.model").write_bytes(b"\x00" * 9)
    assert "bad.model" in error(path, tmp_path / "bad.model")
    make_tokenizer(["<extra>"] * 1 + [f"w{n}" for n in range(VOCABULARY)] + WORDS).save(
        str(tmp_path / "large.json")
    )
    assert str(VOCABULARY) in error(path, tmp_path / "large.json")
    no_end = (folder / "tokenizer.json").read_text().replace("</s>", "<end>")
    (tmp_path / "end.json").write_text(no_end)
    assert "</s>" in error(path, tmp_path / "end.json")


@pytest.mark.parametrize("missing", ["transformers", "tokenizers", "sentencepiece"])
def test_missing_libraries_name_the_pip_line(
    missing: str, spiece: bytes, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece)
    monkeypatch.setitem(sys.modules, missing, None)
    text = error(folder, tmp_path if missing == "sentencepiece" else None, text_len=TEXT_LEN)
    assert 'pip install "transformers>=4.50.3" "sentencepiece>=0.2"' in text
