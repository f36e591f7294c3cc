"""The video of a run in a real ComfyUI: what its route sends, and when there is none."""

import io
import json
import urllib.error
import urllib.request

import av
import numpy as np
import pytest
import torch
from comfy_graphs import of_kind
from comfy_runs import custom, keeping, latents, short
from comfy_server import Server, find_comfyui
from einops import reduce

from autorefiner.nodes.hosts import standalone
from autorefiner.refiner.video import as_bytes

pytestmark = [pytest.mark.comfyui, pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")]


def watched(kind: str) -> tuple[dict, str]:
    """Return a short graph whose sampler has a VAE, and the node whose latents are the result."""
    graph = short() if kind == "AutoRefinerSampler" else custom()
    loader = of_kind(graph, "AutoRefinerLoadDemo")
    graph[of_kind(graph, kind)]["inputs"]["vae"] = [loader, 2]
    result = kind if kind == "AutoRefinerSampler" else "SamplerCustomAdvanced"
    return graph, of_kind(graph, result)


def run(server: Server, graph: dict, workflow: str) -> list[dict]:
    """Run a graph as a page does; return the records of the workflow's videos."""
    prompt = server.queue(graph, extra_pnginfo={"workflow": {"id": workflow}})
    assert server.wait(prompt)["status"]["status_str"] == "success"
    return server.get(f"/autorefiner/live?workflow={workflow}")["videos"]


def fetch(server: Server, path: str, **headers: str) -> tuple[int, bytes, dict]:
    """Return (status, body, headers) of a path under /autorefiner/live/."""
    address = f"http://127.0.0.1:{server.port}/autorefiner/live/{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def frames_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode()])


def blocks(frames_FHWC: np.ndarray) -> np.ndarray:
    """Average 8x8 pixels, as the video halves the resolution of colour."""
    return reduce(frames_FHWC.astype(float), "f (h a) (w b) c -> f h w c", "mean", a=8, b=8)


@pytest.mark.parametrize("kind", ["AutoRefinerSampler", "AutoRefinerCustomSampler"])
def test_the_video_is_what_the_latents_decode_to(
    kind: str, server: Server, stand_ins: None
) -> None:
    graph, result = watched(kind)
    (record,) = run(server, keeping(graph, result, kind), kind)
    assert record["node"] == of_kind(graph, kind) and record["ended"] and not record["note"]
    status, data, headers = fetch(server, record["video"])
    assert status == 200 and headers["X-AutoRefiner-Fragments"] == str(record["fragments"])
    vae = standalone.load_demo("student")[2]
    expected = torch.cat(list(standalone.decode(vae, latents(server, kind)[:1])))
    seen = frames_of(data)
    assert seen.shape == expected.shape and record["seconds"] == len(seen) / 16
    assert np.abs(blocks(seen) - blocks(as_bytes(expected))).max() < 12


def test_a_page_asks_for_fragments_and_for_bytes(server: Server) -> None:
    graph, result = watched("AutoRefinerSampler")
    graph[result]["inputs"]["seed"] = 77
    (record,) = run(server, keeping(graph, result, "asked"), "asked")
    video, count = record["video"], record["fragments"]
    _, whole, _ = fetch(server, video)
    _, first, headers = fetch(server, f"{video}?most=1")
    assert headers["X-AutoRefiner-Fragments"] == "1"
    assert first + fetch(server, f"{video}?from=1")[1] == whole
    assert fetch(server, f"{video}?from={count}")[1] == b""
    status, piece, headers = fetch(server, video, Range="bytes=100-199")
    assert status == 206 and piece == whole[100:200]
    assert headers["Content-Range"] == f"bytes 100-199/{len(whole)}"
    for bad in (f"bytes={len(whole)}-", "bytes=9-2", "bites=1-2"):
        assert fetch(server, video, Range=bad)[0] == 416
    for query in ("from=-1", "from=x", "from=%D9%A1", "most=1.5", f"from={'9' * 40}"):
        status, body, _ = fetch(server, f"{video}?{query}")
        assert status == 400 and "number" in json.loads(body)["error"]


@pytest.mark.parametrize("video", ["none", "..%2F..%2Fmain.py", "%00", "a" * 5000])
def test_a_video_that_is_not_held_is_not_found(video: str, server: Server) -> None:
    assert fetch(server, video)[0] == 404


def test_a_run_that_no_page_queued_is_not_decoded(server: Server) -> None:
    graph, result = watched("AutoRefinerSampler")
    graph[result]["inputs"]["seed"] = 78
    extra = {"extra_pnginfo": {"workflow": {"id": "alone"}}}
    body = {"prompt": keeping(graph, result, "alone"), "extra_data": extra}
    assert server.wait(server.post("/prompt", body)["prompt_id"])["status"]["completed"]
    assert server.get("/autorefiner/live?workflow=alone") == {"videos": []}
