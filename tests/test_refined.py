"""Refiners on the command line: results, messages and refusals."""

import pytest
import torch

from autorefiner.refiner.cli import main
from autorefiner.refiner.latents import read_latents
from autorefiner.refiner.noise.file import RefinerCard, fingerprint, save_refiner
from autorefiner.refiner.noise.refiner import target_modules
from autorefiner.refiner.refiner_plan import RefinerPlan
from autorefiner.refiner.video import read_metadata
from autorefiner.refiner.wan.lora import LoraPair
from autorefiner.refiner.wan.transformer import WAN_TINY, WanTransformer

from tiny import TINY

STEPS = (1000, 750, 500, 250)


def save(path, config=WAN_TINY, base: str = "", **card):
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        targets = target_modules(WanTransformer(config))
    pairs = {
        name: LoraPair(
            *(0.1 * torch.randn(*shape, generator=generator) for shape in ((2, into), (out, 2))),
            1.0,
        )
        for name, (out, into) in ((name, module.weight.shape) for name, module in targets.items())
    }
    save_refiner(path, pairs, RefinerCard(rank=2, base=base, **card))
    return path


@pytest.fixture
def refiner(tmp_path):
    return save(tmp_path / "a.refiner.safetensors")


def made(folder, *more: str) -> torch.Tensor:
    out = folder / "x.mp4"
    fixed = [
        "--model",
        "random-tiny",
        "--frames",
        "13",
        "--size",
        "32x32",
        "--save-latents",
        "--overwrite",
    ]
    assert main(["generate", *fixed, "--out", str(out), *more]) == 0
    return read_latents(out.with_suffix(".latents.safetensors"))[0]


def test_a_refiner_changes_the_video_and_strength_zero_does_not(tmp_path, refiner, capsys) -> None:
    base = made(tmp_path)
    refined = made(tmp_path, "--refiner", str(refiner))
    assert "levels 750,500,250, pending, merged" in capsys.readouterr().err
    assert "a.refiner.safetensors, strength 1" in read_metadata(tmp_path / "x.mp4")["refiner"]
    assert not torch.equal(refined, base)
    branched = made(tmp_path, "--refiner", str(refiner), "--refiner-form", "branches")
    assert (branched - refined).abs().max() < 1e-3
    assert torch.equal(made(tmp_path, "--refiner", str(refiner), "--refiner-strength", "0"), base)
    assert not torch.equal(
        made(tmp_path, "--refiner", str(refiner), "--refined-levels", "250"), refined
    )


def test_levels_of_the_first_chunk_alone_are_refined_there(tmp_path, refiner) -> None:
    preset = ["--preset", "causal-forcing-1step"]  # 1000,750,500,250, then 1000
    base, refined = made(tmp_path, *preset), made(tmp_path, *preset, "--refiner", str(refiner))
    assert not torch.equal(refined[:, :, :1], base[:, :, :1])


def test_its_bytes_are_counted_and_another_base_is_told(tmp_path, refiner, capsys) -> None:
    plan = RefinerPlan.read(refiner, WAN_TINY, STEPS, torch.float32)
    factors = sum(pair.up.numel() + pair.down.numel() for pair in plan.pairs.values())
    assert plan.chosen(merge=False).nbytes == 4 * factors
    assert plan.chosen(merge=True).nbytes == 4 * sum(
        len(p.up) * p.down.shape[1] for p in plan.pairs.values()
    )
    assert (
        main(
            [
                "generate",
                "--model",
                "random-tiny",
                "--out",
                "x.mp4",
                "--refiner",
                str(refiner),
                "--dry-run",
            ]
        )
        == 0
    )
    assert "refiner  " in capsys.readouterr().out
    foreign = save(tmp_path / "b.refiner.safetensors", base="of another")
    made(tmp_path, "--refiner", str(foreign))
    assert "another base" in capsys.readouterr().err
    own = fingerprint(_random_tiny())
    made(tmp_path, "--refiner", str(save(tmp_path / "c.refiner.safetensors", base=own)))
    assert "another base" not in capsys.readouterr().err


def _random_tiny() -> WanTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanTransformer(WAN_TINY)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--refined-levels", "900"], "refined levels 900"),
        (["--refiner-strength", "1e9"], "-100 to 100"),
        (["--refined-levels", "x"], "give nominal levels"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, refiner, capsys, arguments, said) -> None:
    arguments = [
        "generate",
        "--model",
        "random-tiny",
        "--out",
        str(tmp_path / "x.mp4"),
        "--refiner",
        str(refiner),
        *arguments,
    ]
    try:
        assert main(arguments) == 2
    except SystemExit as error:
        assert error.code == 2
    assert said in capsys.readouterr().err


def test_a_refiner_of_another_network_is_refused(tmp_path, capsys) -> None:
    other = save(tmp_path / "o.refiner.safetensors", TINY)
    assert (
        main(
            [
                "generate",
                "--model",
                "random-tiny",
                "--out",
                str(tmp_path / "x.mp4"),
                "--refiner",
                str(other),
            ]
        )
        == 2
    )
    assert "another architecture" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.mp4"))
