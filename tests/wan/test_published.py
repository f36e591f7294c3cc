"""Files of every layout, model and stage get the right preset or a question, never a wrong one."""

from pathlib import Path

import pytest
import torch
from published import State, equal_bits, message, prefixed, write
from published_files import CASES, Case, generator, small_state, write_case

from autorefiner.nodes.load import choose_preset
from autorefiner.refiner.cli import main
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.checkpoint import inspect, load_transformer


@pytest.fixture(scope="module")
def state() -> State:
    return small_state()


def test_the_table_is_as_large_as_the_kinds_of_files() -> None:
    assert len(CASES) >= 60
    others = {"opsd-v", "rolling-forcing"}  # a LoRA's, and one that needs a method of its own
    assert {case.preset for case in CASES} - {None} >= set(PRESETS) - others


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}{' 14B' * case.large}")
def test_a_file_opens_as_what_it_is(case: Case, state: State, tmp_path: Path) -> None:
    root = tmp_path / "x" / "y" / "z"  # the folder of the test itself has a telling name
    path = write_case(case, root, state)
    info = inspect(path)
    assert (info.kind, info.preset) == (case.kind, case.preset), info.preset_reason
    if case.kind == "transformer" and case.opens and case.preset is None:
        assert 2 <= len(info.likely) <= 3 and info.likely[0] == case.likely, info.likely
        assert set(info.likely) <= set(PRESETS) and len(set(info.likely)) == len(info.likely)
        assert (
            f"pass --preset {info.likely[0]}" in info.preset_reason
            and info.likely[-1] in info.preset_reason
        )
        with pytest.raises(ValueError, match="widget"):
            choose_preset("auto", info)
    if case.kind != "transformer" or not case.opens:
        message(path)
    elif not case.large:
        loaded = load_transformer(path)[0].state_dict()
        assert equal_bits(loaded, state) is case.exact
        assert all(
            torch.allclose(loaded[name], tensor, rtol=0.07, atol=0.02)
            for name, tensor in state.items()
        )


def test_half_a_model_is_refused_and_named(state: State, tmp_path: Path) -> None:
    for case in (case for case in CASES if case.name.startswith("CausalWan")):
        path = write_case(case, tmp_path, state)
        assert "experts" in message(path) and "experts" in inspect(path).preset_reason
        with pytest.raises(ValueError, match="experts"):
            choose_preset("auto", inspect(path))
    assert "experts" in message(tmp_path / "CausalWan2.2-A14B"), "its root, too"
    assert "experts" in message(tmp_path / "CausalWan2.2-A14B" / "transformer_2")


def test_a_prefix_that_is_not_removed_is_named(state: State, tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "a.safetensors", prefixed(state, "strange.model."))
    assert "'strange.model.'" in message(path)
    assert any("'strange.model.'" in note for note in inspect(path).notes)
    assert (
        main(["generate", "--model", str(path), "--out", str(tmp_path / "a.mp4"), "--dry-run"]) == 2
    )
    assert "'strange.model.'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"strange\.model"):
        choose_preset("auto", inspect(path))


def test_a_critic_alone_is_no_generator(state: State, tmp_path: Path) -> None:
    contents = {
        "critic": {"critic": state},
        "fake_score": {"model": {"fake_score": state}},
        "teacher": prefixed(state, "teacher."),
    }
    for role, content in contents.items():
        assert role in message(write(tmp_path / f"{role}_alone.pt", content)).split("holds")[1]


def test_two_models_under_one_name_are_not_chosen_between(state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {"generator": {"first": state, "second": dict(state)}})
    assert "two models" in message(path)


def test_the_command_line_asks_with_the_likely_presets(
    state: State, tmp_path: Path, capsys
) -> None:
    path = write(tmp_path / "x" / "y" / "z" / "longlive_mine.pt", generator(state))
    request = [
        "generate",
        "--model",
        str(path),
        "--out",
        str(tmp_path / "a.mp4"),
        "--dry-run",
        "--prompt",
        "a fox",
    ]
    assert main(request) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--preset longlive, causvid or causal-forcing" in error
    assert main([*request, "--preset", "longlive"]) == 0


def test_metadata_that_names_no_preset_is_refused(state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", state, {"autorefiner": '{"preset": "mush"}'})
    with pytest.raises(ValueError, match="mush"):
        choose_preset("auto", inspect(path))
