"""Runs never overwrite each other's output, and a killed run resumes to the same clip."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autorefiner.refiner.cli import main
from autorefiner.refiner.generate import generate
from autorefiner.refiner.job import notes, prepare
from autorefiner.refiner.latents import HEADER, read_latents
from autorefiner.refiner.video import VideoWriter

from tiny_command import FRAMES, command, parse

FRAME_BYTES = 4 * 16 * 4 * 6  # bytes of a latent frame


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """Return a folder with an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(command(files, folder / "fox.mp4", "--save-latents")) == 0
    return folder


def pixels(path: Path) -> np.ndarray:
    """Return every decoded frame of a video."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def assert_same_run(folder: Path, whole: Path) -> None:
    for name in ("fox.latents.safetensors",):
        assert torch.equal(read_latents(folder / name)[0], read_latents(whole / name)[0])
    assert np.array_equal(pixels(folder / "fox.mp4"), pixels(whole / "fox.mp4"))
    assert sorted(path.name for path in folder.iterdir()) == ["fox.latents.safetensors", "fox.mp4"]


def leave_killed(whole: Path, folder: Path, frames: float) -> Path:
    """Write partial latents as a kill leaves them: no frame count, the given number of frames."""
    source, partial = whole / "fox.latents.safetensors", folder / "fox.latents.partial.safetensors"
    size = 8 + HEADER + int(frames * FRAME_BYTES)
    data = source.read_bytes()
    header = (
        data[: 8 + HEADER]
        .replace(b'"shape": [9, ', b'"shape": [0, ')
        .replace(b"[0, 13824]", b"[0, 0]")
    )
    partial.write_bytes((header + b" " * (8 + HEADER - len(header)) + data[8 + HEADER :])[:size])
    return partial


@pytest.mark.filterwarnings("ignore:.*unfinished chunk")
@pytest.mark.parametrize("frames", [3, 4, 5.5, 6, 8, 9])
def test_a_killed_run_goes_on_to_the_clip_it_would_have_made(
    files, tmp_path, whole, frames
) -> None:
    partial = leave_killed(whole, tmp_path, frames)
    assert (
        main(command(files, tmp_path / "fox.mp4", "--save-latents", "--extend", str(partial))) == 0
    )
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("extends", [False, True])
@pytest.mark.parametrize("frames", [0, 0.5, 2.9])
def test_a_kill_before_the_first_chunk_blocks_nothing(
    files, tmp_path, whole, extends, frames
) -> None:
    partial = leave_killed(whole, tmp_path, frames)
    (tmp_path / "fox.partial.mp4").touch()
    again = command(
        files,
        tmp_path / "fox.mp4",
        "--save-latents",
        *(["--extend", str(partial)] if extends else []),
    )
    assert any("anew" in note for note in notes(prepare(parse(again)))) == extends
    assert main(again) == 0
    assert_same_run(tmp_path, whole)


def test_a_run_whose_latents_are_all_there_only_decodes(
    files, tmp_path, whole, monkeypatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("no model is needed")

    partial = leave_killed(whole, tmp_path, 9)
    for name in ("load_network", "make_context"):
        monkeypatch.setattr(f"autorefiner.refiner.generate.{name}", fail)
    assert (
        main(command(files, tmp_path / "fox.mp4", "--save-latents", "--extend", str(partial))) == 0
    )
    assert_same_run(tmp_path, whole)


def test_latents_of_a_chunk_are_on_disk_before_the_video_shows_it(
    files, tmp_path, monkeypatch
) -> None:
    partial, saved = tmp_path / "fox.latents.partial.safetensors", []
    write = VideoWriter.write

    def look(writer: VideoWriter, frames: np.ndarray) -> None:
        saved.append((partial.stat().st_size - 8 - HEADER) // FRAME_BYTES)
        write(writer, frames)

    monkeypatch.setattr(VideoWriter, "write", look)
    assert main(command(files, tmp_path / "fox.mp4", "--save-latents")) == 0
    assert len(saved) == 3
    assert all(frames >= 3 * chunk for chunk, frames in enumerate(saved, 1))


def test_a_second_stop_while_the_given_part_is_written_again_loses_nothing(
    files, tmp_path, whole
) -> None:
    out, partial = tmp_path / "fox.mp4", leave_killed(whole, tmp_path, 6)
    before = read_latents(partial)[0]
    run = generate(prepare(parse(command(files, out, "--save-latents", "--extend", str(partial)))))
    assert next(run) == 9
    run.close()
    assert torch.equal(read_latents(partial)[0][:, :, :6], before)
    assert main(command(files, out, "--save-latents", "--extend", str(partial))) == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("name", ["fox.mp4", "fox.latents.safetensors", "fox.png"])
def test_what_is_there_is_only_replaced_when_that_is_asked_for(
    files, tmp_path, whole, name, capsys
) -> None:
    (tmp_path / name).write_bytes(b"old")
    run = command(
        files, tmp_path / "fox.mp4", "--save-latents", "--sheet", str(tmp_path / "fox.png")
    )
    assert main(run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert "--overwrite" in line
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    assert main([*run, "--overwrite"]) == 0
    (tmp_path / "fox.png").unlink()
    assert_same_run(tmp_path, whole)


def test_an_overwritten_video_leaves_no_latents_of_the_old_one(files, tmp_path, whole) -> None:
    out = tmp_path / "fox.mp4"
    for name in ("fox.latents.safetensors", "fox.latents.partial.safetensors"):
        (tmp_path / name).write_bytes((whole / "fox.latents.safetensors").read_bytes())
        with pytest.raises(ValueError, match="--overwrite"):
            prepare(parse(command(files, out)))
        assert main(command(files, out, "--overwrite", "--frames", "9")) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["fox.mp4"]
        out.unlink()


def test_a_clip_may_be_extended_into_its_own_file(files, tmp_path) -> None:
    out, latents = tmp_path / "fox.mp4", tmp_path / "fox.latents.safetensors"
    assert main(command(files, out, "--save-latents", "--frames", "21")) == 0
    first = pixels(out)
    assert main(command(files, out, "--save-latents", "--extend", str(latents))) == 0
    assert len(pixels(out)) == FRAMES
    assert len(first) == 21
    assert read_latents(latents)[0].shape[2] == 9


@pytest.mark.filterwarnings("ignore:.*no whole chunk")
def test_a_last_chunk_that_is_short_is_made_anew_or_said(files, tmp_path, whole) -> None:
    """At 29 frames the last chunk has two of three latent frames; at 25 one, which is kept."""
    out, latents = tmp_path / "fox.mp4", tmp_path / "fox.latents.safetensors"
    assert main(command(files, out, "--save-latents", "--frames", "29")) == 0
    assert main(command(files, out, "--save-latents", "--extend", str(latents))) == 0
    assert_same_run(tmp_path, whole)
    assert main(command(files, out, "--save-latents", "--overwrite", "--frames", "25")) == 0
    (note,) = notes(prepare(parse(command(files, out, "--extend", str(latents)))))
    assert "chunks of 3x2,1 (now 1,3x2)" in note


def test_latents_of_another_version_of_the_noise_are_said(files, tmp_path, whole) -> None:
    old = tmp_path / "old.safetensors"
    data = (whole / "fox.latents.safetensors").read_bytes()
    old.write_bytes(data.replace(b', "noise": "2"', b"", 1).replace(b"  ", b"  " + b" " * 14, 1))
    assert "noise" not in read_latents(old)[1]
    (note,) = notes(
        prepare(parse(command(files, tmp_path / "b.mp4", "--extend", str(old), "--frames", "45")))
    )
    assert "noise 1 (now 2)" in note


def test_a_damaged_model_makes_no_black_clip(files, tmp_path, capsys) -> None:
    weights = load_file(files / "model.safetensors")
    weights["blocks.0.ffn.0.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    model = ["--model", str(tmp_path / "nan.safetensors"), "--preset", "self-forcing"]
    assert main(command(files, tmp_path / "fox.mp4", "--save-latents", *model)) == 2
    assert "NaN" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]


def test_latents_that_are_not_finite_are_not_extended(files, tmp_path, whole, capsys) -> None:
    bad = tmp_path / "bad.safetensors"
    data = bytearray((whole / "fox.latents.safetensors").read_bytes())
    data[8 + HEADER : 12 + HEADER] = np.float32("inf").tobytes()
    bad.write_bytes(data)
    assert main(command(files, tmp_path / "fox.mp4", "--extend", str(bad), "--frames", "45")) == 2
    assert "NaN" in capsys.readouterr().err.splitlines()[-1]
