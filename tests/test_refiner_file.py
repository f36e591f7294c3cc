"""Refiner files: metadata, refused files, and the base they belong to."""

import json

import pytest
import torch
from safetensors.torch import save_file

from autorefiner.refiner.noise.file import (
    RefinerCard,
    fingerprint,
    load_refiner,
    other_base,
    save_refiner,
)
from autorefiner.refiner.noise.refiner import HEAD, target_modules
from autorefiner.refiner.wan.checkpoint import describe, inspect
from autorefiner.refiner.wan.lora import LoraPair

from tiny import TINY, tiny_network

QUERY = "blocks.0.self_attn.q"
PAIR = {f"autorefiner.{QUERY}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
HEAD_PAIR = {f"autorefiner.{HEAD}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
CARD = RefinerCard(rank=4, levels=(750, 500), previous="joint", base="", objective="dmd", steps=10)


def pairs(scale: float = 2.0) -> dict[str, LoraPair]:
    found = {}
    for name, module in target_modules(tiny_network().model).items():
        out, into = module.weight.shape
        found[name] = LoraPair(torch.ones(4, into), torch.full((out, 4), 0.5), scale)
    return found


@pytest.fixture
def path(tmp_path):
    save_refiner(tmp_path / "a.refiner.safetensors", pairs(), CARD)
    return tmp_path / "a.refiner.safetensors"


def test_a_saved_refiner_comes_back_with_alpha_folded_in(path) -> None:
    loaded, card = load_refiner(path)
    assert card == CARD
    assert card.cache.previous == "joint"
    assert loaded.keys() == pairs().keys()
    assert loaded[HEAD].scale == 1.0
    assert torch.equal(loaded[HEAD].up, torch.ones(TINY.out_dim * 4, 4, dtype=torch.bfloat16))
    assert inspect(path).kind == "refiner"
    assert '"previous": "joint"' in describe(inspect(path)) and '"steps": ' in describe(
        inspect(path)
    )


def test_the_fingerprint_is_of_the_base_and_survives_a_lora_and_bf16() -> None:
    base, other = tiny_network(), tiny_network(seed=1)
    own = fingerprint(base.model)
    assert fingerprint(other.model) != own
    with torch.no_grad():
        base.model.blocks[0].self_attn.q.weight += 1
    assert fingerprint(base.model.bfloat16()) == own
    card = RefinerCard(rank=4, base=own)
    assert other_base(card, own) is None
    assert other_base(card, None) is None
    assert "another base" in other_base(card, fingerprint(other.model))


def test_what_is_no_refiner_is_said_to_be_what_it_is(tmp_path, path) -> None:
    lora = tmp_path / "lora.safetensors"
    factors = {"lora_A": torch.ones(4, 8), "lora_B": torch.ones(8, 4)}
    prefix = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{prefix}.{name}.weight": factor for name, factor in factors.items()}, lora)
    with pytest.raises(ValueError, match="is a LoRA"):
        load_refiner(lora)
    bare = tmp_path / "bare.safetensors"
    save_file(PAIR, bare)
    with pytest.raises(ValueError, match="how it was trained"):
        load_refiner(bare)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 2}, "ranks"),
        ({"previous": "some"}, "pending"),
        ({"version": 99}, "update AutoRefiner"),
        ({"levels": []}, "update AutoRefiner"),
        ({"levels": None}, "does not say"),
        ({"rank": float("inf")}, "does not say"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(tmp_path, change, said) -> None:
    metadata = {"rank": 4, "levels": [750], "history": "shared", "previous": "none"} | change
    path = tmp_path / "x.refiner.safetensors"
    save_file(PAIR, path, metadata={"autorefiner": json.dumps(metadata)})
    with pytest.raises(ValueError, match=said):
        load_refiner(path)


def test_the_head_has_the_rank_of_its_outputs_at_most(tmp_path) -> None:
    path = tmp_path / "x.refiner.safetensors"
    metadata = {"rank": 2, "levels": [750], "history": "shared", "previous": "none"}
    save_file(HEAD_PAIR, path, metadata={"autorefiner": json.dumps(metadata)})
    assert load_refiner(path)[0][HEAD].rank == 4
    save_file({name: torch.ones((5, 4) if "_A" in name else (4, 5)) for name in HEAD_PAIR}, path,
              metadata={"autorefiner": json.dumps(metadata)})  # fmt: skip
    with pytest.raises(ValueError, match="ranks"):
        load_refiner(path)


def test_a_card_of_brackets_is_refused() -> None:
    with pytest.raises(ValueError, match="does not say"):
        RefinerCard.parse("[" * 100_000)


def test_quantised_factors_are_refused(tmp_path) -> None:
    path = tmp_path / "x.refiner.safetensors"
    card = {
        "autorefiner": json.dumps(
            {"rank": 4, "levels": [750], "history": "shared", "previous": "none"}
        )
    }
    save_file(
        {name: tensor.to(torch.float8_e4m3fn) for name, tensor in PAIR.items()}, path, metadata=card
    )
    with pytest.raises(ValueError, match="quantised"):
        load_refiner(path)


def test_half_a_pair_is_refused(tmp_path) -> None:
    path = tmp_path / "x.refiner.safetensors"
    card = {
        "autorefiner": json.dumps(
            {"rank": 4, "levels": [750], "history": "shared", "previous": "none"}
        )
    }
    save_file({f"autorefiner.{HEAD}.lora_A.weight": torch.ones(4, 8)}, path, metadata=card)
    with pytest.raises(ValueError, match="not complete"):
        load_refiner(path)
