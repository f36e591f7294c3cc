"""Choose the preset of a transformer file: proven by evidence, or a question with likely ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .groups import EMA_ROLES, role_of
from .layouts import Layout
from .published import (
    EXPERTS,
    LORAS,
    STAGES,
    Published,
    has_fragment,
    hinted_presets,
    published_as,
)
from .transformer import WAN_14B, WanConfig

ONLY_14B = ("krea-14b", "self-forcing-14b", "longlive-14b")
ANY_SIZE = ("streamdiffusion-v2",)
# The preset of the same method's larger model.
OF_14B = {"self-forcing": "self-forcing-14b", "longlive": "longlive-14b"}
MOST_LIKELY = 3
# Presets whose LoRAs have rank 256 on every linear layer of the blocks.
LONGLIVE_LORA = ("longlive", "opsd-v")


@dataclass(frozen=True, slots=True)
class Evidence:
    """Facts about a transformer file.

    `groups` are its top keys, `stated` is the preset named in its metadata, and `causal` is true
    where metadata or config.json call it autoregressive.
    """

    path: Path
    layout: Layout
    config: WanConfig
    groups: tuple[str, ...]
    stated: object = None
    causal: bool = False

    @property
    def is_14b(self) -> bool:
        return (self.config.dim, self.config.num_layers) == (WAN_14B.dim, WAN_14B.num_layers)

    @property
    def is_wrapped(self) -> bool:
        """True for names of the training wrapper."""
        return self.layout.prefix == "model." and self.layout.naming == "wan"

    def fits(self, preset: str) -> bool:
        """Check that a preset's models have this size."""
        return preset in ANY_SIZE or (preset in ONLY_14B) == self.is_14b


@dataclass(frozen=True, slots=True)
class Guess:
    """A proven preset, or None and the likely ones.

    `reason` is one sentence; without a preset it asks the user for one.
    """

    preset: str | None
    reason: str
    likely: tuple[str, ...] = ()


def guess_preset(evidence: Evidence) -> Guess:
    """Return the preset proven by metadata or a published name, else a question."""
    if isinstance(evidence.stated, str) and evidence.stated:
        return Guess(evidence.stated, "its metadata names it")
    row = published_as(evidence.path)
    if row is not None and row.preset and evidence.fits(row.preset):
        return Guess(row.preset, f"{_name(evidence.path)} is a published name")
    why, usual = _undecided(evidence, row)
    likely = _likely(evidence, usual)
    return Guess(None, f"{why}: pass --preset {alternatives(likely)}", likely)


def guess_with_lora(path: Path, like_longlive: bool, before: Guess) -> Guess:
    """Update the guess for a base model when a LoRA of this path is merged into it."""
    row = published_as(path, LORAS)
    if row is not None:
        return Guess(row.preset, f"{_name(path)} is the published name of a LoRA for it")
    if before.preset is None and like_longlive:
        why = (
            "the LoRA has rank 256 on every linear layer of the blocks,"
            " as LongLive's and OPSD-V's have"
        )
        return Guess(None, f"{why}: pass --preset {alternatives(LONGLIVE_LORA)}", LONGLIVE_LORA)
    return before


def alternatives(presets: Sequence[str]) -> str:
    """Join names as `a, b or c`."""
    return " or ".join(filter(None, (", ".join(presets[:-1]), presets[-1])))


def _name(path: Path) -> str:
    """Quote a file's name, with its folder where many files have that name."""
    return repr(f"{path.parent.name}/{path.name}" if path.stem == "model" else path.name)


def _likely(evidence: Evidence, usual: Sequence[str]) -> tuple[str, ...]:
    """Return up to three presets of the file's size: hinted at by its name, then the usual ones."""
    named = hinted_presets(evidence.path)
    if evidence.is_14b:
        named = [OF_14B.get(preset, preset) for preset in named]
    fitting = dict.fromkeys(preset for preset in (*named, *usual) if evidence.fits(preset))
    return tuple(fitting)[:MOST_LIKELY]


def _undecided(evidence: Evidence, row: Published | None) -> tuple[str, tuple[str, ...]]:
    """Return why no preset is proven, and the usual presets of such files."""
    why, usual = _undecided_14b(evidence) if evidence.is_14b else _undecided_small(evidence)
    name = _name(evidence.path)
    if row is not None and row.preset:
        return f"{name} is published as {row.preset}, but not at width {evidence.config.dim}", usual
    if row is not None:
        return f"{name} {row.stage}", usual
    if has_fragment(evidence.path, STAGES):
        return f"{name} speaks of a stage of training before the last distillation", usual
    if has_fragment(evidence.path, EXPERTS):
        return f"{name} speaks of one of Wan2.2's two experts, which is half a model", usual
    return why, usual


def _undecided_14b(evidence: Evidence) -> tuple[str, tuple[str, ...]]:
    if evidence.causal:
        why = "its metadata says autoregressive but not how it is sampled"
        return why, ("self-forcing-14b", *ONLY_14B)
    if "generator" in map(role_of, evidence.groups):
        why = "its keys cannot tell LongLive's 14B from StreamDiffusionV2's and others"
        return why, ("longlive-14b", "streamdiffusion-v2", "self-forcing-14b")
    if evidence.is_wrapped:
        why = "14B in a wrapper's names cannot tell Krea's, Self-Forcing's and LongLive's apart"
        return why, ONLY_14B
    why = (
        "named as plain Wan2.1 14B, which is not autoregressive,"
        " though some that are share its names"
    )
    return why, ONLY_14B


def _undecided_small(evidence: Evidence) -> tuple[str, tuple[str, ...]]:
    roles = {role_of(group) for group in evidence.groups}
    if evidence.causal:
        why = "its metadata says autoregressive but not how it is sampled"
        return why, ("self-forcing", "causal-forcing-framewise", "longlive")
    if roles.intersection(EMA_ROLES) and "_fsdp_wrapped_module." in evidence.layout.infixes:
        why = (
            "named as Causal-Forcing's frame-wise, 2-step, 1-step and other methods' files all are"
        )
        return why, ("causal-forcing-framewise", "infinite-forcing", "one-forcing")
    if roles.intersection(EMA_ROLES):
        why = "its keys cannot tell Self-Forcing from Causal-Forcing, both are saved so"
        return why, ("self-forcing", "causal-forcing", "infinite-forcing")
    if "generator" in roles:
        why = "its keys cannot tell CausVid, LongLive and Causal-Forcing apart, all are saved so"
        return why, ("longlive", "causvid", "causal-forcing")
    if evidence.is_wrapped:
        why = "the training wrapper's names, as every causal 1.3B model has"
        return why, ("self-forcing", "reward-forcing", "longlive")
    why = (
        "named as plain Wan2.1, which is not autoregressive, though RAVEN's files are named so too"
    )
    return why, ("raven", "self-forcing")
