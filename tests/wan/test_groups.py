"""Which tensors of a file belong together, however its dictionaries nest."""

import time
from pathlib import Path

import pytest
import torch
from published import State, equal_bits, make_state, message, prefixed, write

from autorefiner.refiner.wan.checkpoint import inspect, load_transformer
from autorefiner.refiner.wan.groups import group_tensors, role_of, split_roles
from autorefiner.refiner.wan.weight_file import open_weights

ONE = torch.ones(1)


@pytest.fixture(scope="module")
def state() -> State:
    return make_state()


def test_nested_dictionaries_are_groups_by_their_path() -> None:
    content = {
        "model": {"generator": {"a": ONE}, "critic": {"model": {"a": ONE}}, "decay": 0.9},
        "optimizer": {"state": {"a": {"exp_avg": ONE}}},
        "lr_scheduler": {"b": ONE},
        7: {"a": ONE},
        "step": 3,
        "loose.tensor": ONE,
    }
    groups, others = group_tensors(content)
    assert {path: list(tensors) for path, tensors in groups.items()} == {
        "model.generator": ["a"], "model.critic.model": ["a"], "7": ["a"], "flat": ["loose.tensor"],
    }  # fmt: skip
    assert others == ("optimizer", "lr_scheduler", "step")
    assert list(groups)[-1] == "flat"


def test_names_with_a_role_are_groups_of_their_own() -> None:
    names = (
        "generator_ema.model.a",
        "model.generator._fsdp_wrapped_module.a",
        "model.a",
        "critic.b",
        "head.ema.c",
    )
    groups = split_roles({"flat": dict.fromkeys(names, ONE), "state_dict": {"generator.a": ONE}})
    assert {path: list(tensors) for path, tensors in groups.items()} == {
        "generator_ema": ["generator_ema.model.a"],
        "model.generator": ["model.generator._fsdp_wrapped_module.a"],
        "flat": ["model.a", "head.ema.c"],
        "critic": ["critic.b"],
        "state_dict.generator": ["generator.a"],
    }
    roles = [
        role_of(path)
        for path in ("model.generator_ema.shadow", "state_dict.generator", "critic.model", "x")
    ]
    assert roles == ["generator_ema", "generator", "critic", "x"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_flat_file_has_no_other_keys(suffix: str, state: State, tmp_path: Path) -> None:
    assert inspect(write(tmp_path / f"a.{suffix}", prefixed(state, "model."))).other_keys == ()


def test_other_keys_are_by_their_path(state: State, tmp_path: Path) -> None:
    content = {"model": {"generator": state, "critic": {"a": ONE}}, "step": 1}
    info = inspect(write(tmp_path / "a.pt", content))
    assert (info.top_key, info.other_keys) == ("model.generator", ("model.critic", "step"))


def test_averaged_and_raw_weights_are_chosen_in_any_nesting(state: State, tmp_path: Path) -> None:
    raw = make_state(1)
    flat = prefixed(state, "generator_ema.model.") | prefixed(raw, "generator.model.")
    paths = [
        write(tmp_path / "a.pt", {"state_dict": {"generator": raw, "generator_ema": state}}),
        write(tmp_path / "b.safetensors", flat),
        write(tmp_path / "c.pt", {"state_dict": flat}),
        write(tmp_path / "d.pt", {"model": raw, "ema": {"shadow": state}}),
    ]
    for path in paths:
        for weights, right in (("auto", state), ("ema", state), ("raw", raw)):
            assert equal_bits(load_transformer(path, weights=weights)[0].state_dict(), right)


def test_an_average_that_is_no_model_is_passed_over(state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {"generator_ema": {"decay": ONE}, "generator": state})
    assert equal_bits(load_transformer(path)[0].state_dict(), state)


def test_a_dictionary_that_holds_itself_ends(state: State, tmp_path: Path) -> None:
    content: dict = {str(number): None for number in range(300)}
    content |= dict.fromkeys(content, content) | {"generator": state, "generator_ema": state}
    for key in list(content)[:300]:
        content[key] = content
    torch.save(content, tmp_path / "a.pt")
    start = time.process_time()
    assert equal_bits(load_transformer(tmp_path / "a.pt", weights="ema")[0].state_dict(), state)
    assert time.process_time() - start < 60


def test_dictionaries_are_searched_to_a_depth_and_a_number() -> None:
    deep: dict = {"a": ONE}
    for _ in range(50):
        deep = {"model": deep}
    assert group_tensors(deep) == ({}, ("model",))
    wide = {str(number): {"a": ONE} for number in range(5000)}
    assert len(group_tensors(wide)[0]) <= 256


def test_deep_dictionaries_are_one_line(tmp_path: Path) -> None:
    deep: dict = {"a": ONE}
    for _ in range(20):
        deep = {"model": deep}
    assert "no tensors" in message(write(tmp_path / "a.pt", deep))
    assert open_weights(
        write(tmp_path / "b.pt", {"model": {"module": {"a": ONE}}})
    ).groups.keys() == {"model.module"}
