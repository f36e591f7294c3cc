"""The pack in a real ComfyUI: pytest -m comfyui, with ComfyUI at COMFYUI_PATH, ~/ComfyUI or
~/comfy/ComfyUI.

Its interpreter is COMFYUI_PYTHON, or that of the checkout's .venv.
"""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from comfy_graphs import (
    API,
    NAMES,
    NEED_COMFYUI,
    NEED_PEFT,
    WORKFLOWS,
    node,
    of_kind,
    small,
    training,
)
from comfy_page import to_api, to_page
from comfy_runs import keeping, latents, sampled, short
from comfy_server import Refused, Server, find_comfyui
from demo_files import PREVIEW, STAND_IN, use_demo_files
from safetensors.torch import save_file

from autorefiner.nodes import workflow
from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.registry import NODES
from autorefiner.refiner.demo import bundle
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.samplers import SEARCHES
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.checkpoint import load_transformer

from decoding import decoded

pytestmark = [pytest.mark.comfyui, pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")]
NEAR = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def stand_ins(weights: Path, monkeypatch) -> None:
    """The standalone host has the same bundle as the server."""
    use_demo_files(weights, monkeypatch)


def alone(server: Server, graph: dict) -> torch.Tensor:
    """The same as `autorefiner run` makes it."""
    path = server.base / "graph.json"
    path.write_text(json.dumps(graph))
    with standalone.running_at(standalone.place_of(server.base, server.base / "alone", "cpu")):
        results = workflow.execute(workflow.read_workflow(path))
    return results[of_kind(graph, "AutoRefinerSampler")].args[0]["samples"]


def told(server: Server, graph: dict) -> str:
    """The messages of a prompt that is refused."""
    with pytest.raises(Refused) as refused:
        server.queue(graph)
    errors = refused.value.answer["node_errors"]
    return json.dumps([[key, error] for key, found in errors.items() for error in found["errors"]])


def test_the_pack_is_imported(server: Server) -> None:
    assert re.search(r"[\d.]+ seconds: \S*/custom_nodes/autorefiner", server.log())
    assert "IMPORT FAILED" not in server.log()
    assert {node.define_schema().node_id for node in NODES} <= set(server.get("/object_info"))


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_runs_and_samples_what_it_does_without_comfyui(
    name: str, server: Server, request
) -> None:
    if name in NEED_PEFT:
        request.getfixturevalue("peft_inside")
    graph = small(name)
    sampler = "SamplerCustomAdvanced" if name in NEED_COMFYUI else "AutoRefinerSampler"
    made = sampled(server, graph, name, of_kind(graph, sampler))
    frames = made.shape[2] * 4 - 3
    assert (
        len(decoded(sorted((server.base / "output" / "video").glob(f"{name}_0*.mp4"))[-1]))
        == frames
    )
    if name not in NEED_COMFYUI:
        torch.testing.assert_close(made, alone(server, graph), **NEAR)


def test_a_second_run_is_taken_from_the_cache(server: Server) -> None:
    graph = keeping(short(seed=11), "3", "cached")
    first = server.run(graph)
    graph["90"]["inputs"]["filename_prefix"] = "latents/again"
    second = server.run(graph)
    cached = next(
        data["nodes"] for event, data in second["status"]["messages"] if event == "execution_cached"
    )
    assert {"1", "2", "3"} <= set(cached) and first["outputs"]
    assert torch.equal(latents(server, "cached"), latents(server, "again"))


def memory_of(server: Server) -> int:
    """Resident bytes of the server's process."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("no /proc: the memory of a process is not told")
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) * 1024


def test_an_interrupted_run_gives_its_memory_back_and_the_next_one_is_good(server: Server) -> None:
    expected = sampled(server, short(seed=3), "before")
    memory = memory_of(server)
    long = short(length=401, width=512, height=512)
    prompt = server.queue(long)
    end = time.monotonic() + 60
    while (
        memory_of(server) < memory + 300e6 and time.monotonic() < end
    ):  # keys and values of 101 frames are 420 MB
        time.sleep(0.2)
    server.post("/interrupt", {})
    ended = server.wait(prompt)
    assert "execution_interrupted" in [event for event, _ in ended["status"]["messages"]]
    graph = short(seed=3)
    graph["2"]["inputs"]["text"] += " "  # not from the cache
    assert torch.equal(sampled(server, graph, "after"), expected)
    assert memory_of(server) < memory + 150e6


def test_previews_do_not_change_what_is_made(server: Server) -> None:
    plain = sampled(server, short(seed=5), "plain")
    graph = keeping(short(seed=5), "3", "previewed")
    graph["2"]["inputs"]["text"] += " "  # not from the cache
    ended = server.wait(server.queue(graph, preview_method="latent2rgb"))
    assert ended["status"]["status_str"] == "success", json.dumps(ended["status"])[:2000]
    assert torch.equal(latents(server, "previewed"), plain)


def test_two_queued_prompts_each_make_their_own(server: Server) -> None:
    graphs = [keeping(short(seed=seed), "3", f"seed{seed}") for seed in (21, 22)]
    prompts = [server.queue(graph) for graph in graphs]
    assert all(server.wait(prompt)["status"]["status_str"] == "success" for prompt in prompts)
    for seed in (21, 22):
        torch.testing.assert_close(
            latents(server, f"seed{seed}"), alone(server, short(seed=seed)), **NEAR
        )


def test_a_batch_begins_with_the_single_video(server: Server) -> None:
    one, two = (
        sampled(server, short(seed=4, batch_size=batch), f"batch{batch}") for batch in (1, 2)
    )
    torch.testing.assert_close(two[:1], one, **NEAR)
    assert len(two) == 2 and not torch.allclose(two[:1], two[1:])


def test_a_user_lora_works_on_the_base(server: Server, weights: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = {
        part: torch.randn(shape, generator=generator)
        for part, shape in (("A", (4, 128)), ("B", (128, 4)))
    }
    module = "diffusion_model.blocks.0.self_attn.v"
    path = server.base / "models" / "loras" / "own.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({f"{module}.lora_{part}.weight": 0.2 * tensor for part, tensor in pair.items()}, path)
    graph = short(seed=6)
    graph["80"] = node(
        "LoraLoaderModelOnly", model=["1", 0], lora_name="own.safetensors", strength_model=1.0
    )
    base = sampled(server, graph, "base")
    graph["3"]["inputs"]["model"] = ["80", 0]
    made = sampled(server, graph, "lora")

    model, info = load_transformer(
        weights / bundle.FILES["student"], lora=path, dtype=torch.float32
    )
    context = bundle.load_sprite_text(weights)([graph["2"]["inputs"]["text"]])
    chunks = sample(
        CausalWan(model, info.config), context, RunPlan(PRESETS["self-forcing"], 6, 8, 8), seed=6
    )
    torch.testing.assert_close(made, standalone.raw_latents(torch.cat(list(chunks), 2)), **NEAR)
    assert (made - base).abs().max() > 0.01
    graph["3"]["inputs"]["model"] = ["1", 0]
    graph["2"]["inputs"]["text"] += " "
    assert torch.equal(sampled(server, graph, "base_again"), base)


def custom(**inputs: object) -> dict:
    """The SamplerCustomAdvanced workflow, short, for the sampler to be changed."""
    graph = small("sampler_custom_advanced")
    graph["7"]["inputs"]["length"] = 29
    graph["8"]["inputs"] |= inputs
    return graph


def test_without_a_refiner_it_equals_comfyuis_own_sampler(server: Server) -> None:
    ours = sampled(server, custom(fresh_noise="as SamplerARVideo"), "ours", "9")
    graph = custom()
    graph["8"] = node("SamplerARVideo", num_frame_per_block=3)
    core = sampled(server, graph, "core", "9")
    assert ours.shape == core.shape == (1, 16, 8, 8, 8)
    assert (ours - core).abs().max() < 1e-4
    assert not torch.allclose(sampled(server, custom(), "fresh", "9"), core)


def with_reward(graph: dict, key: str, method: str) -> dict:
    """The graph, whose node searches by the bundled reward."""
    graph["40"] = node(
        "AutoRefinerLoadReward", kind="sprites", model="bundled", weight=1.0, frames=0, interval=0
    )
    search = {"reward": ["40", 0], "vae": ["1", 2], "prompt": "a red star", "candidates": 2}
    graph[key]["inputs"] |= {"method": method, **search}
    return graph


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_chooses_what_it_does_without_comfyui(method: str, server: Server) -> None:
    graph = with_reward(short(13, seed=9, batch_size=2), "3", method)
    made = sampled(server, graph, method)
    torch.testing.assert_close(made, alone(server, graph), **NEAR)
    assert not torch.allclose(made, sampled(server, short(13, seed=9, batch_size=2), "no_search"))


def test_the_custom_sampler_searches_and_a_training_goes_through_the_reward_behind_it(
    server: Server, peft_inside: None
) -> None:
    graph = with_reward(custom(), "8", "best-of-n")
    assert not torch.allclose(
        sampled(server, graph, "searched", "9"), sampled(server, custom(), "unsearched", "9")
    )
    learnt = training(
        run="searched",
        objective="reward",
        reward=["40", 0],
        teacher=None,
        steps=1,
        width=64,
        height=64,
    )
    server.run({"40": graph["40"], **learnt})  # the same REWARD, from the cache


def test_what_the_custom_sampler_calls_denoised_is_the_clip(server: Server) -> None:
    graph = custom()
    graph["91"] = node("SaveLatent", samples=["9", 1], filename_prefix="latents/denoised")
    torch.testing.assert_close(sampled(server, graph, "output", "9"), latents(server, "denoised"))


def test_narrow_weights_are_computed_with_as_comfyui_does(server: Server) -> None:
    graph = small("self_forcing")
    graph["6"]["inputs"]["length"] = 9
    wide = sampled(server, graph, "wide")
    graph["1"]["inputs"]["dtype"] = "bf16"  # as the file has them; a CPU computes in fp32 with them
    assert torch.equal(sampled(server, graph, "bf16"), wide)
    graph["1"]["inputs"]["dtype"] = "fp8_e4m3fn"
    narrow = sampled(server, graph, "fp8")
    assert narrow.isfinite().all() and not torch.equal(narrow, wide)
    assert torch.corrcoef(torch.stack((narrow.flatten(), wide.flatten())))[0, 1] > 0.98


def test_a_model_of_comfyuis_own_loader_is_sampled_as_self_forcing(
    server: Server, weights: Path
) -> None:
    path = server.base / "models" / "diffusion_models" / "stock.safetensors"
    path.write_bytes((weights / bundle.FILES["student"]).read_bytes())
    graph = short(seed=8)
    graph["80"] = node("UNETLoader", unet_name="stock.safetensors", weight_dtype="default")
    graph["3"]["inputs"]["model"] = ["80", 0]
    torch.testing.assert_close(
        sampled(server, graph, "stock"), alone(server, short(seed=8)), **NEAR
    )
    assert "self-forcing's preset is taken" in server.log()


@pytest.mark.parametrize("length", [1, 5, 9, 29])
def test_decoding_in_chunks_equals_comfyuis_decode(length: int, server: Server) -> None:
    graph = short(length)
    graph["70"] = node("VAEDecode", samples=["3", 0], vae=["1", 2])
    for name, source in (("chunks", "4"), ("whole", "70")):
        graph[f"9{source}"] = node(
            "SaveImage", images=[source, 0], filename_prefix=f"{name}{length}/frame"
        )
    server.run(graph)
    chunks, whole = (
        sorted((server.base / "output" / f"{name}{length}").iterdir())
        for name in ("chunks", "whole")
    )
    assert len(chunks) == len(whole) == length
    for ours, theirs in zip(chunks, whole, strict=True):
        assert abs(decoded(ours).astype(int) - decoded(theirs).astype(int)).max() <= 1


def test_reflective_cache_shows_its_bytes(server: Server) -> None:
    graph = short(9)
    graph["60"] = node("EmptyARVideoLatent", width=64, height=64, length=9, batch_size=1)
    cache = {"positions": "the model's", "history": "as trained", "previous_x0": "as trained"}
    graph["61"] = node(
        "AutoRefinerReflectiveCache", window=-1, sink=0, **cache, model=["1", 0], latent=["60", 0]
    )
    graph["3"]["inputs"] |= {"reflective_cache": ["61", 0], "latent": ["60", 0]}
    nbytes = 2 * STAND_IN.num_layers * 3 * 16 * STAND_IN.dim * 4
    assert server.run(graph)["outputs"]["61"]["text"] == [
        f"all frames: {nbytes / 1e6:,.1f} MB of keys and values"
    ]


def test_prompts_that_cannot_run_are_refused_with_what_to_do(server: Server) -> None:
    assert "17 and 21" in told(server, short(20))
    assert "16381" in told(server, short(99997))
    assert "value_not_in_list" in told(server, short(method="none"))
    assert "value_bigger_than_max" in told(server, short(width=99999))
    graph = small("self_forcing")
    graph["1"]["inputs"]["file"] = "../../secret.pt"
    assert "value_not_in_list" in told(server, graph)
    graph = short()
    graph["60"] = node(
        "AutoRefinerChunkSchedule", preset="the model's", levels="500, 1000", frames_per_chunk=0, first_levels="",
        refined_levels="",
    )  # fmt: skip
    graph["3"]["inputs"]["chunk_schedule"] = ["60", 0]
    assert "fall" in told(server, graph)


def test_widgets_may_be_links(server: Server) -> None:
    graph = short()
    graph["60"] = node("PrimitiveInt", value=9)
    graph["61"] = node("PrimitiveString", value="1000, 500")
    graph["62"] = node(
        "AutoRefinerChunkSchedule", preset="the model's", levels=["61", 0], frames_per_chunk=0, first_levels="",
        refined_levels="",
    )  # fmt: skip
    graph["3"]["inputs"] |= {"length": ["60", 0], "chunk_schedule": ["62", 0]}
    server.run(graph)
    graph["60"]["inputs"]["value"] = 99997
    assert "16381" in server.error(graph)["exception_message"]


def failing(change: str) -> tuple[dict, str, str]:
    """(graph, the node that fails, what its message says)."""
    graph = short(9)
    if change == "size":
        graph["3"]["inputs"]["width"] = 72
        return graph, "3", "both must be multiples of 16, the nearest is 64x64"
    if change == "latent":
        graph["60"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
        graph["3"]["inputs"]["latent"] = ["60", 0]
        return graph, "3", "latent has latents of shape (1, 4, 8, 8), expected [batch, 16, frames"
    if change == "outside":
        graph["60"] = node(
            "AutoRefinerDecodeToVideo",
            samples=["3", 0],
            vae=["1", 2],
            fps=16,
            filename_prefix="../../x",
        )
        return graph, "60", "leaves"
    if change == "two":
        graph["60"] = node("ConditioningCombine", conditioning_1=["2", 0], conditioning_2=["2", 0])
        graph["3"]["inputs"]["positive"] = ["60", 0]
        return graph, "3", "positive has 2 entries: the models take one prompt"
    if change == "range":
        graph["60"] = node(
            "ConditioningSetTimestepRange", conditioning=["2", 0], start=0.5, end=1.0
        )
        graph["3"]["inputs"]["positive"] = ["60", 0]
        return (
            graph,
            "3",
            "positive has timestep_start and timestep_end: a prompt holds for all of a clip",
        )
    graph = custom()
    if change == "cfg":
        graph["5"] = node(
            "CFGGuider", model=["3", 0], positive=["2", 0], negative=["2", 0], cfg=3.0
        )
        return graph, "9", "the guider has cfg 3: AR models are distilled"
    if change == "guider":
        cfg = {"cfg_conds": 1.0, "cfg_cond2_negative": 1.0, "style": "regular"}
        graph["5"] = node(
            "DualCFGGuider",
            model=["3", 0],
            cond1=["2", 0],
            cond2=["2", 0],
            negative=["2", 0],
            **cfg,
        )
        return graph, "9", "the guider is a Guider_DualCFG, which mixes predictions"
    if change == "sigmas":
        graph["4"]["inputs"]["denoise"] = 0.5
        return graph, "9", "SIGMAS"
    graph["60"] = node(
        "AutoRefinerChunkSchedule",
        preset="causvid",
        levels="",
        frames_per_chunk=0,
        first_levels="",
        refined_levels="",
    )
    graph["8"]["inputs"]["chunk_schedule"] = ["60", 0]
    return graph, "9", "CHUNK_SCHEDULE says sigmas 1.0000, 0.7568"


@pytest.mark.parametrize(
    "change", ["size", "latent", "outside", "two", "range", "cfg", "guider", "sigmas", "schedule"]
)
def test_what_fails_while_it_runs_says_what_to_do(change: str, server: Server) -> None:
    graph, key, message = failing(change)
    error = server.error(graph)
    assert error["node_id"] == key
    assert message in error["exception_message"]
    assert not (server.base.parent / "x_00001_.mp4").exists()


def test_a_pickle_that_would_run_code_is_refused(server: Server) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (server.base / "owned",))

    torch.save(
        {"generator": Evil()}, server.base / "models" / "diffusion_models" / "self_forcing_evil.pt"
    )
    graph = small("self_forcing")
    graph["1"]["inputs"]["file"] = "self_forcing_evil.pt"
    assert "code" in server.error(graph)["exception_message"]
    assert not (server.base / "owned").exists()


def test_help_and_locales_are_served(server: Server) -> None:
    for kind in (found.define_schema().node_id for found in NODES):
        for page in (f"{kind}.md", f"{kind}/zh.md"):
            address = f"http://127.0.0.1:{server.port}/extensions/autorefiner/docs/{page}"
            with urllib.request.urlopen(address, timeout=10) as answer:
                assert answer.read().startswith(b"# ")
    names = server.get("/i18n")
    assert all(set(names[locale]["nodeDefs"]) >= {"AutoRefinerSampler"} for locale in ("en", "zh"))


@pytest.mark.parametrize("name", NAMES)
def test_the_workflow_of_the_page_is_that_of_the_queue(name: str, server: Server) -> None:
    page = json.loads((WORKFLOWS / f"{name}.json").read_text())
    info = server.get("/object_info")
    graph = to_api(page, info)
    given = json.loads((API / f"{name}.json").read_text())
    assert {
        key: found | {"inputs": {**graph[key]["inputs"], **found["inputs"]}}
        for key, found in given.items()
    } == graph
    assert page == to_page(given, info), "write it again: python tests/comfy_page.py URL"
    assert {found["type"] for found in page["nodes"]} <= set(info)


def test_the_host_has_every_function_of_the_protocol(inside: dict) -> None:
    assert inside["host"] == {}


def test_the_memory_that_is_asked_for_holds_a_chunk_and_the_keys_and_values(inside: dict) -> None:
    more = inside["asked"] - inside["chunk"]
    assert inside["kv"] == 2 * STAND_IN.num_layers * 21 * 64 * STAND_IN.dim * 4
    assert inside["kv"] <= more <= inside["kv"] + inside["frame"]


def test_a_model_that_computes_in_bf16_stays_near(inside: dict) -> None:
    assert inside["differs"] and inside["narrow"] > 0.98


def test_comfyui_can_load_an_untouched_copy(inside: dict) -> None:
    assert inside["copied"] and inside["preset"] == "self-forcing"


def test_a_chunk_that_was_made_in_fewer_passes_is_told_as_finished(inside: dict) -> None:
    assert inside["told"][-1] == [
        4,
        4,
        3,
    ]  # of one pass, and one with two repeats that were not needed: 3 pictures


def test_others_make_way_for_a_rewards_models(inside: dict) -> None:
    assert inside["freed"] == [[1000 + inside["least"], "cuda"]]


def test_the_demos_previews_are_in_the_colours_of_its_own_vae(inside: dict) -> None:
    own, published = inside["previews"]
    assert own == PREVIEW and published != PREVIEW and len(published) == len(PREVIEW)


def test_comfyuis_own_loader_knows_both_networks_of_the_bundle(inside: dict) -> None:
    assert inside["kinds"] == ["WAN21_CausalAR", "WAN21"]
