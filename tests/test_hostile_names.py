"""Prompts and paths on the command line that are invalid: one line each, before sampling."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from autorefiner.refiner import estimate
from autorefiner.refiner.cli import main
from autorefiner.refiner.files import check_output
from autorefiner.refiner.latents import LatentWriter, inspect_latents, read_latents
from autorefiner.refiner.request import GenerateOptions
from autorefiner.refiner.video import VideoWriter, read_frames


@pytest.mark.parametrize("prompt", ["a star \udcff", "\ud800", "a\0 \0s\0t\0a\0r\0"])
def test_a_prompt_is_utf_8(prompt: str) -> None:
    with pytest.raises(ValueError, match="UTF-8"):
        GenerateOptions("sprites", Path("x.mp4"), prompt)


def test_any_other_prompt_is_taken() -> None:
    prompt = 'a "red" star; $HOME \\n\n\t é 🦊 狐狸'
    assert GenerateOptions("sprites", Path("x.mp4"), prompt).prompt == prompt


@pytest.mark.parametrize("folders", [201, 400])
def test_an_output_in_very_many_folders_is_one_line(folders: int, tmp_path: Path, capsys) -> None:
    path = tmp_path.joinpath(*["a"] * folders, "x.mp4")
    with pytest.raises(ValueError, match="folders"):
        check_output(path)
    assert main(["generate", "--model", "random-tiny", "--frames", "1", "--out", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folders_that_people_have_are_made(tmp_path: Path) -> None:
    path = tmp_path.joinpath(*"abcdefghijklmnopqrstuvwxyz", "x.mp4")
    check_output(path)
    assert path.parent.is_dir()


@pytest.mark.parametrize("every, num_read", [(1, 5), (2, 3), (4, 2), (9, 1)])
def test_the_frames_that_are_read_are_those_that_count(
    every: int, num_read: int, tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 32, 16) as writer:
        writer.write(np.zeros((5, 16, 32, 3), np.uint8))
    need = 2 * 3 * 32 * 16 * num_read
    monkeypatch.setattr(estimate, "available_bytes", lambda device: need)
    assert len(read_frames(path, every)) == num_read
    monkeypatch.setattr(estimate, "available_bytes", lambda device: need - 1)
    with pytest.raises(ValueError, match="GB"):
        read_frames(path, every)


@pytest.mark.parametrize("size", [(16_386, 2), (2, 16_386), (70_000, 2)])
def test_a_video_that_no_encoder_takes_is_refused_at_once(
    size: tuple[int, int], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="size"):
        VideoWriter(tmp_path / "x.mp4", *size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(16_384, 2), (2, 16_384)])
def test_the_largest_video_is_written(size: tuple[int, int], tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "x.mp4", *size) as writer:
        writer.write(np.zeros((1, *size[::-1], 3), np.uint8))
    assert read_frames(tmp_path / "x.mp4").shape == (1, *size[::-1], 3)


def test_latents_that_do_not_fit_in_memory_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    with LatentWriter(path, (16, 8, 8), {}) as latents:
        latents.write(torch.zeros(1, 16, 3, 8, 8))
    need = 2 * 4 * 3 * 16 * 8 * 8
    monkeypatch.setattr(estimate, "available_bytes", lambda device: need)
    assert read_latents(path)[0].shape[2] == 3
    os.truncate(path, 1 << 40)  # sparse: takes no disk space
    assert inspect_latents(path).frame_shape == (16, 8, 8)
    with pytest.raises(ValueError, match="free"):
        read_latents(path)
