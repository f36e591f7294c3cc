"""Start pictures and decoded video files in a real ComfyUI."""

import json

import av
import pytest
import torch
from comfy_graphs import node, of_kind, small
from comfy_runs import keeping, sampled, short
from comfy_server import Server, find_comfyui

from decoding import decoded

pytestmark = [pytest.mark.comfyui, pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")]


def starting(graph: dict, sampler: str) -> tuple[dict, dict, dict]:
    """Return a graph that begins from a picture: by `start`, by core's ARVideoI2V, or by both."""
    picture = {"70": node("EmptyImage", width=64, height=64, batch_size=1, color=0xC03030)}
    encoded = picture | {"71": node("VAEEncode", pixels=["70", 0], vae=["1", 2])}
    sizes = {"width": 64, "height": 64, "length": 21, "batch_size": 1}
    on_model = picture | {
        "72": node("ARVideoI2V", model=["1", 0], vae=["1", 2], start_image=["70", 0], **sizes)
    }

    def linked(more: dict, start: bool, model: bool) -> dict:
        changed = {key: {**each, "inputs": dict(each["inputs"])} for key, each in graph.items()}
        if start:
            changed[sampler]["inputs"]["start"] = ["71", 0]
        for each in changed.values():
            if model and each["inputs"].get("model") == ["1", 0]:
                each["inputs"]["model"] = ["72", 0]
        return changed | more

    return (
        linked(encoded, True, False),
        linked(on_model, False, True),
        linked(encoded | on_model, True, True),
    )


@pytest.mark.parametrize("kind", ["AutoRefinerSampler", "AutoRefinerCustomSampler"])
def test_a_start_image_on_the_model_is_the_start_of_both_samplers(
    server: Server, kind: str
) -> None:
    custom = kind == "AutoRefinerCustomSampler"
    graph = small("sampler_custom_advanced") if custom else short()
    by_input, by_model, twice = starting(graph, of_kind(graph, kind))
    key = of_kind(graph, "SamplerCustomAdvanced" if custom else kind)
    expected = sampled(server, by_input, f"start_{kind}", key)
    assert torch.equal(sampled(server, by_model, f"i2v_{kind}", key), expected)
    assert not torch.equal(expected, sampled(server, graph, f"none_{kind}", key))
    failed = server.wait(server.queue(keeping(twice, key, "twice")))
    assert "ARVideoI2V" in json.dumps(failed["status"]["messages"])


def test_a_decoded_video_holds_prompt_and_workflow(server: Server) -> None:
    graph = short(5)
    graph["4"] = node(
        "AutoRefinerDecodeToVideo", samples=["3", 0], vae=["1", 2], fps=12.5, filename_prefix="held"
    )
    del graph["5"], graph["6"]
    server.run(graph)
    path = server.base / "output" / "held_00001_.mp4"
    assert len(decoded(path)) == 5
    with av.open(str(path)) as container:
        assert json.loads(container.metadata["prompt"])["3"]["class_type"] == "AutoRefinerSampler"
        assert container.streams.video[0].average_rate == 12.5
        assert container.streams.video[0].frames == 5


@pytest.mark.parametrize("prefix", ["numbered/a", "numbered/b/"])
def test_no_run_takes_the_name_of_a_finished_or_partial_file(server: Server, prefix: str) -> None:
    graph, folder = short(5), server.base / "output" / "numbered"
    del graph["5"], graph["6"]
    folder.mkdir(exist_ok=True)
    left = folder / f"{prefix[9]}_00001_.partial.mp4"
    left.write_bytes(b"what is finished")
    for fps in (8, 16):  # unchanged nodes are cached
        graph["4"] = node(
            "AutoRefinerDecodeToVideo",
            samples=["3", 0],
            vae=["1", 2],
            fps=fps,
            filename_prefix=prefix,
        )
        server.run(graph)
    assert left.read_bytes() == b"what is finished"
    written = sorted(folder.glob(f"{prefix[9]}_0000?_.mp4"))
    assert [path.name[2:7] for path in written] == ["00002", "00003"]
    assert [len(decoded(path)) for path in written] == [5, 5]
