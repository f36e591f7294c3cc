"""The memory of a command that names none."""

import pytest

from autorefiner.refiner.cli import main
from autorefiner.refiner.job import prepare

from tiny_command import parse


def memory_of(tmp_path, *options: str) -> tuple[str, int, int, str]:
    command = [
        "generate", "--model", "random-tiny", "--size", "32x32", "--device", "cpu", "--dry-run",
        "--out", str(tmp_path / "a.mp4"), *options,
    ]  # fmt: skip
    job = prepare(parse(command))
    memory = job.plan.memory(job.config, job.dtype)
    assert memory.policy.name == job.memory
    return job.memory, job.preset.window, job.preset.sink, job.preset.positions


FULL = ("window", -1, 0, "absolute")
LONG = ("deep-sink", 21, 10, "sink-adjacent")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--frames", "81"), FULL),
        (("--frames", "85"), LONG),
        (("--frames", "endless"), LONG),
        (("--frames", "161", "--window", "12"), ("window", 12, 0, "absolute")),
        (("--frames", "161", "--window", "-1"), FULL),
        (("--frames", "161", "--memory", "window"), FULL),
        (("--frames", "161", "--positions", "relative"), ("window", -1, 0, "relative")),
        (("--frames", "161", "--method", "rolling"), FULL),
        (("--frames", "161", "--timeline", "a | b"), FULL),
        (("--frames", "161", "--preset", "causvid"), FULL),
        (("--frames", "161", "--preset", "longlive"), ("window", 12, 3, "absolute")),
        (("--frames", "81", "--memory", "ema-sink"), ("ema-sink", 12, 3, "sink-adjacent")),
        (("--frames", "81", "--memory", "ema-sink", "--sink", "6"),
         ("ema-sink", 12, 6, "sink-adjacent")),
    ],
)  # fmt: skip
def test_length_chooses_the_memory_where_nothing_else_does(tmp_path, options, expected) -> None:
    assert memory_of(tmp_path, *options) == expected


def test_a_long_clip_goes_on_with_its_memory(tmp_path, capsys) -> None:
    small = [
        "generate", "--model", "random-tiny", "--size", "32x32", "--device", "cpu",
        "--levels", "1000",
    ]  # fmt: skip
    for name, frames in (("short", "9"), ("long", "85")):
        out = ["--out", str(tmp_path / f"{name}.mp4"), "--save-latents"]
        assert main([*small, "--frames", frames, *out]) == 0
    for name, expected in (("short", FULL), ("long", LONG)):
        given = str(tmp_path / f"{name}.latents.safetensors")
        options = ("--levels", "1000", "--frames", "97", "--extend", given)
        assert memory_of(tmp_path, *options) == expected
    assert memory_of(tmp_path, *options, "--prompt", "another") == FULL
