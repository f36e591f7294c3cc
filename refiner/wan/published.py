"""Names under which models are published, and what they say of the file."""

import re
from dataclasses import dataclass
from pathlib import Path

EXTENSIONS = re.compile(r"\.(safetensors|pt|pth|bin|ckpt)$", re.IGNORECASE)
COPY = re.compile(r"\s*\(\d+\)$")  # what browsers add to a second download
SHARD = re.compile(r"-\d+-of-\d+$")
PRECISION = re.compile(r"(_(bf16|fp16|fp32|fp8|e4m3fn|e5m2|scaled|comfy|comfyui|repackaged))+$")
DEPTH = 5  # of a path, from the file up


@dataclass(frozen=True, slots=True)
class Published:
    """A published file. `names` is a pattern of the end of its path as `plain_path` writes it.

    `key` is the group of weights that its authors sample. `stage` says what a file without a preset
    is.
    """

    names: str
    preset: str = ""
    key: str = ""
    stage: str = ""

    def matches(self, path: str) -> bool:
        return re.fullmatch(rf"(?:.*/)?(?:{self.names})", path) is not None


BEFORE = "is a stage of training before the last distillation, which few levels do not sample"
JOINT = "denoises a joint window of several chunks, which no preset does"
SFWAN = r"sfwan2_1_t2v_1_3b_diffusers(/transformer(/diffusion_pytorch_model)?)?"

# fmt: off
MODELS = (
    Published(r"self_forcing_(dmd|sid)", "self-forcing", "generator_ema"),
    Published(r"self_forcing_dmd_ema_as_generator", "self-forcing", "generator"),
    Published(SFWAN, "self-forcing"),
    Published(r"autoregressive_checkpoint(/model)?", "causvid", "generator"),
    Published(r"longlive_base", "longlive", "generator"),
    Published(r"(chunkwise/|chunkwise_)causal_forcing|causal_forcing_chunkwise", "causal-forcing", "generator"),
    Published(r"framewise/causal_forcing|causal_forcing_framewise", "causal-forcing-framewise", "generator_ema"),
    Published(r"(causal_forcing_)?framewise_2step", "causal-forcing-2step", "generator_ema"),
    Published(r"(causal_forcing_)?framewise_1step", "causal-forcing-1step", "generator_ema"),
    Published(r"krea_realtime_video_14b|14b_400", "krea-14b"),
    Published(r"raven_model|cmgrpo_raven_(merge|full)", "raven"),
    Published(r"rewardforcing", "reward-forcing"),
    Published(r"infinite_forcing/(.*/)?checkpoint_model_\d+/model", "infinite-forcing", "generator_ema"),
    Published(r"one_forcing", "one-forcing", "generator"),
    Published(r"wan_causal_dmd_v2v(_14b)?/model", "streamdiffusion-v2", "generator"),
    Published(r"self_forcing_dmd_14b", "self-forcing-14b"),
    Published(r"longlive_14b", "longlive-14b", "generator"),
    Published(r"ode_init", stage=BEFORE),
    Published(r"wan_causal_ode_checkpoint_model_\d+/model", stage=BEFORE),
    Published(r"causal_ode|causal_cd", stage=BEFORE),
    Published(r"ar_diffusion", stage="needs some 50 steps with guidance, which no preset has"),
    Published(r"longvideo", stage=f"is a long-video model: it {JOINT}"),
    Published(r"rolling_forcing_dmd", stage=JOINT),
    Published(r"hiar", stage="denoises all chunks level by level, which no preset does"),
)
LORAS = (
    Published(r"opsdv_(self_forcing|longlive)_lora", "opsd-v"),
    Published(r"cmgrpo_raven_lora", "raven"),
)
# fmt: on
# Part of a file's or folder's name, letters and digits only -> preset. It ranks likely presets and
# chooses none.
FRAGMENTS = (
    ("framewise2step", "causal-forcing-2step"),
    ("causalforcing2step", "causal-forcing-2step"),
    ("framewise1step", "causal-forcing-1step"),
    ("causalforcing1step", "causal-forcing-1step"),
    ("framewise", "causal-forcing-framewise"),
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
STAGES = (
    "odeinit",
    "causalode",
    "causalcd",
    "ardiffusion",
)  # fragments that no finished model is named with
EXPERTS = ("highnoise", "lownoise", "a14b")


def plain_path(path: Path) -> str:
    """The end of a path in lower case, `_` for other signs, without suffixes of format, precision
    and shards.

    Folders of Hugging Face's cache are those of the repository.
    """
    parts = list(path.absolute().parts[1:])
    if "snapshots" in parts[:-1]:
        start = parts.index("snapshots")
        parts = [*parts[: start - 1], parts[start - 1].split("--")[-1], *parts[start + 2 :]]
    if parts:
        parts[-1] = SHARD.sub("", COPY.sub("", EXTENSIONS.sub("", parts[-1])))
    plain = [re.sub(r"[^a-z0-9]+", "_", part.lower()).strip("_") for part in parts[-DEPTH:]]
    return PRECISION.sub("", "/".join(plain))


def published_as(path: Path, table: tuple[Published, ...] = MODELS) -> Published | None:
    """The row of a published name; None for any other."""
    plain = plain_path(path)
    return next((row for row in table if row.matches(plain)), None)


def fragments_of(path: Path) -> list[str]:
    """Presets that parts of a name speak of, those of the file before those of its folders."""
    parts = [part.replace("_", "") for part in reversed(plain_path(path).split("/"))]
    return [preset for part in parts for fragment, preset in FRAGMENTS if fragment in part]


def speaks_of(path: Path, fragments: tuple[str, ...]) -> bool:
    """Whether the name of a file or of the folder it lies in has one of these parts."""
    ends = [part.replace("_", "") for part in plain_path(path).split("/")[-2:]]
    return any(fragment in part for part in ends for fragment in fragments)
