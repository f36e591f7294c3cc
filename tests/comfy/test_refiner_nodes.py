"""Refiners in workflows without ComfyUI: sampling, saving, and refused combinations."""

import dataclasses
import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from comfy_graphs import node, small
from demo_files import STAND_IN, random_pairs, write_refiner
from safetensors.torch import load_file, save_file
from standalone_runs import execute, refusal

from autorefiner.nodes import workflow
from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.refiner import new_file
from autorefiner.refiner.demo import bundle
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.noise.file import RefinerCard, load_refiner
from autorefiner.refiner.noise.refiner import Refiner, merged
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import PRESETS


def refined(
    file: str = "sprites", length: int = 21, form: str = "auto", strength: float = 1.0, **inputs
) -> dict:
    """Return a short text-to-video graph with a refiner; `inputs` go to the sampler."""
    graph = small("text_to_video")
    graph["50"] = node(
        "AutoRefinerLoadRefiner", model=["1", 0], file=file, strength=strength, form=form
    )
    graph["3"]["inputs"] |= {"length": length, "refiner": ["50", 0], **inputs}
    return graph


def with_cache(graph: dict, history: str = "as trained", previous_x0: str = "as trained") -> dict:
    modes = {"positions": "the model's", "history": history, "previous_x0": previous_x0}
    graph["51"] = node("AutoRefinerReflectiveCache", window=-1, sink=0, **modes)
    graph["3"]["inputs"]["reflective_cache"] = ["51", 0]
    return graph


def with_levels(graph: dict, refined_levels: str, levels: str = "") -> dict:
    graph["52"] = node(
        "AutoRefinerChunkSchedule", preset="the model's", levels=levels, frames_per_chunk=0,
        first_levels="", refined_levels=refined_levels,
    )  # fmt: skip
    graph["3"]["inputs"]["chunk_schedule"] = ["52", 0]
    return graph


def made(graph: dict, base: Path) -> torch.Tensor:
    return execute(graph, base)["3"][0]["samples"]


def core(
    cache: ReflectiveCache | None = None, levels: tuple[int, ...] = (750, 500, 250), **options
) -> torch.Tensor:
    """Sample the same clip with the core library alone."""
    network = bundle.load_sprite_network("student", bundle.WEIGHTS)
    context = bundle.load_sprite_text(bundle.WEIGHTS)(
        [small("text_to_video")["2"]["inputs"]["text"]]
    )
    pairs, card = load_refiner(bundle.WEIGHTS / bundle.REFINERS["sprites"])
    refiner = Refiner(merged(network, pairs), cache or card.cache, frozenset(levels), **options)
    chunks = sample(network, context, RunPlan(PRESETS["self-forcing"], 6, 8, 8), refiner=refiner)
    return standalone.raw_latents(torch.cat(list(chunks), 2))


def test_a_refiner_makes_what_the_core_makes_with_it_and_the_model_stays_as_it_is(
    base: Path,
) -> None:
    graph = refined()
    graph["60"] = graph["3"] | {"inputs": {**graph["3"]["inputs"]}}  # on the same MODEL, after it
    del graph["60"]["inputs"]["refiner"]
    graph["61"] = node("VAEDecode", samples=["60", 0], vae=["1", 2])
    graph["62"] = node("SaveImage", images=["61", 0], filename_prefix="x")
    results = execute(graph, base)
    assert torch.equal(results["3"][0]["samples"], core())
    plain = small("text_to_video")
    plain["3"]["inputs"]["length"] = 21
    assert torch.equal(results["60"][0]["samples"], made(plain, base))
    assert (results["3"][0]["samples"] - results["60"][0]["samples"]).abs().max() > 0.01


def test_both_forms_give_the_same_and_strength_scales(base: Path) -> None:
    merged_, unmerged = (made(refined(form=form), base) for form in ("merged", "unmerged"))
    assert (merged_ - unmerged).abs().max() < 1e-4
    half = made(refined(form="merged", strength=0.5), base)
    assert torch.equal(half, core(strength=0.5)) and not torch.equal(half, merged_)


def test_strength_zero_and_a_fresh_refiner_are_the_base_bit_for_bit(base: Path) -> None:
    graph = refined()
    del graph["3"]["inputs"]["refiner"]
    plain = made(graph, base)
    assert torch.equal(made(refined(strength=0.0), base), plain)
    write_refiner(base / "models" / "loras" / "fresh.refiner.safetensors", scale=0.0)
    for form in ("merged", "unmerged"):
        assert torch.equal(made(refined("fresh.refiner.safetensors", form=form), base), plain)


