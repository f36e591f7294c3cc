"""AutoRefiner: autoregressive video diffusion, sampled chunk by chunk."""

__version__ = "0.1.0"

WEB_DIRECTORY = "./web"  # ComfyUI serves it; the nodes' help pages lie in its docs/


async def comfy_entrypoint():
    """The pack's nodes, for ComfyUI."""
    from .nodes.hosts import comfy
    from .nodes.registry import ANSWERS, NODES

    return comfy.extension(NODES, ANSWERS)
