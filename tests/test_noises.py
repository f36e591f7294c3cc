"""Shaped noises: correlations by their formulas, N(0, 1) in every element, white when neutral."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.choices import choose
from autorefiner.refiner.cli import main
from autorefiner.refiner.job import notes, prepare
from autorefiner.refiner.latents import read_latents
from autorefiner.refiner.noise.ar import CorrelatedNoise
from autorefiner.refiner.noise.shaping import chunk_before
from autorefiner.refiner.noise.source import Draw, WhiteNoise
from autorefiner.refiner.noise.sources import NOISES
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.samplers import best_of_n, ode
from autorefiner.refiner.schedule import PRESETS, plan_chunks

from tiny import tiny_network
from tiny_command import command, parse

SF = PRESETS["self-forcing"]
WHITE = WhiteNoise(7)
FIRST = Draw(1000)
SHAPED = ("freenoise:window=2", "antiphase:rho=0.3", "ar:b=0.8")
SIDE = 64  # 16 · 64 · 64 elements a frame: a correlation is known to within 0.004
TOLERANCE = 0.025


def source_of(noise: str, frames: int = 3, seed: int = 7):
    return choose(noise, NOISES, "noise")(WhiteNoise(seed), frames)


def drawn(noise: str, preset=SF, frames: int = 12, draw: Draw = FIRST, batch: int = 1) -> Tensor:
    """Draw the noise of every chunk of a clip [B, C, F, h, w]."""
    source = source_of(noise, preset.chunk)
    shape = (batch, 16, -1, SIDE, SIDE)
    chunks = plan_chunks(preset, frames)[1]
    each = [source(chunk, draw, (*shape[:2], chunk.length, *shape[3:])) for chunk in chunks]
    return torch.cat(each, 2)


def correlations(noise: Tensor) -> Tensor:
    """Return the correlations between the frames of a clip [F, F]."""
    return torch.corrcoef(noise[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    "neutral", ["freenoise:window=4", "antiphase:rho=0,path=1", "ar:b=0,path=1"]
)
def test_the_neutral_value_is_white(neutral: str) -> None:
    for draw in (FIRST, Draw(500, repeat=1, candidate=2)):
        assert torch.equal(drawn(neutral, draw=draw), drawn("white", draw=draw))


@pytest.mark.parametrize("noise", SHAPED)
def test_every_frame_is_standard_normal(noise: str) -> None:
    """The sum over many seeds of one element is tested as well: no element has its own scale."""
    clip = drawn(noise)[0].transpose(0, 1).flatten(1)
    assert clip.mean(1).abs().max() < TOLERANCE
    assert (clip.std(1) - 1).abs().max() < TOLERANCE
    assert ((clip.abs() < 1).float().mean(1) - 0.6827).abs().max() < TOLERANCE
    chunk = plan_chunks(SF, 12)[1][3]
    draws = torch.cat([source_of(noise, seed=s)(chunk, FIRST, (8, 1, 3, 4, 4)) for s in range(250)])
    assert draws.mean(0).abs().max() < 0.1  # of 2,000 draws
    assert (draws.std(0) - 1).abs().max() < 0.08


def test_antiphase_frames_of_a_chunk_alternate() -> None:
    within = torch.tensor([[1, -0.3, 0.3], [-0.3, 1, -0.3], [0.3, -0.3, 1]])
    expected = torch.block_diag(within, within, within, within)
    assert (correlations(drawn("antiphase:rho=0.3")) - expected).abs().max() < TOLERANCE
    clip = drawn("antiphase:rho=1")
    assert torch.equal(clip[:, :, 0], -clip[:, :, 1])


def test_ar_frames_forget_as_the_power_of_their_distance_in_chunks() -> None:
    ranks = torch.arange(30)
    distance = (ranks[:, None] - ranks).abs()
    for b in (0.8, -0.5):
        expected = torch.where(distance % 3 == 0, torch.tensor(b) ** (distance // 3), 0)
        assert (correlations(drawn(f"ar:b={b}", frames=30)) - expected).abs().max() < TOLERANCE


def test_ar_is_the_recursion_until_it_begins_anew_and_draws_a_bounded_number_of_times() -> None:
    count = 0

    def white(*arguments) -> Tensor:
        nonlocal count
        count += 1
        return WHITE(*arguments)

    source, shape = CorrelatedNoise(white, 0.5, 3), (1, 2, 3, 4, 4)
    assert source.depth == 7
    chunks = plan_chunks(SF, 60)[1]
    expected = WHITE(chunks[0], FIRST, shape)
    for chunk in chunks[1:8]:
        expected = 0.5 * expected + 0.75**0.5 * WHITE(chunk, FIRST, shape)
        assert torch.equal(source(chunk, FIRST, shape), expected)
    count = 0
    source(chunks[19], FIRST, shape)
    assert count == 8


def test_freenoise_repeats_chunks_with_permuted_frames() -> None:
    clip, plain = drawn("freenoise:window=2", frames=30), drawn("white", frames=30)
    assert torch.equal(clip[:, :, :6], plain[:, :, :6])
    orders = set()
    for start in range(6, 30, 3):
        first = plain[0, :, start % 6 : start % 6 + 3].unbind(1)
        frames = clip[0, :, start : start + 3].unbind(1)
        order = [next(i for i in range(3) if torch.equal(frame, first[i])) for frame in frames]
        assert sorted(order) == [0, 1, 2]
        orders.add(tuple(order))
    assert len(orders) > 2


@pytest.mark.parametrize("noise", SHAPED)
def test_a_short_first_and_last_chunk_take_part(noise: str) -> None:
    """Chunks of 1, 3, 3, 3, 2: the second chunk's other frames have nothing to follow."""
    preset = replace(SF, first_alone=True)
    clip = drawn(noise, preset, 12)
    assert (clip.std(dim=(0, 1, 3, 4)) - 1).abs().max() < TOLERANCE
    found = correlations(clip)
    if noise.startswith("ar"):
        assert abs(found[0, 1] - 0.8) < TOLERANCE
        assert abs(found[0, 2]) < TOLERANCE
        assert abs(found[2, 5] - 0.8) < TOLERANCE
        assert abs(found[5, 11] - 0.64) < TOLERANCE
        assert abs(found[0, 10] - 0.8**4) < TOLERANCE
    elif noise.startswith("antiphase"):
        assert abs(found[0, 1]) < TOLERANCE
        assert abs(found[10, 11] + 0.3) < TOLERANCE
    else:  # the first chunk is not repeated: chunks 3 and 4 repeat 1 and 2
        assert found[0, 1:].abs().max() < TOLERANCE
        assert [round(float(row[:7].max())) for row in found[7:]] == [1] * 5