def test_the_cache_and_the_schedule_rule_where_they_say_something(base: Path) -> None:
    assert torch.equal(made(with_cache(refined(form="merged")), base), core())
    for history, previous in (("none", "joint"), ("shared", "joint"), ("shared", "none")):
        found = made(with_cache(refined(form="merged"), history, previous), base)
        assert torch.equal(found, core(ReflectiveCache(history, previous)))
    assert torch.equal(made(with_levels(refined(form="merged"), "500"), base), core(levels=(500,)))
    assert torch.equal(made(with_levels(refined(form="merged"), ""), base), core())


def test_what_it_takes_is_told_and_the_memory_chooses_the_form(
    base: Path, capsys, monkeypatch
) -> None:
    execute(refined(length=9), base)
    printed = capsys.readouterr().err
    assert "rank 2, levels 750, 500, 250, history shared, previous x0 pending" in printed
    assert (
        "sprites.refiner.safetensors, strength 1, levels 750,500,250, pending, merged, " in printed
    )
    assert (
        f"{2 * STAND_IN.num_layers * (3 + 3) * 16 * STAND_IN.dim * 4 / 1e6:,.1f} MB of keys"
        in printed
    )
    assert "another base" not in printed
    pairs = random_pairs()
    factors = sum(pair.up.numel() + pair.down.numel() for pair in pairs.values())
    monkeypatch.setattr(standalone, "available_bytes", lambda device: 900_000)
    execute(refined(length=9), base)
    assert f"pending, unmerged, {4 * factors / 1e6:,.1f} MB" in capsys.readouterr().err


def test_ode_has_nothing_to_refine_and_self_refine_has(base: Path, capsys) -> None:
    plain = refined(method="ode")
    del plain["3"]["inputs"]["refiner"]
    assert torch.equal(made(refined(method="ode"), base), made(plain, base))
    assert "nothing to refine" in capsys.readouterr().err
    plain["3"]["inputs"]["method"] = "self-refine"
    assert not torch.equal(made(refined(method="self-refine"), base), made(plain, base))


def test_a_refiner_of_another_base_is_told(base: Path, capsys) -> None:
    write_refiner(base / "models" / "loras" / "other.refiner.safetensors", base="of another")
    execute(refined("other.refiner.safetensors", 9), base)
    assert "other.refiner.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", ["size", "layers", "lora", "nan", "rank", "vae", "no card", "strength", "outside"]
)
def test_files_that_do_not_fit_are_refused_in_one_line(change: str, base: Path) -> None:
    path = base / "models" / "loras" / "x.refiner.safetensors"
    graph = refined("x.refiner.safetensors", 9)
    write_refiner(path)
    tensors = load_file(path)
    card = {"autorefiner": json.dumps(dataclasses.asdict(RefinerCard(rank=2)))}
    first = "autorefiner.blocks.0.cross_attn.k.lora_A.weight"
    expected = {
        "size": "blocks.0.ffn.0",
        "layers": "31 layers",
        "lora": "LoraLoaderModelOnly",
        "nan": "blocks.0.cross_attn.k",
        "rank": "ranks",
        "vae": "is a VAE",
        "no card": "how it was trained",
        "strength": "input strength: nan",
        "outside": "'../x.refiner.safetensors'",
    }[change]
    match change:
        case "size":
            write_refiner(path, dataclasses.replace(STAND_IN, ffn_dim=256))
        case "layers":
            write_refiner(path, dataclasses.replace(STAND_IN, num_layers=3))
        case "lora":
            save_file(
                {name.replace("autorefiner", "diffusion_model"): x for name, x in tensors.items()},
                path,
            )
        case "nan":
            save_file({**tensors, first: tensors[first] * float("nan")}, path, card)
        case "rank":
            save_file({**tensors, first: tensors[first][:1].clone()}, path, card)
        case "vae":
            path.write_bytes((bundle.WEIGHTS / bundle.FILES["vae"]).read_bytes())
        case "no card":
            save_file(tensors, path)
        case "strength":
            graph["50"]["inputs"]["strength"] = "nan"
        case "outside":
            graph["50"]["inputs"]["file"] = "../x.refiner.safetensors"
    assert expected in refusal(graph, base)


def test_levels_that_the_run_does_not_have_are_refused(base: Path) -> None:
    for graph, expected in (
        (with_levels(refined(), "900"), "refined levels 900"),
        (with_levels(refined(), "", "1000, 500"), "refined levels 250, 750"),
        (with_levels(refined(), "1000, 500"), "initial noise"),
    ):
        message = refusal(graph, base)
        assert "node 3 (Pathwise Refined Sampler)" in message and expected in message
    initial = with_cache(with_levels(refined(form="merged"), "1000, 500"), previous_x0="none")
    assert torch.equal(made(initial, base), core(ReflectiveCache("shared", "none"), (1000, 500)))


