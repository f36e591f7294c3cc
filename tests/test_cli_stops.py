"""Stopping `generate`, extending a clip and continuing an interrupted run, on the command line."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from autorefiner.refiner.cli import main
from autorefiner.refiner.generate import generate
from autorefiner.refiner.job import notes, prepare
from autorefiner.refiner.latents import HEADER, read_latents
from autorefiner.refiner.video import read_frames

from tiny_command import command, parse


def test_extending_saved_latents_gives_the_video_that_was_not_interrupted(files, tmp_path) -> None:
    whole, first, rest = (tmp_path / f"{name}.mp4" for name in ("whole", "first", "rest"))
    assert main(command(files, whole, "--save-latents")) == 0
    assert main(command(files, first, "--save-latents", "--frames", "21")) == 0
    start = tmp_path / "first.latents.safetensors"
    assert main(command(files, rest, "--save-latents", "--extend", str(start))) == 0
    latents = [read_latents(path.with_suffix(".latents.safetensors"))[0] for path in (whole, rest)]
    assert torch.equal(*latents)
    assert (read_frames(whole) == read_frames(rest)).all()


def test_a_run_that_goes_on_with_other_options_says_so(files, tmp_path) -> None:
    assert main(command(files, tmp_path / "first.mp4", "--save-latents", "--frames", "21")) == 0
    latents = tmp_path / "first.latents.safetensors"
    again = [*command(files, tmp_path / "rest.mp4"), "--extend", str(latents)]
    assert not notes(prepare(parse(again)))
    changed = [
        "--seed",
        "8",
        "--method",
        "ode",
        "--dtype",
        "bf16",
        "--preset",
        "causal-forcing-framewise",
    ]
    (note,) = notes(prepare(parse([*again, *changed, "--prompt", "a cat"])))
    assert "seed 0 (now 8), method self-forcing (now ode), " in note
    assert (
        "dtype float32 (now bfloat16), preset self-forcing (now causal-forcing-framewise)" in note
    )
    assert "chunks of 3x2 (now 1x6)" in note
    assert "cat" not in note


def test_a_run_may_go_on_from_the_partial_file_that_it_writes(files, tmp_path) -> None:
    """The new partial file starts with the given latents, so a second stop loses nothing."""
    out = tmp_path / "fox.mp4"
    run = command(files, out, "--save-latents", "--frames", "57")
    iterator = generate(prepare(parse(run)))
    next(iterator), next(iterator)
    iterator.close()
    partial = tmp_path / "fox.latents.partial.safetensors"
    kept = read_latents(partial)[0]
    given = kept.shape[2]
    assert 6 <= given <= 9, "one chunk is sampled while another is written"
    with pytest.raises(ValueError, match=r"--extend .*partial.safetensors"):
        prepare(parse(run))
    assert torch.equal(read_latents(partial)[0], kept)
    iterator = generate(prepare(parse([*run, "--extend", str(partial)])))
    next(iterator)
    assert torch.equal(read_latents(partial)[0][:, :, :given], kept)
    assert list(iterator) == [21, 33, 45, 57]
    assert torch.equal(read_latents(tmp_path / "fox.latents.safetensors")[0][:, :, :given], kept)


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
def test_a_stopped_run_leaves_every_finished_chunk_and_can_be_continued(
    files, tmp_path, sent, code
) -> None:
    out, partial, latents = (
        tmp_path / f"fox{end}" for end in (".mp4", ".partial.mp4", ".latents.partial.safetensors")
    )
    out.write_bytes(b"old")
    args = command(files, out, "--save-latents", "--overwrite", "--frames", "4001", "--window", "9")
    ignored = signal.SIGINT if sent is signal.SIGTERM else signal.SIGUSR1  # as in a background job
    run = subprocess.Popen(
        [sys.executable, "-m", "autorefiner.refiner.cli", *args],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: (
            signal.signal(signal.SIGINT, signal.SIG_DFL),
            signal.signal(ignored, signal.SIG_IGN),
        ),
    )
    three_chunks = HEADER + 9 * 16 * 4 * 6 * 4  # latents, written before the chunk's pixels
    while not (latents.exists() and latents.stat().st_size > three_chunks) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(sent)
    _, errors = run.communicate()
    assert run.returncode == code
    frames, kept = len(read_frames(partial)), read_latents(latents)[0]
    behind = kept.shape[2] - (frames + 3) // 4
    assert behind in (0, 3, 6), "latents come first; a chunk is sampled while another is written"
    if sent is not signal.SIGKILL:
        assert frames >= 21 and behind < 6, "chunks on their way to the file are written"
    assert out.read_bytes() == b"old"
    if sent is not signal.SIGKILL:
        assert f"{frames} frames are in {partial}" in errors.decode()
    total = 4 * (kept.shape[2] + 3) - 3
    again = tmp_path / "again.mp4"
    assert (
        main(
            command(files, again, "--extend", str(latents), "--frames", str(total), "--window", "9")
        )
        == 0
    )
    assert len(read_frames(again)) == total


def test_a_stop_while_models_load_says_nothing_of_an_earlier_run(
    files, tmp_path, capsys, monkeypatch
) -> None:
    iterator = generate(prepare(parse(command(files, tmp_path / "fox.mp4"))))
    next(iterator)
    iterator.close()
    earlier = tmp_path / "fox.partial.mp4"
    frames = len(read_frames(earlier))
    os.utime(earlier, (0, 0))

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("autorefiner.refiner.generate.load_network", stop)
    assert main(command(files, tmp_path / "fox.mp4")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: no chunk was finished"
    assert len(read_frames(earlier)) == frames >= 9


def test_a_stop_before_the_first_chunk_leaves_nothing(files, tmp_path, capsys, monkeypatch) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    for place in ("generate.load_network", "generate.sample", "job.open_checkpoint"):
        monkeypatch.setattr(f"autorefiner.refiner.{place}", stop)
        assert main(command(files, tmp_path / "fox.mp4", "--save-latents")) == 130
        assert capsys.readouterr().err.splitlines()[-1].startswith("stopped")
        assert not list(tmp_path.iterdir())
