"""Where published files can be had: what the page offers where a workflow's models are missing."""

FOLDERS = {
    "AutoRefinerLoadARVDM": "diffusion_models", "CLIPLoader": "text_encoders", "VAELoader": "vae",
}  # fmt: skip
HUB = "https://huggingface.co"
REPACKAGED = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
URLS = {
    "self_forcing_dmd.pt": (
        f"{HUB}/gdhe17/Self-Forcing/resolve/main/checkpoints/self_forcing_dmd.pt"
    ),
    "longlive_base.pt": (
        f"{HUB}/Efficient-Large-Model/LongLive-1.3B/resolve/main/models/longlive_base.pt"
    ),
    "krea-realtime-video-14b.safetensors": (
        f"{HUB}/krea/krea-realtime-video/resolve/main/krea-realtime-video-14b.safetensors"
    ),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (
        f"{REPACKAGED}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    ),
    "wan_2.1_vae.safetensors": f"{REPACKAGED}/vae/wan_2.1_vae.safetensors",
}


def models_of(node: dict) -> list[dict]:
    """Return the published files that a loader names, for the page's list of missing models."""
    folder = FOLDERS.get(node["type"])
    names = [value for value in node["widgets_values"] if value in URLS]
    return [{"name": name, "url": URLS[name], "directory": folder} for name in names if folder]