@pytest.mark.parametrize("noise", SHAPED)
def test_samples_levels_repeats_and_candidates_are_independent(noise: str) -> None:
    noise = f"{noise},path=1"
    batch = drawn(noise, frames=9, batch=2)
    assert torch.equal(batch[:1], drawn(noise, frames=9))
    others = [Draw(500), Draw(1000, repeat=1), Draw(1000, candidate=1)]
    for other in (batch[1:], *(drawn(noise, frames=9, draw=draw) for draw in others)):
        both = torch.stack((batch[:1].flatten(), other.flatten()))
        assert abs(torch.corrcoef(both)[0, 1]) < TOLERANCE


@pytest.mark.parametrize("noise", SHAPED)
def test_only_initial_noise_is_shaped_unless_the_path_is_too(noise: str) -> None:
    for draw in (Draw(750), Draw(250, repeat=1)):
        assert torch.equal(drawn(noise, draw=draw), drawn("white", draw=draw))
        assert not torch.equal(drawn(f"{noise},path=1", draw=draw), drawn("white", draw=draw))


@pytest.mark.parametrize("noise", SHAPED)
@pytest.mark.parametrize("first_alone", [False, True])
def test_a_run_that_goes_on_draws_the_same_noise(noise: str, first_alone: bool) -> None:
    preset = replace(SF, first_alone=first_alone)
    network, context, given = tiny_network(), torch.zeros(1, 8, 32), 7 if first_alone else 6

    def clip(frames: int, initial: Tensor | None = None) -> Tensor:
        plan = RunPlan(preset, frames, 4, 4, given=0 if initial is None else initial.shape[2])
        options = {"noise": source_of(noise), "initial": initial, "method": ode()}
        return torch.cat(list(sample(network, context, plan, **options)), 2)

    whole = clip(14)
    assert torch.equal(clip(14 - given, whole[:, :, :given]), whole[:, :, given:])
    plan = RunPlan(preset, 14, 4, 4)
    plain = torch.cat(list(sample(network, context, plan, seed=7, method=ode())), 2)
    assert not torch.equal(plain, whole)


