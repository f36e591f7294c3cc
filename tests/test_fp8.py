"""Videos sampled with products in fp8: memory, notes, metadata and pixels."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autorefiner.refiner import job as job_module
from autorefiner.refiner.cli import main
from autorefiner.refiner.estimate import Estimate, weight_bytes
from autorefiner.refiner.generate import load_network, ready
from autorefiner.refiner.job import Job, notes, prepare
from autorefiner.refiner.latents import read_latents
from autorefiner.refiner.noise.file import RefinerCard, save_refiner
from autorefiner.refiner.outputs import differences
from autorefiner.refiner.video import read_metadata
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.fp8_linear import Fp8Linear, check_fp8
from autorefiner.refiner.wan.transformer import WAN_1_3B

from tiny import tiny_network
from tiny_command import command, parse
from tiny_refiner import pairs_for

SPRITES = ["generate", "--model", "sprites", "--prompt", "a red star circles on a navy ground"]
FORMS = ["merged", "unmerged"]


@pytest.fixture(scope="module")
def refiner(files) -> str:
    path = files / "a.refiner.safetensors"
    save_refiner(path, pairs_for(tiny_network()), RefinerCard(rank=4))
    return str(path)


def planned(files: Path, *extra: str) -> Job:
    return prepare(parse(command(files, files / "a.mp4", *extra)))


def held_bytes(*networks: CausalWan) -> int:
    parameters = {id(each): each for one in networks for each in one.model.parameters()}
    storages = {each.untyped_storage().data_ptr(): each for each in parameters.values()}
    return sum(each.nbytes for each in storages.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_estimate_counts_what_is_allocated(files, refiner, dtype) -> None:
    for extra in ((), ("--fp8",)):
        job = planned(files, "--dtype", dtype, *extra)
        with ready(job, load_network(job)) as (network, _):
            assert job.estimate.weights == held_bytes(network)
        job = planned(files, "--dtype", dtype, "--refiner", refiner, *extra)
        with ready(job, load_network(job)) as (network, active):
            parts, silent = job.estimate, active.network.model.head.head.bias
            assert parts.weights + parts.refiner + silent.nbytes == held_bytes(
                network, active.network
            )


def test_blocks_of_1_3b_take_half() -> None:
    """Of a block, 6 of 8 square layers of 1536 and two of 1536 x 8960 are converted."""
    plain, fp8 = (weight_bytes(WAN_1_3B, torch.bfloat16, fp8) for fp8 in (False, True))
    numbers = 30 * (6 * 1536**2 + 2 * 1536 * 8960)
    scales = 30 * (6 * 1536 + 8960 + 1536)
    assert plain - fp8 == numbers - 4 * scales


def test_unconverted_weights_count_until_they_are_freed(files) -> None:
    parts, plain = planned(files, "--fp8").estimate, planned(files).estimate
    assert parts.unconverted == plain.weights > parts.weights
    assert parts.activations > plain.activations
    loading = Estimate(weights=5, kv=1, text_kv=0, activations=3, decode=0, unconverted=9)
    assert loading.total == 14


@pytest.mark.parametrize("form", [None, *FORMS])
def test_unconverted_weights_are_freed(files, refiner, form) -> None:
    options = ["--refiner", refiner, "--refiner-form", form] if form else []
    job = planned(files, "--fp8", *options)
    network = load_network(job)
    weights = [
        weakref.ref(layer.weight)
        for layer in (network.model.blocks[0].ffn[0], network.model.head.head)
    ]
    with ready(job, network) as (network, active):
        assert [weight() is None for weight in weights] == [True, False]
        networks = [network, *([active.network] if active else [])]
        assert all(isinstance(each.model.blocks[1].self_attn.q, Fp8Linear) for each in networks)


def latents(files: Path, out: Path, *extra: str) -> Tensor:
    assert main(command(files, out, "--save-latents", "--overwrite", *extra)) == 0
    return read_latents(out.with_suffix(".latents.safetensors"))[0]


def test_a_refiner_is_the_same_merged_and_unmerged(files, tmp_path, refiner) -> None:
    """The branches of an unmerged one are not in fp8, so the two differ, but by little."""
    out, clips = tmp_path / "a.mp4", {}
    base = latents(files, out, "--fp8")
    for form in FORMS:
        options = ("--refiner", refiner, "--refiner-form", form)
        clips[form] = latents(files, out, "--fp8", *options)
        plain = latents(files, out, *options)
        assert 0 < (clips[form] - plain).norm() < 0.2 * (plain - base).norm()
    assert 0 < (clips["merged"] - clips["unmerged"]).norm() < 0.2 * (clips["merged"] - base).norm()


def test_metadata_say_so_and_extending_without_it_is_noted(files, monkeypatch) -> None:
    plain, fp8 = planned(files), planned(files, "--fp8")
    assert fp8.metadata == plain.metadata | {"products": "fp8"}
    assert "products fp8 (now plain)" in differences(fp8.metadata, plain.metadata, 0)
    assert any("--fp8" in note for note in notes(fp8))
    assert not any("fp8" in note for note in notes(plain))
    monkeypatch.setattr(job_module, "multiplies_fp8", lambda device: True)
    assert not any("fp8" in note for note in notes(fp8))


def test_a_device_without_fp8_numbers_is_refused() -> None:
    check_fp8(torch.device("cpu"))
    with pytest.raises(ValueError, match="mps"):
        check_fp8(torch.device("mps"))


def test_the_sprites_in_fp8(tmp_path, capsys) -> None:
    out = tmp_path / "star.mp4"
    options = ["--frames", "13", "--device", "cpu", "--refiner", "sprites", "--out", str(out)]
    assert main([*SPRITES, *options, "--fp8", "--save-latents"]) == 0
    assert read_metadata(out)["products"] == "fp8"
    assert "slower" in capsys.readouterr().err
    given = str(out.with_suffix(".latents.safetensors"))
    longer = ["--frames", "25", "--extend", given, "--overwrite"]
    assert main([*SPRITES, *options, *longer, "--dry-run"]) == 0
    assert "products fp8" in capsys.readouterr().err
