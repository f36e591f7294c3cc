"""`generate --timeline` and new prompts with `--extend`, on the command line."""

import json

import pytest
import torch

from autorefiner.refiner import generate as generation
from autorefiner.refiner.cli import main
from autorefiner.refiner.job import notes, prepare
from autorefiner.refiner.latents import read_latents
from autorefiner.refiner.timeline import Flush, Keep, Recache, Scene
from autorefiner.refiner.video import read_metadata

from tiny_command import parse

TEXT = "0s a star\n0.7s recache 3: a box\nf30 flush 2: a ring"  # chunks at f9, f21, f33, f45


def arguments(out, *extra: str, frames: int = 45) -> list[str]:
    return [
        "generate", "--model", "random-tiny", "--size", "32x32", "--frames", str(frames),
        "--device", "cpu", "--save-latents", "--out", str(out), *extra,
    ]  # fmt: skip


def latents(out) -> torch.Tensor:
    return read_latents(out.with_suffix(".latents.safetensors"))[0]


def scenes(*options: str) -> tuple[Scene, ...]:
    return prepare(parse(arguments(*options))).timeline.timeline.scenes


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A clip of a timeline, and its first 21 frames made by a run of their own."""
    folder = tmp_path_factory.mktemp("timeline")
    (folder / "prompts.txt").write_text(TEXT)
    whole, start = folder / "whole.mp4", folder / "start.mp4"
    assert main(arguments(whole, "--timeline", str(folder / "prompts.txt"))) == 0
    # the third prompt starts after these frames
    first = "\n".join(TEXT.split("\n")[:2])
    assert main(arguments(start, "--timeline", first, frames=33)) == 0
    return whole, start


def test_a_timeline_is_shown_and_kept_and_inspected(clip, capsys) -> None:
    whole, _ = clip
    kept = "f0 a star\nf21 recache 3: a box\nf33 flush 2: a ring"
    file = whole.with_suffix(".latents.safetensors")
    assert read_metadata(whole)["timeline"] == read_latents(file)[1]["timeline"] == kept
    assert read_metadata(whole)["prompt"] == "a ring"
    capsys.readouterr()
    for path in (whole, file):
        assert main(["inspect", str(path)]) == 0
        assert "timeline\n  f0 a star\n  f21 recache 3: a box\n" in capsys.readouterr().out
    again = arguments(whole, "--timeline", kept, "--overwrite", "--dry-run")
    assert main(again) == 0
    assert "0.7s" not in (shown := capsys.readouterr().err)
    assert "f21 -> chunk 3, frame 21 (1.3 s), recache 3: a box" in shown


def test_a_timeline_that_goes_on_is_the_timeline_that_was_not_stopped(clip, tmp_path) -> None:
    whole, start = clip
    given = str(start.with_suffix(".latents.safetensors"))
    rest = tmp_path / "rest.mp4"
    assert main(arguments(rest, "--timeline", TEXT, "--extend", given)) == 0
    assert torch.equal(latents(rest), latents(whole))
    assert read_metadata(rest)["timeline"] == read_metadata(whole)["timeline"]


def test_a_recipe_may_end_a_clip_before_a_prompt(clip, tmp_path) -> None:
    kept = tmp_path / "kept.mp4"
    assert main(arguments(kept, "--timeline", TEXT, "--recipe", "keep 2")) == 0
    assert torch.equal(latents(kept), latents(clip[0])[:, :, :6])


@pytest.mark.parametrize("recipe, starts", [("keep 3", [0]), ("extend 3", [0, 9])])
def test_a_recipe_moves_no_equal_parts(recipe: str, starts: list[int], tmp_path) -> None:
    placed = scenes(tmp_path / "a.mp4", "--timeline", "a star | a box", "--recipe", recipe)
    assert [scene.start for scene in placed] == starts


def test_a_new_prompt_takes_over_an_extended_clip(clip, tmp_path) -> None:
    """As the timeline that says the same; again and without a prompt it goes on."""
    whole, start = clip
    extend = ["--extend", str(start.with_suffix(".latents.safetensors"))]
    rest = tmp_path / "rest.mp4"
    old = (Scene(0, "a star"), Scene(6, "a box", Recache(3)))
    options = ["--prompt", "a ring", *extend]
    assert scenes(rest, *options) == (*old, Scene(9, "a ring", Flush(1)))
    for name, transition in (("keep", Keep()), ("recache", Recache(12)), ("flush 2", Flush(2))):
        chosen = [*options, "--transition", name]
        assert scenes(rest, *chosen) == (*old, Scene(9, "a ring", transition))
    assert main(arguments(rest, *options, "--transition", "flush 2")) == 0
    assert torch.equal(latents(rest), latents(whole))
    again = ["--extend", str(rest.with_suffix(".latents.safetensors"))]
    for prompt in (["--prompt", "a ring"], []):
        placed = prepare(parse(arguments(tmp_path / "a.mp4", *prompt, *again, frames=57))).timeline
        assert placed.timeline.scenes == (*old, Scene(9, "a ring", Flush(2)))
    assert scenes(tmp_path / "b.mp4", "--prompt", "a box", *extend) == old


def test_the_same_prompt_is_no_switch(tmp_path) -> None:
    whole, start, rest = (tmp_path / f"{name}.mp4" for name in ("whole", "start", "rest"))
    prompt = ["--prompt", "a star"]
    assert main(arguments(whole, *prompt, frames=33)) == 0
    assert main(arguments(start, *prompt, frames=21)) == 0
    extend = ["--extend", str(start.with_suffix(".latents.safetensors"))]
    assert main(arguments(rest, *prompt, *extend, frames=33)) == 0
    assert torch.equal(latents(rest), latents(whole))
    assert "timeline" not in read_metadata(rest)


def test_prompts_are_encoded_in_one_load(monkeypatch, tmp_path) -> None:
    loads = []

    class Encoder:
        text_dim = 64

        def encode(self, prompts):
            loads.append(prompts)
            return torch.stack([torch.full((8, 64), float(len(prompt))) for prompt in prompts])

        def release(self):
            pass

    monkeypatch.setattr(generation, "load_text_encoder", lambda *args, **options: Encoder())
    text = "0s a star\n1s a box!!\n2s a star"
    job = prepare(parse(arguments(tmp_path / "a.mp4", "--timeline", text)))
    Encoder.text_dim = job.config.text_dim
    encoding = parse([*arguments(tmp_path / "a.mp4", "--timeline", text), "--text-encoder", "x"])
    object.__setattr__(job, "options", encoding)
    contexts = generation.make_context(job)
    assert loads == [["a star", "a box!!"]]
    assert [float(scene.prompt.mean()) for scene in contexts.scenes] == [6, 7, 6]


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        (["--timeline", "a\n1s b", "--prompt", "a"], "--prompt"),
        (["--timeline", "a\n1s b", "--context", "c.safetensors"], "--context"),
        (["--timeline", "a\n9s b"], "45 frames"),
        (["--timeline", "a\n1s # b"], "relative"),
        (["--timeline", "a\n1s b", "--method", "hiar"], "hiar"),
        (["--timeline", "a\n1s b", "--transition", "fade"], "fade"),
        (["--timeline", "a\n1s"], "line 2"),
    ],
)
def test_a_timeline_that_cannot_run_is_refused(extra, word, tmp_path) -> None:
    with pytest.raises(ValueError, match=word):
        prepare(parse(arguments(tmp_path / "a.mp4", *extra)))


@pytest.mark.parametrize("text", ["", "  ", "missing.txt"])
def test_a_timeline_is_a_file_or_a_text(text, tmp_path) -> None:
    def read(given: str) -> str:
        return parse(arguments(tmp_path / "a.mp4", "--timeline", given)).timeline

    with pytest.raises(ValueError, match="--timeline"):
        read(text)
    assert read("a star " * 60) == "a star " * 60  # longer than a file's name may be
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"start": 0, "prompt": "a"}]))
    assert read(str(file)) == file.read_text()
    file.write_bytes(b"a" * (2 << 20))
    with pytest.raises(ValueError, match="the most"):
        read(str(file))


def test_every_prompt_of_a_timeline_is_checked(tmp_path) -> None:
    sprites = ["--model", "sprites", "--size", "64x64", "--dry-run"]
    text = "a red star rests\n1s a fox rests\n2s a cat rests"
    lines = notes(prepare(parse(arguments(tmp_path / "a.mp4", *sprites, "--timeline", text))))
    assert [line for line in lines if "fox" in line] and [line for line in lines if "cat" in line]
    unused = arguments(tmp_path / "a.mp4", "--prompt", "a", "--transition", "keep")
    assert any("--transition" in line for line in notes(prepare(parse(unused))))


def test_a_recache_that_may_change_nothing_is_said(tmp_path) -> None:
    def recaches(text: str, *more: str) -> bool:
        command = arguments(tmp_path / "a.mp4", "--timeline", text, "--dry-run", *more)
        return any("recache" in line for line in notes(prepare(parse(command))))

    assert recaches("a\n1s b")
    assert not recaches("a\n1s flush 1: b")
    assert not recaches("a\n1s b", "--preset", "longlive")