def test_candidates_of_a_search_draw_shaped_noise() -> None:
    draws = []

    class Judge:
        def score(self, x0, chunk):
            return torch.zeros(1)

        def keep(self, x0, chunk):
            pass

    class Verifier:
        def begin(self):
            return Judge()

    source = source_of("ar:b=0.9")

    def recorded(chunk, draw, shape) -> Tensor:
        draws.append((chunk.index, draw.step, draw.candidate))
        return source(chunk, draw, shape)

    plan = RunPlan(SF.changed(levels=(1000,)), 6, 4, 4)
    list(
        sample(
            tiny_network(), torch.zeros(1, 8, 32), plan, noise=recorded,
            method=best_of_n(Verifier(), 2),
        )
    )  # fmt: skip
    assert draws == [(chunk, 1000, candidate) for chunk in (0, 1) for candidate in (0, 1)]


@pytest.mark.parametrize("first_alone", [False, True])
def test_earlier_chunks_are_those_of_the_plan(first_alone: bool) -> None:
    chunks = plan_chunks(replace(SF, first_alone=first_alone), 12)[1]
    for later in chunks:
        assert [chunk_before(later, each.index, 3) for each in chunks[: later.index + 1]] == list(
            chunks[: later.index + 1]
        )


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ("pink", "white, freenoise"),
        ("antiphase:rho=1.5", "rho"),
        ("ar:b=1", "0.95"),
        ("freenoise:window=0", "window"),
        ("ar:path=2", "path"),
        ("white:path=1", "none"),
    ],
)
def test_wrong_noises_are_one_line(noise: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        source_of(noise)
    assert "\n" not in str(error.value)


def test_a_noise_is_chosen_said_and_held_to_when_a_clip_goes_on(files, tmp_path, capsys) -> None:
    def latents(name: str, frames: int, *more: str) -> Tensor:
        out = tmp_path / f"{name}.mp4"
        short = ("--save-latents", "--levels", "1000", "--frames", str(frames), *more)
        assert main(command(files, out, *short, "--noise", "ar:b=0.7")) == 0
        return read_latents(out.with_suffix(".latents.safetensors"))[0]

    whole = latents("whole", 21)
    assert "noise ar:b=0.7" in capsys.readouterr().err
    assert torch.equal(whole[:, :, :3], latents("short", 9))
    short = ("--extend", str(tmp_path / "short.latents.safetensors"))
    assert torch.equal(latents("again", 21, *short), whole)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "whole.mp4")]) == 0
    assert "noise     2, ar:b=0.7" in capsys.readouterr().out
    job = prepare(parse(command(files, tmp_path / "b.mp4", "--levels", "1000", *short)))
    assert job.metadata["noise"] == "2"
    assert "noise 2, ar:b=0.7 (now 2)" in " ".join(notes(job))
    assert main(command(files, tmp_path / "c.mp4", "--noise", "ar:b=2")) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "c.mp4").exists()
