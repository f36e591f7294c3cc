"""Graphs whose sampler has a VAE, so that ComfyUI's page shows the video while it is made."""

from comfy_graphs import node
from comfy_server import Server

LOADER, SAMPLER = "1", "3"


def watched(
    seed: int, length: int = 21, side: int = 64, live: bool = True, decode: bool = False
) -> dict:
    """Return a run of the demo; with `decode`, VAE Decode Chunks follows it."""
    sampler = {
        "model": [LOADER, 0], "positive": ["2", 0], "width": side, "height": side,
        "length": length, "batch_size": 1, "seed": seed, "method": "self-forcing",
    }  # fmt: skip
    return {
        LOADER: node("AutoRefinerLoadDemo", network="student"),
        "2": node("CLIPTextEncode", clip=[LOADER, 1], text="a red star circles on a navy ground"),
        SAMPLER: node("AutoRefinerSampler", **sampler, **({"vae": [LOADER, 2]} if live else {})),
        "4": node("AutoRefinerDecodeChunks", samples=[SAMPLER, 0], vae=[LOADER, 2]),
        "5": node("PreviewAny", source=["4" if decode else SAMPLER, 0]),
    }


def seconds_of(server: Server, graph: dict, workflow: str) -> float:
    """Run a graph as a page does; return its seconds, as the server's history has them."""
    prompt = server.queue(graph, extra_pnginfo={"workflow": {"id": workflow}})
    status = server.wait(prompt)["status"]
    if status["status_str"] != "success":
        raise RuntimeError(f"the run failed: {status['messages'][-1]}")
    times = {event: data["timestamp"] for event, data in status["messages"]}
    return (times["execution_success"] - times["execution_start"]) / 1000


def live_record(server: Server, workflow: str) -> dict:
    """Return the record of a workflow's only video."""
    (record,) = server.get(f"/autorefiner/live?workflow={workflow}")["videos"]
    return record
