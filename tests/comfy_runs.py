"""Graphs for a real ComfyUI whose latents are kept, and what it made of them."""

import torch
from comfy_graphs import node, of_kind, small
from comfy_server import Server
from safetensors.torch import load_file


def keeping(graph: dict, key: str, name: str) -> dict:
    """The graph with a node's LATENT saved under a name."""
    return {**graph, "90": node("SaveLatent", samples=[key, 0], filename_prefix=f"latents/{name}")}


def latents(server: Server, name: str) -> torch.Tensor:
    """What the newest run saved under that name."""
    path = sorted((server.base / "output" / "latents").glob(f"{name}_*.latent"))[-1]
    return load_file(path)["latent_tensor"]


def sampled(server: Server, graph: dict, name: str, key: str | None = None) -> torch.Tensor:
    """The latents of a graph's last sampler, run by ComfyUI."""
    server.run(keeping(graph, key or of_kind(graph, "AutoRefinerSampler"), name))
    return latents(server, name)


def short(length: int = 21, **inputs: object) -> dict:
    """Text to video, short."""
    graph = small("text_to_video")
    graph["3"]["inputs"] |= {"length": length, **inputs}
    return graph
