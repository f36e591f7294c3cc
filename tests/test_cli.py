"""The command line on real files of a tiny model: videos, latents, metadata and bench."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autorefiner.refiner.bench import SIZES, bench, plan_bench
from autorefiner.refiner.cli import main
from autorefiner.refiner.commands.arguments import refiner_form
from autorefiner.refiner.latents import read_latents
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import get_preset
from autorefiner.refiner.video import read_frames, read_metadata
from autorefiner.refiner.wan import weight_file
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.checkpoint import load_transformer

from decoding import decoded
from tiny import TINY
from tiny_command import FRAMES, command


def test_generate_writes_a_video_that_says_how_it_was_made(files, tmp_path, capsys) -> None:
    out, sheet = tmp_path / "new" / "fox.mp4", tmp_path / "fox.png"
    assert main(command(files, out, "--seed", "7", "--sheet", str(sheet))) == 0
    assert decoded(out).shape == (FRAMES, 32, 48, 3)
    metadata = read_metadata(out)
    assert (metadata["prompt"], metadata["seed"], metadata["preset"], metadata["model"]) == (
        "a fox",
        "7",
        "self-forcing",
        "model.safetensors",
    )
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in out.parent.iterdir()] == ["fox.mp4"]
    assert f"{FRAMES} frames in" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "prompt    a fox" in printed
    assert f"made      {FRAMES} frames" in printed


@pytest.mark.parametrize("preset", ["causal-forcing-framewise", "self-forcing"])
def test_the_video_of_every_chunk_size_plays(files, tmp_path, preset) -> None:
    out = tmp_path / "fox.mp4"
    assert main(command(files, out, "--preset", preset, "--save-latents", "--frames", "17")) == 0
    assert decoded(out).shape == (17, 32, 48, 3)


def latents_of(files: Path, out: Path, *extra: str) -> torch.Tensor:
    assert main(command(files, out, "--save-latents", "--overwrite", "--frames", "9", *extra)) == 0
    return read_latents(out.with_suffix(".latents.safetensors"))[0]


def test_what_is_asked_for_reaches_the_sampler(files, tmp_path) -> None:
    """Seed, method, levels, LoRA and a short context's padding; the run equals the library's."""
    model, info = load_transformer(files / "model.safetensors")
    context = torch.zeros(1, TINY.text_len, TINY.text_dim)
    context[0, :5] = load_file(files / "context.safetensors")["context"]
    plan = RunPlan(get_preset("self-forcing"), 3, 4, 6)
    expected = torch.cat(list(sample(CausalWan(model, info.config), context, plan, seed=3)), 2)
    base = latents_of(files, tmp_path / "a.mp4", "--seed", "3")
    assert torch.equal(base, expected)
    for extra in (
        ["--seed", "4"],
        ["--method", "ode"],
        ["--levels", "1000,500"],
        ["--lora", str(files / "live.safetensors")],
    ):
        assert not torch.equal(
            latents_of(files, tmp_path / "b.mp4", "--seed", "3", *extra), base
        ), extra


def test_a_run_opens_each_of_its_files_once(tmp_path, monkeypatch) -> None:
    opened: list[str] = []

    def watched(path: Path, *arguments: object) -> object:
        opened.append(path.name)
        return open_file(path, *arguments)

    open_file = weight_file._open_file
    monkeypatch.setattr(weight_file, "_open_file", watched)
    command = [
        "generate",
        "--model",
        "sprites",
        "--refiner",
        "sprites",
        "--frames",
        "9",
        "--prompt",
        "a red star",
    ]
    assert main([*command, "--out", str(tmp_path / "star.mp4")]) == 0
    assert len(opened) == len({*opened}) == 4  # transformer, VAE, text encoder, refiner


def test_methods_and_policies_are_chosen_with_their_knobs(tmp_path, capsys) -> None:
    def latents(*more: str) -> torch.Tensor:
        out = tmp_path / "star.mp4"
        command = [
            "generate",
            "--model",
            "random-tiny",
            "--size",
            "32x32",
            "--frames",
            "57",
            "--prompt",
            "a red star",
        ]
        assert main([*command, "--save-latents", "--overwrite", "--out", str(out), *more]) == 0
        (found,) = load_file(out.with_suffix(".latents.safetensors")).values()
        return found

    plain = latents()
    assert torch.equal(latents("--memory", "top-frames:k=15"), plain)
    assert not torch.equal(latents("--memory", "top-frames:k=1,recent=1"), plain)
    assert ", top-frames:k=1,recent=1" in capsys.readouterr().err
    assert "top-frames:k=1" in read_metadata(tmp_path / "star.mp4")["memory"]
    assert torch.equal(latents("--method", "hiar", "--levels", "1000"), latents("--steps", "1000"))
    assert not torch.equal(latents("--method", "hiar"), plain)
    assert "method hiar" in capsys.readouterr().err
    capsys.readouterr()
    for wrong in (
        ("--memory", "top-frames:k=0"),
        ("--method", "hiar:k=1"),
        ("--memory", "nothing"),
    ):
        command = ["generate", "--model", "random-tiny", "--out", str(tmp_path / "a.mp4"), *wrong]
        assert main(command) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert not (tmp_path / "a.mp4").exists()


def test_inspect_knows_latents_finished_or_not(files, tmp_path, capsys) -> None:
    latents_of(files, tmp_path / "a.mp4")
    for name in ("a.latents.safetensors", "cut.latents.safetensors"):
        path = tmp_path / name
        if not path.exists():
            path.write_bytes((tmp_path / "a.latents.safetensors").read_bytes()[:-10])
        capsys.readouterr()
        assert main(["inspect", str(path)]) == 0
        printed = capsys.readouterr().out
        assert "kind      latents" in printed
        assert "prompt    a fox" in printed


def test_a_dry_run_says_what_it_would_take_and_makes_nothing(files, tmp_path, capsys) -> None:
    assert main(command(files, tmp_path / "fox.mp4", "--dry-run", "--size", "832x480")) == 0
    printed = capsys.readouterr()
    assert "K/V memory" in printed.out
    assert "33 frames of 832x480" in printed.err
    assert not list(tmp_path.iterdir())


def test_the_untrained_model_needs_no_file(tmp_path, capsys) -> None:
    out = tmp_path / "noise.mp4"
    assert (
        main(
            [
                "generate",
                "--model",
                "random-tiny",
                "--frames",
                "9",
                "--size",
                "32x32",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert "random weights" in capsys.readouterr().err
    assert len(read_frames(out)) == 9


def test_bench_counts_and_reports(tmp_path, capsys) -> None:
    report = bench("tiny", torch.device("cpu"), torch.float32, chunks=2)
    assert report.kv_bytes == 2 * 6 * (6 * 64) * 256 * 4
    projections, attention = 6 * (6 * 256**2 + 2 * 256 * 1024), 6 * 2 * 256 * (384 + 512)
    assert report.pass_gflop == pytest.approx(2 * 192 * (projections + attention) / 1e9)
    assert report.dit_fps == pytest.approx(12 / (report.chunk_ms / 1e3))
    assert report.peak_share == pytest.approx(
        report.pass_gflop / report.pass_ms * 1e3 / report.matmul_gflops, rel=1
    )
    path = tmp_path / "new" / "b.json"
    assert main(["bench", "--chunks", "2", "--store", "int8", "--json", str(path)]) == 0
    other = json.loads(path.read_text())
    assert other["size"] == "tiny" and other["kv_bytes"] < report.kv_bytes
    run = plan_bench(SIZES["tiny"], 7, None, "plain", "deep-sink:budget=12,sink=6")
    assert (run.preset.window, run.policy.budget, run.preset.positions) == (
        21, 12, "sink-adjacent",
    )  # fmt: skip
    assert main(["bench", "--chunks", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err


def test_several_loras_change_the_clip_each_by_its_strength(files, tmp_path, capsys) -> None:
    live, still = files / "live.safetensors", files / "lora.safetensors"
    base = latents_of(files, tmp_path / "a.mp4")
    both = latents_of(files, tmp_path / "b.mp4", "--lora", f"{still}", "--lora", f"{live}:0.5")
    assert read_metadata(tmp_path / "b.mp4")["lora"] == "lora.safetensors, live.safetensors:0.5"
    assert torch.equal(both, latents_of(files, tmp_path / "c.mp4", "--lora", f"{live}:0.5"))
    assert not torch.equal(both, base)
    assert not torch.equal(both, latents_of(files, tmp_path / "d.mp4", "--lora", str(live)))
    assert torch.equal(
        base, latents_of(files, tmp_path / "e.mp4", "--lora", f"{live}:0", "--lora", f"{still}:2")
    )
    with pytest.raises(SystemExit):
        main(command(files, tmp_path / "f.mp4", "--lora", f"{live}:200"))
    assert "live.safetensors" in capsys.readouterr().err.splitlines()[-1]


def test_an_unmerged_refiner_was_called_branches(capsys) -> None:
    assert {refiner_form("unmerged"), refiner_form("branches")} == {"unmerged"}
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    usage = capsys.readouterr().out
    assert "auto|merged|unmerged" in usage and "branches" not in usage
