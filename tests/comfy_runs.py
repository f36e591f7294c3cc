"""Run graphs in a real ComfyUI and load the latents that they save."""

import json

import torch
from comfy_graphs import node, of_kind, small
from comfy_server import Server
from safetensors.torch import load_file

from autorefiner.nodes import workflow
from autorefiner.nodes.hosts import standalone

NEAR = {"atol": 1e-4, "rtol": 1e-4}


def keeping(graph: dict, key: str, name: str) -> dict:
    """Add a SaveLatent node for the output of node `key`."""
    return {**graph, "90": node("SaveLatent", samples=[key, 0], filename_prefix=f"latents/{name}")}


def latents(server: Server, name: str) -> torch.Tensor:
    """Load the newest latents saved under a name."""
    path = sorted((server.base / "output" / "latents").glob(f"{name}_*.latent"))[-1]
    return load_file(path)["latent_tensor"]


def sampled(server: Server, graph: dict, name: str, key: str | None = None) -> torch.Tensor:
    """Run a graph in ComfyUI; return the latents of its last sampler, or of node `key`."""
    server.run(keeping(graph, key or of_kind(graph, "AutoRefinerSampler"), name))
    return latents(server, name)


def short(length: int = 21, **inputs: object) -> dict:
    """Return a short text-to-video graph."""
    graph = small("text_to_video")
    graph["3"]["inputs"] |= {"length": length, **inputs}
    return graph


def alone(server: Server, graph: dict) -> torch.Tensor:
    """Return the latents that `autorefiner run` samples for the graph."""
    path = server.base / "graph.json"
    path.write_text(json.dumps(graph))
    with standalone.running_at(standalone.place_of(server.base, server.base / "alone", "cpu")):
        results = workflow.execute(workflow.read_workflow(path))
    return results[of_kind(graph, "AutoRefinerSampler")].args[0]["samples"]


def custom(**inputs: object) -> dict:
    """Return a short SamplerCustomAdvanced graph; `inputs` go to its SAMPLER node."""
    graph = small("sampler_custom_advanced")
    graph["7"]["inputs"]["length"] = 29
    graph["8"]["inputs"] |= inputs
    return graph
