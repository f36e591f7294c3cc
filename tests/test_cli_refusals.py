"""Wrong input on the command line: one line that says what to do, and no file is touched."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from autorefiner.refiner import cli
from autorefiner.refiner.cli import main

from tiny_command import command


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
    errors = capsys.readouterr().err
    assert said in errors if said else "nothing" not in errors


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
    except SystemExit as end:  # argparse exits by itself
        assert end.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("autorefiner: error: ")
    assert message in lines[-1]
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
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "out of memory" in lines[0] and said in lines[0]
