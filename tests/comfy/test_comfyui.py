"""The pack in a real ComfyUI: `pytest -m comfyui`.

ComfyUI is looked for at COMFYUI_PATH, ~/ComfyUI and ~/comfy/ComfyUI; its interpreter is
COMFYUI_PYTHON, or that of the checkout's .venv.
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
)
from comfy_page import to_api, to_page
from comfy_runs import NEAR, alone, keeping, latents, sampled, short
from comfy_server import Server, find_comfyui
from demo_files import STAND_IN
from safetensors.torch import save_file

from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.registry import NODES
from autorefiner.refiner.demo import bundle
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.checkpoint import load_transformer

from decoding import decoded

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI"),
    pytest.mark.usefixtures("stand_ins"),
]


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
    """Return the resident bytes of the server's process."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("no /proc: the memory of a process cannot be read")
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) * 1024


def test_an_interrupted_run_gives_its_memory_back_and_the_next_one_is_good(server: Server) -> None:
    expected = sampled(server, short(seed=3), "before")
    memory = memory_of(server)
    long = short(length=401, width=512, height=512)
    del long["3"]["inputs"]["vae"]  # of decoding, PyTorch holds buffers
    prompt = server.queue(long)
    end = time.monotonic() + 60
    # K/V of 101 frames take 420 MB.
    while memory_of(server) < memory + 300e6 and time.monotonic() < end:
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


def test_narrow_weights_are_computed_with_as_comfyui_does(server: Server) -> None:
    graph = small("self_forcing")
    graph["6"]["inputs"]["length"] = 9
    wide = sampled(server, graph, "wide")
    graph["1"]["inputs"]["dtype"] = "bf16"  # the file's dtype; a CPU computes in fp32
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


def test_notices_stay_on_the_node_and_in_the_history(server: Server) -> None:
    graph = short(1, width=128, height=128)
    (text,) = server.run(graph)["outputs"]["3"]["text"]
    assert text.count("made for 64x64") == 1 and "1 latent frames in 1 chunks" in text
    graph["3"]["inputs"] |= {"width": 64, "height": 64}
    (text,) = server.run(graph)["outputs"]["3"]["text"]
    assert "made for" not in text


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


def test_help_and_locales_are_served(server: Server) -> None:
    for kind in (found.define_schema().node_id for found in NODES):
        for page in (f"{kind}.md", f"{kind}/zh.md"):
            address = f"http://127.0.0.1:{server.port}/extensions/autorefiner/docs/{page}"
            with urllib.request.urlopen(address, timeout=120) as answer:
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
    drawn, plain = (each["nodes"] for each in (page, to_page(given, info)))
    for expected in plain:
        (same,) = (each for each in drawn if each["id"] == expected["id"])
        for entry in ("type", "inputs", "outputs", "widgets_values"):
            assert same[entry] == expected[entry], "draw it again: make workflows"
