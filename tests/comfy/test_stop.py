"""Stop After This Chunk: a run ends early, and its result is not cached as the whole one."""

import json
import time
import urllib.error
import urllib.request

import pytest
import torch
from comfy_graphs import node, of_kind, small
from comfy_server import Refused, Server, find_comfyui
from safetensors.torch import load_file

pytestmark = [pytest.mark.comfyui, pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")]
LENGTH = 241  # pixel frames: 61 latent frames in 21 chunks, the last of one


def workflow(name: str, text: str) -> tuple[dict, str]:
    """Return (a graph long enough to be stopped that saves its latents, id of its display node)."""
    graph = small(name)
    alone = name == "text_to_video"
    shown = of_kind(graph, "AutoRefinerSampler" if alone else "AutoRefinerCustomSampler")
    sized = graph[shown] if alone else graph[of_kind(graph, "EmptyARVideoLatent")]
    sized["inputs"] |= {"length": LENGTH, "width": 128, "height": 128}
    graph[of_kind(graph, "CLIPTextEncode")]["inputs"]["text"] = text
    sampler = shown if alone else of_kind(graph, "SamplerCustomAdvanced")
    return {
        **graph,
        "90": node("SaveLatent", samples=[sampler, 0], filename_prefix=f"latents/{text}"),
    }, shown


def made(server: Server, text: str) -> torch.Tensor:
    """Return the newest latents saved for a prompt text."""
    path = sorted((server.base / "output" / "latents").glob(f"{text}_*.latent"))[-1]
    return load_file(path)["latent_tensor"]


def stop(server: Server, shown: str, prompt: str) -> None:
    """Ask for a stop until a run accepts it."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            assert server.post("/autorefiner/stop", {"node": shown, "prompt": prompt}) == {
                "stopping": True
            }
            return
        except Refused:
            time.sleep(0.02)
    raise AssertionError("the run did not begin")


@pytest.mark.parametrize("name", ["text_to_video", "sampler_custom_advanced"])
def test_a_stopped_run_ends_well_with_whole_chunks_and_the_next_one_is_whole(
    name: str, server: Server
) -> None:
    graph, shown = workflow(name, f"stopped in {name}")
    prompt = server.queue(graph)
    stop(server, shown, prompt)
    ended = server.wait(prompt)
    assert ended["status"]["status_str"] == "success", json.dumps(ended["status"])[:2000]
    part = made(server, f"stopped in {name}")
    assert 3 <= part.shape[2] < 61 and part.shape[2] % 3 == 0
    server.run(graph)  # the whole clip, not the stopped one from the cache
    whole = made(server, f"stopped in {name}")
    assert whole.shape[2] == 61 and torch.equal(whole[:, :, : part.shape[2]], part)
    again = server.run(graph)
    cached = next(
        data["nodes"] for event, data in again["status"]["messages"] if event == "execution_cached"
    )
    assert shown in cached


@pytest.mark.parametrize("body", [{"node": "3", "prompt": "none"}, {"node": ["3"]}, [], "text"])
def test_what_is_no_run_cannot_be_stopped(body: object, server: Server) -> None:
    with pytest.raises(Refused) as refused:
        server.post("/autorefiner/stop", body)
    assert "no such run" in refused.value.answer["error"]


def test_a_request_in_a_charset_that_is_none_is_refused(server: Server) -> None:
    kind = {"Content-Type": "application/json; charset=none"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/autorefiner/stop", b"{}", kind
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 404
