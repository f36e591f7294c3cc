"""A request for a video: the options of `autorefiner generate`, each checked by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from .acceleration import Acceleration, Graphs
from .bundles import Bundle, find_bundle
from .outputs import Outputs
from .prompt_timeline import check_prompt
from .refiner_plan import Form
from .wan.lora import LoraFile
from .wan.transformer import WanConfig


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """The options of `autorefiner generate`; its help explains them. Sizes and frames in pixels."""

    model: str  # a file, or the name of a bundle
    out: Path
    prompt: str = ""
    timeline: str | None = None  # prompts by time, in place of `prompt`
    transition: str | None = None  # of prompts that name none; None: the default
    preset: str | None = None
    levels: tuple[int, ...] | None = None  # None: the preset's
    window: int | None = None  # None: the preset's
    sink: int | None = None  # None: the preset's
    weights: str = "auto"
    lora: tuple[LoraFile, ...] = ()
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    context_cache: Path | None = None
    context: Path | None = None
    vae: Path | None = None
    frames: int | None = 81  # None: endless
    width: int = 832
    height: int = 480
    seed: int = 0
    method: str = "self-forcing"  # one of METHODS, with knobs as `refiner.choices` reads them
    candidates: int | None = None  # of a search; None: the method's
    reward: tuple[str, ...] = ()  # of REWARDS, with knobs: what a search chooses by
    positions: str | None = None  # one of POSITIONS, with knobs; None: the preset's
    store: str | None = None  # one of STORES; None: plain
    memory: str | None = None  # one of POLICIES, with knobs; None: the preset's
    noise: str = "white"  # one of NOISES, with knobs
    recipe: str = ""  # chunks to reroll, an end or an extension, as `refiner.recipe` reads them
    refiner: str | None = None
    refiner_strength: float = 1.0
    refined_levels: tuple[int, ...] | None = None  # None: those it was trained for
    refiner_form: Form = "auto"
    extend: Path | None = None
    save_latents: bool = False
    overwrite: bool = False
    sheet: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    graphs: Graphs = "off"
    fp8: bool = False  # products of the transformer's blocks in fp8
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.width < 16 or self.height < 16 or self.width % 16 or self.height % 16:
            near = "x".join(str(max(16, round(n / 16) * 16)) for n in (self.width, self.height))
            raise ValueError(
                f"size {self.width}x{self.height}: both must be multiples of 16, the nearest is"
                f" {near}"
            )
        if self.out.suffix != ".mp4":
            raise ValueError(f"output {self.out} is not an .mp4: give a name that ends in .mp4")
        if self.frames is None and self.sheet:
            raise ValueError(
                "--sheet with --frames endless: a contact sheet needs an end, leave it out"
            )
        if self.candidates is not None and "candidates" in self.method:
            raise ValueError(f"--candidates and --method {self.method}: set candidates once")
        if not -100 <= self.refiner_strength <= 100:
            raise ValueError(
                f"strength {self.refiner_strength}: give a number from -100 to 100, 0 is the base"
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed}: give one from 0 to {(1 << 63) - 1}")
        check_prompt(self.prompt)
        if self.timeline and (self.prompt or self.context):
            given = "--prompt" if self.prompt else "--context"
            raise ValueError(f"--timeline and {given} both say what to show: give one of them")

    @property
    def leaves_memory(self) -> bool:
        """Whether the clip's length may choose the memory.

        Not with a timeline: a long sink would hold its first scene in sight.
        """
        chosen = (self.memory, self.window, self.sink, self.positions, self.timeline)
        return all(choice is None for choice in chosen)

    @property
    def acceleration(self) -> Acceleration:
        """What makes the run faster."""
        return Acceleration(self.compile, self.graphs)

    @property
    def sampler(self) -> str:
        """The method with its knobs, --candidates among them."""
        if self.candidates is None:
            return self.method
        name, _, settings = self.method.partition(":")
        return f"{name}:{','.join(filter(None, (settings, f'candidates={self.candidates}')))}"

    @property
    def outputs(self) -> Outputs:
        """The files that this run writes."""
        return Outputs(self.out, self.sheet, self.extend, self.save_latents, self.overwrite)

    @property
    def bundle(self) -> Bundle | None:
        """The bundle that `model` names; None for a file."""
        return find_bundle(self.model)

    @property
    def model_source(self) -> Path | WanConfig:
        """The transformer's file, or the sizes of a random one."""
        return self.bundle.model if self.bundle else Path(self.model)

    @property
    def vae_source(self) -> Path | int | None:
        """The VAE's file, or the base width of a random one; None without a VAE."""
        return self.vae or (self.bundle.vae if self.bundle else None)

    def unused(self) -> list[str]:
        """List the command-line options that were given but have no effect in this run."""
        bundled = self.bundle is not None
        untrained = isinstance(self.model_source, WanConfig)
        idle = {
            "--refiner-strength": self.refiner is None and self.refiner_strength != 1,
            "--refined-levels": self.refiner is None and self.refined_levels is not None,
            "--transition": self.transition is not None and not (self.timeline or self.extend),
            "--lora": untrained and bool(self.lora),
            "--tokenizer": bundled and self.tokenizer is not None,
            "--context-cache": bundled and self.context_cache is not None,
        }
        return [name for name, is_idle in idle.items() if is_idle]

    def notes_of_bundle(self, prompts: Sequence[str]) -> list[str]:
        """Return the bundle's warnings on a run's prompts and size, each once."""
        if self.bundle is None:
            return []
        notes = [
            self.bundle.notes(prompt, self.width, self.height)
            for prompt in ([None] if self.context else prompts)
        ]
        return list(dict.fromkeys(chain.from_iterable(notes)))
