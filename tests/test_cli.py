"""The command line on real files of a tiny model: what it makes, what a stop leaves, what it says
to wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autorefiner.refiner import cli
from autorefiner.refiner.bench import bench
from autorefiner.refiner.cli import main
from autorefiner.refiner.commands.arguments import refiner_form
from autorefiner.refiner.generate import generate
from autorefiner.refiner.job import notes, prepare
from autorefiner.refiner.latents import HEADER, read_latents
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import get_preset
from autorefiner.refiner.video import read_frames, read_metadata
from autorefiner.refiner.wan import weight_file
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.checkpoint import load_transformer

from decoding import decoded
from tiny import TINY
from tiny_command import FRAMES, command, parse, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


def test_generate_writes_a_video_that_says_how_it_was_made(files, tmp_path, capsys) -> None:
    out, sheet = tmp_path / "new" / "fox.mp4", tmp_path / "fox.png"
    assert main(command(files, out, "--seed", "7", "--sheet", str(sheet))) == 0
    assert decoded(out).shape == (FRAMES, 32, 48, 3)
    told = read_metadata(out)
    assert (told["prompt"], told["seed"], told["preset"], told["model"]) == (
        "a fox",
        "7",
        "self-forcing",
        "model.safetensors",
    )
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in out.parent.iterdir()] == ["fox.mp4"]
    assert f"{FRAMES} frames in" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    told = capsys.readouterr().out
    assert "prompt    a fox" in told
    assert f"made      {FRAMES} frames" in told


@pytest.mark.parametrize("preset", ["causal-forcing-framewise", "self-forcing"])
def test_the_video_of_every_chunk_size_plays(files, tmp_path, preset) -> None:
    out = tmp_path / "fox.mp4"
    assert main(command(files, out, "--preset", preset, "--save-latents", "--frames", "17")) == 0
    assert decoded(out).shape == (17, 32, 48, 3)


def latents_of(files: Path, out: Path, *extra: str) -> torch.Tensor:
    assert main(command(files, out, "--save-latents", "--overwrite", "--frames", "9", *extra)) == 0
    return read_latents(out.with_suffix(".latents.safetensors"))[0]


def test_what_is_asked_for_reaches_the_sampler(files, tmp_path) -> None:
    """Seed, method, levels, LoRA and the end of a short context; the run equals the library's."""
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
    assert torch.equal(latents("--policy", "top-frames:k=15"), plain)
    assert not torch.equal(latents("--policy", "top-frames:k=1,recent=1"), plain)
    assert "top-frames:k=1" in read_metadata(tmp_path / "star.mp4")["policy"]
    assert torch.equal(latents("--method", "hiar", "--levels", "1000"), latents("--steps", "1000"))
    assert not torch.equal(latents("--method", "hiar"), plain)
    capsys.readouterr()
    for wrong in (
        ("--policy", "top-frames:k=0"),
        ("--method", "hiar:k=1"),
        ("--policy", "nothing"),
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
        told = capsys.readouterr().out
        assert "kind      latents" in told
        assert "prompt    a fox" in told


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
    """The given latents stand in the new partial file before anything is made: a second stop loses
    nothing."""
    out = tmp_path / "fox.mp4"
    job = prepare(parse(command(files, out, "--save-latents")))
    iterator = generate(job)
    next(iterator), next(iterator)
    iterator.close()
    partial = tmp_path / "fox.latents.partial.safetensors"
    kept = read_latents(partial)[0]
    with pytest.raises(ValueError, match=r"--extend .*partial.safetensors"):
        prepare(parse(command(files, out, "--save-latents")))
    assert torch.equal(read_latents(partial)[0], kept)
    iterator = generate(
        prepare(parse(command(files, out, "--save-latents", "--extend", str(partial))))
    )
    next(iterator)
    assert torch.equal(read_latents(partial)[0], kept)
    assert list(iterator) == [21, FRAMES]
    assert torch.equal(read_latents(tmp_path / "fox.latents.safetensors")[0][:, :, :6], kept)


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
    ignored = (
        signal.SIGINT if sent is signal.SIGTERM else signal.SIGUSR1
    )  # as in a job in the background
    run = subprocess.Popen(
        [sys.executable, "-m", "autorefiner.refiner.cli", *args],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: (
            signal.signal(signal.SIGINT, signal.SIG_DFL),
            signal.signal(ignored, signal.SIG_IGN),
        ),
    )
    three_chunks = (
        HEADER + 9 * 16 * 4 * 6 * 4
    )  # of latents, which are written before the chunk's pixels
    while not (latents.exists() and latents.stat().st_size > three_chunks) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(sent)
    _, errors = run.communicate()
    assert run.returncode == code
    frames, kept = len(read_frames(partial)), read_latents(latents)[0]
    assert frames >= 21, "the third chunk's pixels come after its latents"
    assert kept.shape[2] in ((frames + 3) // 4, (frames + 3) // 4 + 3), (
        "a chunk may be cut off between the two files"
    )
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
    os.utime(earlier, (0, 0))

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("autorefiner.refiner.generate.load_network", stop)
    assert main(command(files, tmp_path / "fox.mp4")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: no chunk was finished"
    assert len(read_frames(earlier)) == 9


def test_a_stop_before_the_first_chunk_leaves_nothing(files, tmp_path, capsys, monkeypatch) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    for place in ("generate.load_network", "generate.sample", "job.open_checkpoint"):
        monkeypatch.setattr(f"autorefiner.refiner.{place}", stop)
        assert main(command(files, tmp_path / "fox.mp4", "--save-latents")) == 130
        assert capsys.readouterr().err.splitlines()[-1].startswith("stopped")
        assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_it_would_take_and_makes_nothing(files, tmp_path, capsys) -> None:
    assert main(command(files, tmp_path / "fox.mp4", "--dry-run", "--size", "832x480")) == 0
    told = capsys.readouterr()
    assert "K/V memory" in told.out
    assert "33 frames of 832x480" in told.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--method", "ode", "--refiner", "sprites"], "nothing to refine"),
        (["--method", "self-refine", "--preset", "causvid"], "levels 750,500"),
        (["--method", "self-refine"], None),
        (["--refiner-strength", "0.5"], "--refiner-strength does nothing"),
        (["--refined-levels", "750"], "--refined-levels does nothing"),
        (["--tokenizer", "t", "--context-cache", "c"], "--context-cache does nothing"),
        (["--refiner-strength", "0.5", "--refiner", "sprites"], None),
    ],
)
def test_a_method_that_changes_nothing_here_is_told(tmp_path, capsys, extra, said) -> None:
    command = [
        "generate",
        "--model",
        "sprites",
        "--dry-run",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "x.mp4"),
    ]
    assert main([*command, *extra]) == 0
    told = capsys.readouterr().err
    assert said in told if said else "nothing" not in told


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


