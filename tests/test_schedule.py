"""Levels, chunks and presets against the published figures."""

import re

import pytest

from autorefiner.refiner.cli import main
from autorefiner.refiner.preset_table import preset_table
from autorefiner.refiner.schedule import (
    PRESETS,
    Preset,
    chunk_lengths,
    get_preset,
    latent_frames,
    make_level,
    plan_chunks,
    sigma_table,
)


@pytest.mark.parametrize(
    ("shift", "timesteps"),
    [
        (5.0, [1000.0, 937.5, 833.3333, 625.0]),
        (8.0, [1000.0, 960.0, 888.8889, 727.2728]),
        (3.0, [1000, 900, 750, 500]),
    ],
)
def test_warped_steps_are_the_published_timesteps(shift, timesteps) -> None:
    levels = Preset((1000, 750, 500, 250), True, shift, 3).chunk_levels()
    assert [level.t for level in levels] == pytest.approx(timesteps, abs=2e-4)
    assert [level.sigma for level in levels] == pytest.approx(
        [t / 1000 for t in timesteps], abs=2e-7
    )
    assert [level.step for level in levels] == [1000, 750, 500, 250]


def test_unwarped_steps_take_the_nearest_sigma_of_the_table() -> None:
    """CausVid's t = 757 has sigma 0.756757, not 0.757; 250 at shift 5 has 0.251597."""
    assert make_level(757, 8.0, warp=False).sigma == pytest.approx(0.75675672, abs=1e-7)
    assert make_level(522, 8.0, warp=False).sigma == pytest.approx(0.52173913, abs=1e-7)
    assert make_level(250, 5.0, warp=False).sigma == pytest.approx(0.25159743, abs=1e-7)
    assert make_level(757, 8.0, warp=False).t == 757


def test_the_table_ends_above_zero() -> None:
    assert float(sigma_table(5.0)[-1]) == pytest.approx(0.00498008, abs=1e-8)
    assert float(sigma_table(8.0)[-1]) == pytest.approx(0.00794439, abs=1e-8)


def test_presets_are_the_published_models() -> None:
    assert {name: len(preset.levels) for name, preset in PRESETS.items()} == {
        "self-forcing": 4, "causvid": 3, "longlive": 4, "causal-forcing": 4,
        "causal-forcing-framewise": 4, "causal-forcing-2step": 2, "causal-forcing-1step": 1,
        "krea-14b": 4, "raven": 4, "reward-forcing": 4, "infinite-forcing": 4, "one-forcing": 1,
        "opsd-v": 4, "self-forcing-14b": 4, "longlive-14b": 4, "streamdiffusion-v2": 4,
        "rolling-forcing": 5,
    }  # fmt: skip
    windows = {
        name: (preset.window, preset.sink, preset.positions) for name, preset in PRESETS.items()
    }
    assert {name: window for name, window in windows.items() if window != (-1, 0, "absolute")} == {
        "longlive": (12, 3, "absolute"), "krea-14b": (6, 1, "relative"),
        "reward-forcing": (9, 3, "sink-adjacent"), "infinite-forcing": (6, 1, "relative"),
        "opsd-v": (12, 3, "relative"), "longlive-14b": (12, 3, "absolute"),
        "rolling-forcing": (21, 3, "sink-adjacent"),
    }  # fmt: skip
    memories = {name: preset.memory for name, preset in PRESETS.items()}
    assert {name: memory for name, memory in memories.items() if memory != "window"} == {
        "reward-forcing": "ema-sink"
    }
    assert all(preset.source for preset in PRESETS.values())
    with pytest.raises(ValueError, match="self-forcing, causvid"):
        get_preset("wan")


