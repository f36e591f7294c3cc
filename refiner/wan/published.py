"""Names under which models are published, and the presets that they imply."""

import re
from dataclasses import dataclass
from pathlib import Path

EXTENSIONS = re.compile(r"\.(safetensors|pt|pth|bin|ckpt)$", re.IGNORECASE)
COPY = re.compile(r"\s*\(\d+\)$")  # added by browsers to a second download
SHARD = re.compile(r"-\d+-of-\d+$")
PRECISION = re.compile(r"(_(bf16|fp16|fp32|fp8|e4m3fn|e5m2|scaled|comfy|comfyui|repackaged))+$")
DEPTH = 5  # parts of a path that are compared, from the file up


@dataclass(frozen=True, slots=True)
class Published:
    """A published file.

    `names` is a pattern for the end of its `plain_path`, `key` the group of weights that its
    authors sample, and `stage` a description of a file without a preset.
    """

    names: str
    preset: str = ""
    key: str = ""
    stage: str = ""

    def matches(self, path: str) -> bool:
        return re.fullmatch(rf"(?:.*/)?(?:{self.names})", path) is not None


BEFORE = "is a stage of training before the last distillation, which few levels do not sample"
JOINT = "denoises a window of several chunks together, which needs --method rolling"
SFWAN = r"sfwan2_1_t2v_1_3b_diffusers(/transformer(/diffusion_pytorch_model)?)?"
CHUNKWISE = r"(chunkwise/|chunkwise_)causal_forcing|causal_forcing_chunkwise"
FRAMEWISE = r"framewise/causal_forcing|causal_forcing_framewise"
INFINITE = r"infinite_forcing/(.*/)?checkpoint_model_\d+/model"

# fmt: off
MODELS = (
    Published(r"self_forcing_(dmd|sid)", "self-forcing", "generator_ema"),
    Published(r"self_forcing_dmd_ema_as_generator", "self-forcing", "generator"),
    Published(SFWAN, "self-forcing"),
    Published(r"autoregressive_checkpoint(/model)?", "causvid", "generator"),
    Published(r"longlive_base", "longlive", "generator"),
    Published(CHUNKWISE, "causal-forcing", "generator"),
    Published(FRAMEWISE, "causal-forcing-framewise", "generator_ema"),
    Published(r"(causal_forcing_)?framewise_2step", "causal-forcing-2step", "generator_ema"),
    Published(r"(causal_forcing_)?framewise_1step", "causal-forcing-1step", "generator_ema"),
    Published(r"krea_realtime_video_14b|14b_400", "krea-14b"),
    Published(r"raven_model|cmgrpo_raven_(merge|full)", "raven"),
    Published(r"rewardforcing", "reward-forcing"),
    Published(INFINITE, "infinite-forcing", "generator_ema"),
    Published(r"one_forcing", "one-forcing", "generator"),
    Published(r"wan_causal_dmd_v2v(_14b)?/model", "streamdiffusion-v2", "generator"),
    Published(r"self_forcing_dmd_14b", "self-forcing-14b"),
    Published(r"longlive_14b", "longlive-14b", "generator"),
    Published(r"ode_init", stage=BEFORE),
    Published(r"wan_causal_ode_checkpoint_model_\d+/model", stage=BEFORE),
    Published(r"causal_ode|causal_cd", stage=BEFORE),
    Published(r"ar_diffusion", stage="needs some 50 steps with guidance, which no preset has"),
    Published(r"longvideo", stage=f"{JOINT} and --levels 1000,750,500,250"),
    Published(r"rolling_forcing_dmd", stage=JOINT),
    Published(r"hiar", stage="denoises all chunks level by level, which no preset does"),
)
LORAS = (
    Published(r"opsdv_(self_forcing|longlive)_lora", "opsd-v"),
    Published(r"cmgrpo_raven_lora", "raven"),
)
# fmt: on
# Fragment of a file's or folder's name (letters and digits only), and a preset that it hints at.
# Hints rank the likely presets; they never choose one.
FRAGMENTS = (
    ("framewise2step", "causal-forcing-2step"),
    ("causalforcing2step", "causal-forcing-2step"),
    ("framewise1step", "causal-forcing-1step"),
    ("causalforcing1step", "causal-forcing-1step"),
    ("framewise", "causal-forcing-framewise"),
    ("rollingforcing", "rolling-forcing"),
    ("longvideo", "rolling-forcing"),
    ("infiniteforcing", "infinite-forcing"),
    ("rewardforcing", "reward-forcing"),
    ("oneforcing", "one-forcing"),
    ("opsdv", "opsd-v"),
    ("raven", "raven"),
    ("streamdiffusion", "streamdiffusion-v2"),
    ("dmdv2v", "streamdiffusion-v2"),
    ("longlive", "longlive"),
    ("krea", "krea-14b"),
    ("causvid", "causvid"),
    ("autoregressivecheckpoint", "causvid"),
    ("causalforcing", "causal-forcing"),
    ("selfforcing", "self-forcing"),
    ("sfwan", "self-forcing"),
)
# Fragments of names of unfinished models.
STAGES = ("odeinit", "causalode", "causalcd", "ardiffusion")
EXPERTS = ("highnoise", "lownoise", "a14b")


def plain_path(path: Path) -> str:
    """Return the end of a path in lower case, with `_` for anything but letters and digits.

    Suffixes of format, precision and shards are removed. A folder of Hugging Face's cache counts as
    its repository.
    """
    names = list(path.absolute().parts[1:])
    if "snapshots" in names[:-1]:
        start = names.index("snapshots")
        names = [*names[: start - 1], names[start - 1].split("--")[-1], *names[start + 2 :]]
    if names:
        names[-1] = SHARD.sub("", COPY.sub("", EXTENSIONS.sub("", names[-1])))
    plain = [re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in names[-DEPTH:]]
    return PRECISION.sub("", "/".join(plain))


def published_as(path: Path, table: tuple[Published, ...] = MODELS) -> Published | None:
    """Return the row of a published name; None for any other."""
    plain = plain_path(path)
    return next((row for row in table if row.matches(plain)), None)


def hinted_presets(path: Path) -> list[str]:
    """List the presets that a path hints at, the file's name before its folders'."""
    names = [name.replace("_", "") for name in reversed(plain_path(path).split("/"))]
    return [preset for name in names for fragment, preset in FRAGMENTS if fragment in name]


def has_fragment(path: Path, fragments: tuple[str, ...]) -> bool:
    """Check the names of a file and its folder for one of these fragments."""
    names = [name.replace("_", "") for name in plain_path(path).split("/")[-2:]]
    return any(fragment in name for name in names for fragment in fragments)