WRONG = {
    "size text": (["--size", "abc"], "WIDTHxHEIGHT"),
    "levels text": (["--levels", "900,500"], "from 1000"),
    "preset": (["--preset", "nope"], "invalid choice: 'nope'"),
    "seed": (["--seed", "99999999999999999999"], "seed"),
    "device": (["--device", "foo"], "cuda:1"),
    "two prompts": (["--context", "{files}/two.safetensors"], "holds 2 prompts"),
    "sheet": (["--sheet", "{files}/sheet.txt"], ".png"),
    "prompt": (["--save-latents", "--prompt", "x" * 20000], "shorten the prompt"),
    "no such file": (["--model", "none.safetensors"], "none.safetensors"),
    "a LoRA as the model": (["--model", "{files}/lora.safetensors"], "lora"),
    "a VAE as the model": (["--model", "{files}/vae.safetensors"], "vae"),
    "a model as the VAE": (["--vae", "{files}/model.safetensors"], "VAE"),
    "another text encoder's context": (["--context", "{files}/vae.safetensors"], "prompt_embeds"),
    "frames": (["--frames", "80"], "77 and 81"),
    "size": (["--size", "50x32"], "48x32"),
    "levels": (["--levels", "1000,500,750"], "fall strictly"),
    "window": (["--window", "4", "--sink", "3"], "at least 6"),
    "memory": (["--size", "16384x16384", "--frames", "4001"], "GB are free"),
    "output": (["--out", "{files}/model.safetensors"], ".mp4"),
    "output folder": (["--out", "{files}/model.safetensors/fox.mp4"], "cannot be written"),
    "extend": (["--extend", "{files}/model.safetensors"], "latents file"),
    "extend size": (["--extend", "{files}/six.safetensors"], "64x64 pixels"),
    "extend length": (
        ["--extend", "{files}/six.safetensors", "--frames", "17", "--size", "64x64"],
        "at least 21",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_leaves_what_was_there(files, tmp_path, capsys, case) -> None:
    extra, message = WRONG[case]
    out = tmp_path / "fox.mp4"
    out.write_bytes(b"old")
    try:
        assert (
            main(command(files, out, "--overwrite", *(part.format(files=files) for part in extra)))
            == 2
        )
    except SystemExit as end:  # argparse's own way
        assert end.code == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("autorefiner: error: ")
    assert message in told[-1]
    assert out.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["fox.mp4"]


def test_a_pickle_that_runs_code_is_refused(files, tmp_path, capsys) -> None:
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"generator": Hostile()}, tmp_path / "model.pt")
    assert main(command(files, tmp_path / "fox.mp4", "--model", str(tmp_path / "model.pt"))) == 2
    assert "refused" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_model_that_does_not_say_its_preset_asks_for_one(files, tmp_path, capsys) -> None:
    save_file(load_file(files / "model.safetensors"), tmp_path / "model.safetensors")
    assert (
        main(command(files, tmp_path / "fox.mp4", "--model", str(tmp_path / "model.safetensors")))
        == 2
    )
    assert "pass --preset" in capsys.readouterr().err


def test_bench_counts_and_reports(tmp_path, capsys) -> None:
    report = bench("tiny", torch.device("cpu"), torch.float32, chunks=2)
    assert report.kv_bytes == 2 * 6 * (6 * 64) * 256 * 4
    projections, attention = 6 * (6 * 256**2 + 2 * 256 * 1024), 6 * 2 * 256 * (384 + 512)
    assert report.pass_gflop == pytest.approx(2 * 192 * (projections + attention) / 1e9)
    assert report.dit_fps == pytest.approx(12 / (report.chunk_ms / 1e3))
    assert report.peak_share == pytest.approx(
        report.pass_gflop / report.pass_ms * 1e3 / report.matmul_gflops, rel=1
    )
    assert main(["bench", "--chunks", "2", "--json", str(tmp_path / "new" / "b.json")]) == 0
    assert json.loads((tmp_path / "new" / "b.json").read_text())["size"] == "tiny"
    assert main(["bench", "--chunks", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [(["train", "x.toml"], "raise accumulation"), (["bench"], "smaller --size")],
)
def test_what_takes_less_memory_is_said_by_command(monkeypatch, capsys, command, said) -> None:
    def fails(args: object) -> int:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte.\nand more"
        )

    add, _ = cli.COMMANDS[command[0]]
    monkeypatch.setitem(cli.COMMANDS, command[0], (add, fails))
    assert main(command) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "out of memory" in told[0] and said in told[0]


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
