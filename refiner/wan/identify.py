"""Which preset a transformer file belongs to, and how sure that is."""

import re
from pathlib import Path

from .layouts import Layout
from .transformer import WAN_14B, WanConfig

# Part of a file's or folder's name, letters and digits only -> preset; the first that matches wins. "" has no preset.
NAME_HINTS = (
    ("framewise2step", "causal-forcing-2step"),
    ("causalforcing2step", "causal-forcing-2step"),
    ("framewise1step", "causal-forcing-1step"),
    ("causalforcing1step", "causal-forcing-1step"),
    ("longvideo", ""),
    ("framewise", "causal-forcing-framewise"),
    ("causalforcing", "causal-forcing"),
    ("longlive", "longlive"),
    ("krea", "krea-14b"),
    ("causvid", "causvid"),
    ("autoregressivecheckpoint", "causvid"),
    ("selfforcing", "self-forcing"),
)
# Published without averaged weights, or sampled by their authors without them.
PUBLISHED_KEY = {"causvid": "generator", "longlive": "generator", "causal-forcing": "generator"}
HINT = "a hint, pass --preset to be sure"


def name_hint(path: Path) -> tuple[str | None, str]:
    """(preset, the part of the path that says so), nearest part first; (None, "") when nothing does.

    The preset is "" where the name is known to have none.
    """
    parts = list(reversed(path.absolute().parts[-3:]))
    plain = [re.sub(r"[^a-z0-9]", "", part.lower()) for part in parts]
    for part, text in zip(parts, plain, strict=True):
        preset = next((preset for mark, preset in NAME_HINTS if mark in text), None)
        if preset == "causal-forcing" and any("framewise" in text for text in plain):
            preset = "causal-forcing-framewise"
        if preset is not None:
            return preset, part
    return None, ""


def guess_preset(
    path: Path, layout: Layout, config: WanConfig, keys: tuple[str, ...], stated: object, causal: bool
) -> tuple[str | None, str]:
    """(preset or None, one sentence why). `keys` are the top keys; `stated` and `causal` come from the metadata."""
    if isinstance(stated, str) and stated:
        return stated, "its metadata names it"
    is_14b = (config.dim, config.num_layers) == (WAN_14B.dim, WAN_14B.num_layers)
    wrapped = layout.prefix == "model." and layout.naming == "wan"
    if is_14b and wrapped:
        return "krea-14b", "14B in the training wrapper's names: only Krea's is published as causal"
    hint, part = name_hint(path)
    if hint and (hint == "krea-14b") != is_14b:
        return None, f"the name {part!r} says {hint}, which is not published at width {config.dim}: pass --preset"
    if hint:
        return hint, f"only the name {part!r} says so, {HINT}"
    if hint == "":
        return None, f"the name {part!r} says a long-video model, whose joint window has no preset: pass --preset"
    return None, _undecided(layout, keys, causal, wrapped)


def _undecided(layout: Layout, keys: tuple[str, ...], causal: bool, wrapped: bool) -> str:
    if causal:
        return "its metadata says autoregressive but not how it is sampled: pass --preset"
    if "generator_ema" in keys and "_fsdp_wrapped_module." in layout.infixes:
        return "named as Causal-Forcing's frame-wise, 2-step, 1-step and long-video files all are: pass --preset"
    if "generator_ema" in keys:
        return "its keys cannot tell Self-Forcing from Causal-Forcing, both are saved so: pass --preset"
    if "generator" in keys:
        return "its keys cannot tell CausVid, LongLive and Causal-Forcing apart, all are saved so: pass --preset"
    if wrapped:
        return "the training wrapper's names, as every causal 1.3B model has: pass --preset"
    return "named as plain Wan2.1, which is not autoregressive: pass --preset if this one is"
