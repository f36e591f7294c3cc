"""Encoded prompts come from the cache, and a damaged file of it is written anew."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autorefiner.refiner.wan.text import load_text_encoder

from tiny_umt5 import PROMPTS, TEXT_LEN, WORDS, expected, make_tokenizer

State = dict[str, Tensor]


def test_cached_prompts_need_no_weights(folder: Path, tmp_path: Path, loads: list[Path]) -> None:
    def encode(prompts: list[str], **options) -> Tensor:
        return load_text_encoder(
            folder, cache_dir=tmp_path / "cache", **{"text_len": TEXT_LEN} | options
        ).encode(prompts)

    first = encode(PROMPTS)
    assert len(loads) == 1 and torch.equal(first, expected(folder, PROMPTS))
    assert torch.equal(encode(PROMPTS), first)
    assert torch.equal(encode([" the\ncircle"]), first[1:2])
    assert len(loads) == 1
    encode([*PROMPTS, "a red"])
    assert len(loads) == 2
    assert encode(PROMPTS, dtype=torch.bfloat16).dtype == torch.bfloat16
    encode(PROMPTS, text_len=TEXT_LEN + 1)
    assert len(loads) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4 + 3 + 3


def test_another_encoder_or_tokenizer_misses_the_cache(
    folder: Path, state: State, tmp_path: Path, loads: list[Path]
) -> None:
    make_tokenizer(WORDS[::-1]).save(str(tmp_path / "other.json"))
    save_file(state, tmp_path / "a.safetensors")
    changed = state | {
        "encoder.block.1.layer.0.SelfAttention.q.weight": state["shared.weight"][:48].clone()
    }
    save_file(changed, tmp_path / "b.safetensors")
    contexts = [
        load_text_encoder(path, tokenizer, text_len=TEXT_LEN, cache_dir=tmp_path / "cache").encode(
            ["a red circle"]
        )
        for path, tokenizer in (
            (tmp_path / "a.safetensors", folder),
            (tmp_path / "b.safetensors", folder),
            (tmp_path / "a.safetensors", tmp_path / "other.json"),
        )
    ]
    assert len(loads) == 3
    assert not torch.equal(contexts[0], contexts[1]) and not torch.equal(contexts[0], contexts[2])


@pytest.mark.parametrize("damage", ["cut", "text", "width", "dtype", "name", "length", "axes"])
def test_a_damaged_cache_file_is_written_anew(
    damage: str, folder: Path, tmp_path: Path, loads: list[Path]
) -> None:
    def encode() -> Tensor:
        return load_text_encoder(folder, text_len=TEXT_LEN, cache_dir=tmp_path).encode(
            ["a red circle"]
        )

    first = encode()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    tensor = load_file(path)["context"]
    if damage in ("cut", "text"):
        path.write_bytes(whole[:-3] if damage == "cut" else b"no weights at all" * 9)
    else:
        wrong = {
            "width": {"context": tensor[:, :3].clone()},
            "dtype": {"context": tensor.half()},
            "name": {"prompt": tensor},
            "length": {"context": torch.zeros(TEXT_LEN + 1, 64)},
            "axes": {"context": tensor[0].clone()},
        }
        save_file(wrong[damage], path)
    assert torch.equal(encode(), first)
    assert len(loads) == 2
    assert path.read_bytes() == whole


def test_release_frees_the_weights_and_encoding_loads_them_again(
    folder: Path, loads: list[Path]
) -> None:
    encoder = load_text_encoder(folder, text_len=TEXT_LEN)
    assert not loads
    first = encoder.encode(PROMPTS)
    encoder.encode(["a"])
    assert len(loads) == 1
    encoder.release()
    assert torch.equal(encoder.encode(PROMPTS), first)
    assert len(loads) == 2
