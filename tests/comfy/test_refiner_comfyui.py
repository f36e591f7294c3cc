"""Refiners in a real ComfyUI: latents equal those without it, and the base stays unchanged."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfy_graphs import node, of_kind, small
from comfy_runs import NEAR, custom
from comfy_server import RUN_SECONDS, Server, find_comfyui
from demo_files import STAND_IN, random_pairs, write_refiner
from safetensors.torch import load_file, save_file

from autorefiner.nodes import workflow
from autorefiner.nodes.hosts import standalone
from autorefiner.refiner.demo import bundle
from autorefiner.refiner.noise.file import load_refiner
from autorefiner.refiner.noise.refiner import Refiner, merged
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.checkpoint import load_transformer
from autorefiner.refiner.wan.vae import raw_latents

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI"),
    pytest.mark.usefixtures("stand_ins"),
]


def refined(
    file: str = "sprites", form: str = "merged", strength: float = 1.0, **inputs: object
) -> dict:
    """Return a short text-to-video graph with a refiner, then a second sampler without one."""
    graph = small("text_to_video")
    graph["50"] = node(
        "AutoRefinerLoadRefiner", model=["1", 0], file=file, strength=strength, form=form
    )
    graph["3"]["inputs"] |= {"length": 21, **inputs}
    graph["60"] = {**graph["3"], "inputs": {**graph["3"]["inputs"]}}
    graph["3"]["inputs"]["refiner"] = ["50", 0]
    return graph


def with_cache(graph: dict, previous_x0: str, history: str = "shared") -> dict:
    modes = {"positions": "the model's", "history": history, "previous_x0": previous_x0}
    graph["51"] = node("AutoRefinerReflectiveCache", window=-1, sink=0, **modes)
    graph["3"]["inputs"]["reflective_cache"] = ["51", 0]
    return graph


def sampled(server: Server, graph: dict, *keys: str) -> list[torch.Tensor]:
    """Run the given samplers in one prompt in ComfyUI; return their latents."""
    graph = {
        key: found
        for key, found in graph.items()
        if not found["class_type"].startswith(("Create", "Save"))
    }
    for key in keys:
        graph[f"9{key}"] = node("SaveLatent", samples=[key, 0], filename_prefix=f"refined/{key}")
    server.run(graph)
    paths = (
        sorted((server.base / "output" / "refined").glob(f"{key}_*.latent"))[-1] for key in keys
    )
    return [load_file(path)["latent_tensor"] for path in paths]


def alone(server: Server, graph: dict) -> torch.Tensor:
    """Return the refined latents as `autorefiner run` samples them."""
    path = server.base / "graph.json"
    path.write_text(json.dumps({key: found for key, found in graph.items() if key != "60"}))
    with standalone.running_at(standalone.place_of(server.base, server.base / "alone", "cpu")):
        return workflow.execute(workflow.read_workflow(path))["3"].args[0]["samples"]


@pytest.mark.parametrize("form", ["merged", "unmerged"])
@pytest.mark.parametrize("previous", ["pending", "joint", "none"])
def test_a_refiner_makes_the_same_as_without_comfyui_and_leaves_the_model_alone(
    previous, form, server: Server
) -> None:
    graph = with_cache(refined(form=form), previous)
    made, base = sampled(server, graph, "3", "60")
    torch.testing.assert_close(made, alone(server, graph), **NEAR)
    assert (made - base).abs().max() > 0.01
    del graph["3"], graph["4"]
    graph["2"]["inputs"]["text"] += " "  # not from the cache
    assert torch.equal(sampled(server, graph, "60")[0], base)


def test_a_fresh_refiner_and_strength_zero_are_the_base_bit_for_bit(server: Server) -> None:
    write_refiner(server.base / "models" / "loras" / "fresh.refiner.safetensors", scale=0.0)
    for form in ("merged", "unmerged"):
        made, base = sampled(server, refined("fresh.refiner.safetensors", form, seed=1), "3", "60")
        assert torch.equal(made, base)
    made, base = sampled(server, refined(strength=0.0, seed=1), "3", "60")
    assert torch.equal(made, base)


def test_a_refiner_works_upon_a_user_lora(server: Server, weights: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = {
        part: torch.randn(shape, generator=generator)
        for part, shape in (("A", (4, 128)), ("B", (128, 4)))
    }
    path = server.base / "models" / "loras" / "style.safetensors"
    module = "diffusion_model.blocks.0.self_attn.v"
    save_file({f"{module}.lora_{part}.weight": 0.2 * tensor for part, tensor in pair.items()}, path)
    model, info = load_transformer(
        weights / bundle.FILES["student"], lora=path, dtype=torch.float32
    )
    network = CausalWan(model, info.config)
    context = bundle.load_sprite_text(weights)([refined()["2"]["inputs"]["text"]])
    refiner = Refiner(merged(network, load_refiner(weights / bundle.REFINERS["sprites"])[0]))
    chunks = sample(
        network, context, RunPlan(PRESETS["self-forcing"], 6, 8, 8), seed=2, refiner=refiner
    )
    expected = raw_latents(torch.cat(list(chunks), 2))
    for form in ("merged", "unmerged"):
        graph = refined(form=form, seed=2)
        graph["80"] = node(
            "LoraLoaderModelOnly", model=["1", 0], lora_name="style.safetensors", strength_model=1.0
        )
        graph["3"]["inputs"]["model"] = ["80", 0]
        made, base = sampled(server, graph, "3", "60")
        torch.testing.assert_close(made, expected, **NEAR)
        del graph["3"], graph["4"]
        graph["2"]["inputs"]["text"] += " "
        assert torch.equal(sampled(server, graph, "60")[0], base)


def test_a_lora_that_is_bypassed_makes_a_merged_refiner_run_unmerged(server: Server) -> None:
    path = server.base / "models" / "loras" / "bypassed.safetensors"
    module = "diffusion_model.blocks.0.self_attn.v"
    save_file(
        {
            f"{module}.lora_A.weight": torch.ones(2, 128),
            f"{module}.lora_B.weight": torch.ones(128, 2),
        },
        path,
    )
    graph = refined(seed=3)
    graph["80"] = node(
        "LoraLoaderBypassModelOnly",
        model=["1", 0],
        lora_name="bypassed.safetensors",
        strength_model=0.1,
    )
    graph["3"]["inputs"]["model"] = ["80", 0]
    made, base = sampled(server, graph, "3", "60")
    assert not torch.equal(made, base)
    assert "injections" in server.log()


@pytest.mark.parametrize("form", ["merged", "unmerged"])
def test_the_sampler_of_samplercustomadvanced_takes_a_refiner(form: str, server: Server) -> None:
    graph = custom()
    graph["50"] = node(
        "AutoRefinerLoadRefiner", model=["1", 0], file="sprites", strength=1.0, form=form
    )
    sampler = of_kind(graph, "SamplerCustomAdvanced")
    (base,) = sampled(server, graph, sampler)
    graph["8"]["inputs"]["refiner"] = ["50", 0]
    (made,) = sampled(server, graph, sampler)
    assert made.isfinite().all() and (made - base).abs().max() > 0.01
    graph["50"]["inputs"]["strength"] = 0.0
    assert torch.equal(sampled(server, graph, sampler)[0], base)


def test_a_refiner_is_saved_and_loaded_again(server: Server, weights: Path) -> None:
    graph = refined(seed=4)
    graph["55"] = node(
        "AutoRefinerSaveRefiner", refiner=["50", 0], name="mine/saved", overwrite=True
    )
    (made,) = sampled(server, graph, "3")
    pairs, card = load_refiner(
        server.base / "models" / "loras" / "mine" / "saved.refiner.safetensors"
    )
    first, first_card = load_refiner(weights / bundle.REFINERS["sprites"])
    assert card == first_card and all(torch.equal(pairs[name].up, first[name].up) for name in first)
    assert torch.equal(
        sampled(server, refined("mine/saved.refiner.safetensors", seed=4), "3")[0], made
    )


def failing(change: str, server: Server) -> tuple[dict, str, str]:
    """Return (graph, id of the node that fails, part of its message)."""
    loras = server.base / "models" / "loras"
    path = loras / f"{change}.refiner.safetensors"
    graph = refined(path.name)
    write_refiner(path)
    tensors = load_file(path)
    match change:
        case "lora":
            save_file(
                {name.replace("autorefiner", "diffusion_model"): x for name, x in tensors.items()},
                path,
            )
            return (
                graph,
                "50",
                "is an ordinary LoRA and no refiner: connect it with LoraLoaderModelOnly",
            )
        case "broken":
            path.write_bytes(path.read_bytes()[:5000])
            return graph, "50", path.name
        case "levels":
            options = {"levels": "", "frames_per_chunk": 0, "first_levels": ""}
            graph["52"] = node(
                "AutoRefinerChunkSchedule",
                preset="the model's",
                refined_levels="900, 750",
                **options,
            )
            graph["3"]["inputs"]["chunk_schedule"] = ["52", 0]
            return graph, "3", "refined levels 900"
    assert change == "sizes"
    write_refiner(path, replace(STAND_IN, ffn_dim=256))
    return graph, "50", "it belongs to a network of another size: use a refiner of this MODEL"


@pytest.mark.parametrize("change", ["lora", "broken", "levels", "sizes"])
def test_what_does_not_fit_is_an_error_of_its_node(change: str, server: Server) -> None:
    graph, key, message = failing(change, server)
    error = server.error(graph)
    assert error["node_id"] == key and message in error["exception_message"]


def test_a_refiner_of_another_base_is_told_on_the_node(server: Server) -> None:
    write_refiner(server.base / "models" / "loras" / "other.refiner.safetensors", base="of another")
    shown = server.run(refined("other.refiner.safetensors", seed=5))["outputs"]["50"]["text"]
    assert "another base" in shown[0]
    assert "other.refiner.safetensors" in server.log()
    shown = server.run(refined(seed=6))["outputs"]["50"]["text"]
    assert shown == ["rank 2, levels 750, 500, 250, history shared, previous x0 pending"]


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn", "of ComfyUI's own loader"])
def test_a_refiner_knows_its_base_in_every_dtype(dtype: str, server: Server, weights: Path) -> None:
    graph = small("self_forcing")
    graph["1"]["inputs"]["dtype"] = dtype
    if "own" in dtype:
        path = server.base / "models" / "diffusion_models" / "own.safetensors"
        path.write_bytes((weights / bundle.FILES["student"]).read_bytes())
        graph["1"] = node("UNETLoader", unet_name=path.name, weight_dtype="default")
    graph["50"] = node(
        "AutoRefinerLoadRefiner", model=["1", 0], file="sprites", strength=1.0, form="merged"
    )
    graph["6"]["inputs"] |= {"length": 9, "refiner": ["50", 0]}
    assert "another base" not in server.run(graph)["outputs"]["50"]["text"][0]


def test_a_file_that_was_saved_anew_is_read_again(server: Server) -> None:
    path = server.base / "models" / "loras" / "anew.refiner.safetensors"
    made = []
    for scale in (0.1, 0.2, 0.2):
        write_refiner(path, scale=scale)
        made += sampled(server, refined(path.name, seed=7), "3")
    assert torch.equal(made[1], made[2]) and not torch.equal(made[0], made[1])


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a\\x"])
def test_names_that_leave_the_folder_are_refused(name: str, server: Server) -> None:
    graph = refined()
    graph["55"] = node("AutoRefinerSaveRefiner", refiner=["50", 0], name=name, overwrite=False)
    with pytest.raises(Exception, match="foxes"):
        server.queue({key: found for key, found in graph.items() if key in ("1", "50", "55")})
    graph = refined("../../" + name)
    with pytest.raises(Exception, match="value_not_in_list"):
        server.queue(graph)


@pytest.fixture(scope="module")
def inside(server: Server, weights: Path) -> dict:
    """Run inside_refiner.py with ComfyUI's interpreter; return the JSON that it prints."""
    comfyui, python = find_comfyui()
    pack = server.base / "custom_nodes" / "autorefiner"
    script = Path(__file__).with_name("inside_refiner.py")
    files = (weights / bundle.FILES["student"], weights / bundle.REFINERS["sprites"])
    command = [str(python), str(script), str(comfyui), str(pack), *map(str, files)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_the_memory_that_is_asked_for_holds_the_refiner_and_one_more_chunk(inside: dict) -> None:
    pairs = random_pairs()
    sizes = {
        "merged": 4 * sum(pair.up.shape[0] * pair.down.shape[1] for pair in pairs.values()),
        "unmerged": 4 * sum(pair.up.numel() + pair.down.numel() for pair in pairs.values()),
    }
    kv = 2 * STAND_IN.num_layers * (21 + 3) * 64 * STAND_IN.dim * 4
    for form, nbytes in sizes.items():
        more = inside["asked"][form] - inside["chunk"]
        assert kv + nbytes <= more <= kv + nbytes + inside["frame"]


def test_a_joint_cache_asks_for_a_pass_over_two_chunks(inside: dict) -> None:
    more = inside["asked"]["joint"] - inside["asked"]["merged"]
    assert abs(more - inside["chunk"]) <= inside["frame"]


def test_layers_of_another_kind_and_little_memory_make_it_run_unmerged(inside: dict) -> None:
    assert inside["auto"] == ["merged", "unmerged"]
    assert inside["odd"] == ["unmerged", "unmerged"] and inside["odd made"] == 0


def test_no_hook_stays_behind(inside: dict) -> None:
    assert inside["hooks"] == {
        "before": 0,
        "during": 10 * STAND_IN.num_layers + 1,
        "after": 0,
        "interrupted": 0,
    }


def test_weights_are_merged_as_the_layers_compute_with_them(inside: dict) -> None:
    """Covers layers that were not loaded, whose LoRA is applied on use, and narrow dtypes."""
    assert inside["patched"] > 0.01
    assert inside["offloaded"] < 1e-5
    assert inside["narrow"] > 0.9999 and inside["forms"] < 1e-4