def test_newer_models_are_sampled_as_their_authors_do() -> None:
    def sigmas(name: str, first: bool = False) -> list[float]:
        return [level.sigma for level in PRESETS[name].chunk_levels(first)]

    for name in (
        "raven",
        "reward-forcing",
        "infinite-forcing",
        "opsd-v",
        "self-forcing-14b",
        "longlive-14b",
    ):
        assert (sigmas(name), PRESETS[name].chunk) == (sigmas("self-forcing"), 3)
    assert sigmas("one-forcing", first=True) == sigmas("one-forcing") == [1.0]
    assert PRESETS["one-forcing"].chunk == 1
    assert sigmas("streamdiffusion-v2") == pytest.approx([1, 0.75, 0.5, 0.25], abs=2e-3)


def test_the_table_has_a_row_of_each_preset(capsys) -> None:
    assert main(["presets"]) == 0
    assert capsys.readouterr().out == preset_table() + "\n"
    rows = {row[0]: row for row in (re.split(r"  +", line) for line in preset_table().splitlines())}
    assert set(rows) == {"preset", *PRESETS}
    assert rows["infinite-forcing"][1:] == [
        "1000,750,500,250", "yes", "5", "3", "6/1", "relative", "window",
        PRESETS["infinite-forcing"].source,
    ]  # fmt: skip
    assert rows["causal-forcing-2step"][1] == "1000,500 (first 1000,750,500,250)"
    assert rows["streamdiffusion-v2"][2:7] == ["no", "8", "3", "all", "absolute"]


def test_the_first_chunk_may_have_its_own_levels() -> None:
    _, chunks = plan_chunks(PRESETS["causal-forcing-2step"], 3)
    assert [[level.step for level in chunk.levels] for chunk in chunks] == [
        [1000, 750, 500, 250],
        [1000, 500],
        [1000, 500],
    ]
    _, continued = plan_chunks(PRESETS["causal-forcing-2step"], 2, given=1)
    assert [[level.step for level in chunk.levels] for chunk in continued] == [
        [1000, 500],
        [1000, 500],
    ]


@pytest.mark.parametrize(
    ("frames", "chunk", "first_alone", "lengths"),
    [
        (21, 3, False, [3] * 7),
        (7, 3, False, [3, 3, 1]),
        (7, 3, True, [1, 3, 3]),
        (2, 3, False, [2]),
        (3, 1, False, [1] * 3),
    ],
)
def test_chunk_lengths(frames, chunk, first_alone, lengths) -> None:
    assert chunk_lengths(frames, chunk, first_alone) == lengths


@pytest.mark.parametrize(
    ("given", "lengths"), [(0, []), (1, [1]), (3, [3]), (6, [3, 3]), (7, [1, 3, 3])]
)
def test_given_frames_come_before_the_new_ones(given, lengths) -> None:
    past, new = plan_chunks(PRESETS["self-forcing"], 6, given)
    assert [chunk.length for chunk in past] == lengths
    assert [chunk.start for chunk in new] == [given, given + 3]
    assert [chunk.index for chunk in past + new] == list(range(len(past) + 2))


@pytest.mark.parametrize("given", [2, 5, 8])
def test_given_frames_that_fit_no_chunks_are_refused(given) -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        plan_chunks(PRESETS["self-forcing"], 3, given)


def test_pixel_frames_are_one_and_a_multiple_of_four() -> None:
    assert [latent_frames(n) for n in (1, 5, 81)] == [1, 2, 21]
    with pytest.raises(ValueError, match="77 and 81"):
        latent_frames(80)
    with pytest.raises(ValueError, match="1 and 5"):
        latent_frames(0)


@pytest.mark.parametrize("steps", [(), (500, 750), (750, 750), (1001, 500), (500, 0)])
def test_levels_that_do_not_fall_are_refused(steps) -> None:
    with pytest.raises(ValueError, match="fall strictly"):
        Preset(steps, True, 5.0, 3)


def test_a_window_smaller_than_sink_and_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 6"):
        PRESETS["self-forcing"].changed(window=5, sink=3)
    assert PRESETS["self-forcing"].changed(window=None) == PRESETS["self-forcing"]