def test_a_refiner_of_another_model_is_refused_by_the_sampler(base: Path) -> None:
    graph = refined(length=9)
    pairs, card = load_refiner(bundle.WEIGHTS / bundle.REFINERS["sprites"])
    from autorefiner.nodes.refiner_plan import RefinerLora
    from autorefiner.nodes.sampler import PathwiseRefinedSampler

    del graph["3"]["inputs"]["refiner"]
    results = execute(graph, base)
    pairs.pop("head.head")
    options = {
        "width": 64,
        "height": 64,
        "length": 9,
        "batch_size": 1,
        "seed": 0,
        "method": "self-forcing",
    }
    refiner = RefinerLora("a.refiner.safetensors", pairs, card)
    with pytest.raises(ValueError, match=r"a\.refiner\.safetensors"):
        PathwiseRefinedSampler.execute(results["1"][0], results["2"][0], **options, refiner=refiner)


def test_a_saved_refiner_is_loaded_again_and_a_second_one_is_counted_on(base: Path) -> None:
    graph = refined(length=9)
    graph["55"] = node(
        "AutoRefinerSaveRefiner", refiner=["50", 0], name="mine/foxes", overwrite=False
    )
    loras = base / "models" / "loras"
    assert [execute(graph, base)["55"] for _ in range(2)] == [
        ("mine/foxes.refiner.safetensors",), ("mine/foxes_2.refiner.safetensors",)
    ]  # fmt: skip
    assert (loras / "mine" / "foxes.refiner.safetensors").read_bytes() == (
        loras / "mine" / "foxes_2.refiner.safetensors"
    ).read_bytes()
    first = made(refined("mine/foxes.refiner.safetensors"), base)
    assert torch.equal(first, core())
    graph["55"]["inputs"]["overwrite"] = True
    assert execute(graph, base)["55"] == ("mine/foxes.refiner.safetensors",)
    assert sorted(path.name for path in (loras / "mine").iterdir()) == [
        "foxes.refiner.safetensors", "foxes_2.refiner.safetensors"
    ]  # fmt: skip


OUTSIDE = ["", "..", "../x", "a/../../x", "/etc/x", "a//x", "C:x", "a\\x"]
ODD = [".hidden", "a/.x", "x\0", "x\n", "x.", "a./x", "n" * 300]


@pytest.mark.parametrize("name", [*OUTSIDE, *ODD])
def test_names_that_leave_the_folder_or_hide_are_refused(name: str, base: Path) -> None:
    graph = refined(length=9)
    graph["55"] = node("AutoRefinerSaveRefiner", refiner=["50", 0], name=name, overwrite=True)
    assert "foxes" in refusal(graph, base)
    assert len(list((base / "models" / "loras").rglob("*"))) == 1


def test_a_file_that_cannot_be_written_is_told(base: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autorefiner.nodes.refiner.save_refiner", full)
    graph = refined(length=9)
    graph["55"] = node("AutoRefinerSaveRefiner", refiner=["50", 0], name="x", overwrite=False)
    assert "x.refiner.safetensors" in refusal(graph, base)


def test_names_that_stay_are_taken() -> None:
    for name in ("foxes", "mine/foxes v1.2", "狐狸", "a.refiner.safetensors"):
        path = new_file(Path("loras"), name, overwrite=True)
        assert path.is_relative_to("loras") and path.name.count(".refiner.safetensors") == 1


def test_three_controls_stand_side_by_side(base: Path) -> None:
    graph = small("compare_controls")
    for found in graph.values():
        if found["class_type"] == "AutoRefinerSampler":
            found["inputs"]["length"] = 9
    results = execute(graph, base)
    clips = [results[key][0] for key in ("8", "9", "10")]
    assert torch.equal(results["14"][0], torch.cat(clips, dim=2))
    assert not any(torch.equal(one, other) for one, other in combinations(clips, 2))


def test_images_are_stitched_with_a_space_between_and_the_shorter_one_stands_still() -> None:
    stitch = workflow.CLASSES["ImageStitch"].execute
    short, long = torch.zeros(1, 4, 6, 3), torch.ones(2, 4, 6, 3)
    made = stitch(short, "left", True, 2, "red", long).args[0]
    assert made.shape == (2, 4, 14, 3)
    assert (
        torch.equal(made[1, 0, :, 1], torch.tensor([1.0] * 6 + [0.0] * 8))
        and made[1, 0, 6:8, 0].eq(1).all()
    )
    assert stitch(short, "down", True, 0, "white").args[0] is short
    assert stitch(short, "right", True, 0, "white", long[:, :, :5]).args[0].shape == (2, 4, 11, 3)
    with pytest.raises(ValueError, match=r"6x4 and 6x5 .* height"):
        stitch(short, "right", True, 0, "white", torch.zeros(1, 5, 6, 3))
    with pytest.raises(ValueError, match=r"6x4 and 5x4 .* width"):
        stitch(short, "up", True, 0, "white", torch.zeros(1, 4, 5, 3))
