"""Load Refiner LoRA and Save Refiner LoRA."""

import math
import re
from pathlib import Path

from ..refiner.bundles import bundled_refiners, refiner_file
from ..refiner.files import is_taken
from ..refiner.noise.file import load_refiner, other_base, save_refiner
from ..refiner.refiner_plan import FORMS, check_fit
from ..refiner.wan.checkpoint import inspect
from .api import CATEGORY, host, io
from .load import stamped
from .paths import SHOWN, check_inside
from .refiner_plan import RefinerLora

RefinerType = io.Custom("REFINER")
SUFFIX = ".refiner.safetensors"
LONGEST_NAME = 200
PLAIN = re.compile(r"\w[\w .()+-]*")  # no drive, no separator of another system, nothing hidden


def refiner_files() -> list[str]:
    """List the bundled refiners and the files in models/loras, those named as refiners first."""
    loras = host.list_files("loras")
    return [*bundled_refiners(), *sorted(loras, key=lambda name: not name.endswith(SUFFIX))]


def refiner_path(name: str) -> Path:
    """Return the file of a listed refiner: bundled (it may be missing), or in models/loras."""
    return bundled_refiners().get(name) or host.find_file("loras", name)


def read_refiner(file: str, strength: float, form: str) -> RefinerLora:
    """Read a REFINER by its name in the list; ValueError for a file that holds none."""
    path = refiner_file(file) or host.find_file("loras", file)
    if not math.isfinite(strength):
        raise ValueError(f"strength {strength} is no number: use 1, or 0 for the base")
    if inspect(path).kind == "lora":
        raise ValueError(
            f"{file} is an ordinary LoRA and no refiner: connect it with LoraLoaderModelOnly"
        )
    return RefinerLora(path.name, *load_refiner(path), strength, form)


def is_plain_name(name: str) -> bool:
    """Whether a part of a path is a visible name on every system."""
    return PLAIN.fullmatch(name) is not None and name == name.rstrip(" .")


def new_file(root: Path, name: str, overwrite: bool) -> Path:
    """Return root/NAME.refiner.safetensors, numbered if that exists and must not be replaced.

    ValueError for a name that leaves `root` or hides.
    """
    parts = name.removesuffix(SUFFIX).split("/")
    if len(name) > LONGEST_NAME or not all(map(is_plain_name, parts)):
        raise ValueError(
            f"name {name[:60]!r}: give a file name like foxes, or one in a folder, like mine/foxes"
        )
    path = root.joinpath(*parts[:-1], parts[-1] + SUFFIX)
    count = 1
    while is_taken(path) and not overwrite:
        count += 1
        path = path.with_name(f"{parts[-1]}_{count}{SUFFIX}")
    check_inside(root, path, f"name {name[:SHOWN]!r}")
    return path


class LoadRefiner(io.ComfyNode):
    """A REFINER from a file, checked against the model that it is for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerLoadRefiner",
            display_name="Load Refiner LoRA",
            category=CATEGORY,
            description="Loads a noise refiner for the Pathwise Refined Sampler and checks that it"
            " fits the model. The MODEL itself stays as it is.",
            search_aliases=["autorefiner", "noise refiner", "reflective"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model, only to check that the refiner fits it.",
                ),
                io.Combo.Input(
                    "file", options=refiner_files(),
                    tooltip="A .refiner.safetensors in models/loras; sprites comes with the"
                    " demo.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05,
                    tooltip="How much of the refinement is added to the noise. 0 is the base model,"
                    " bit for bit.",
                ),
                io.Combo.Input(
                    "form", options=list(FORMS), default="auto", advanced=True,
                    tooltip="merged: a second copy of the refined layers, faster. unmerged: small"
                    " branches beside the model's layers. auto: merged where memory allows it.",
                ),
            ],
            outputs=[RefinerType.Output(tooltip="For the samplers and Save Refiner LoRA.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **others: object) -> tuple:
        """None is a link, whose node tells its file from others."""
        return stamped(refiner_path(file) if file is not None else None, file=file, **others)

    @classmethod
    def execute(cls, model, file: str, strength: float, form: str) -> io.NodeOutput:
        refiner = read_refiner(file, strength, form)
        try:
            check_fit(refiner.pairs, host.facts(model).config)
        except ValueError as error:
            raise ValueError(f"{file} {error}: use a refiner of this MODEL") from error
        description = refiner.describe()
        if warning := other_base(refiner.card, host.base_of(model)):
            host.notice(f"{file}: {warning}")
            description += f"; {warning}"
        return io.NodeOutput(refiner, ui=host.show(description))


class SaveRefiner(io.ComfyNode):
    """A file that Load Refiner LoRA reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerSaveRefiner",
            display_name="Save Refiner LoRA",
            category=CATEGORY,
            description="Writes a refiner into models/loras, with how it was trained. Other LoRA"
            " loaders do not take it, on purpose: a refiner works on noise, not on the model.",
            search_aliases=["autorefiner", "noise refiner"],
            inputs=[
                RefinerType.Input("refiner", tooltip="From training, or from Load Refiner LoRA."),
                io.String.Input(
                    "name", default="my",
                    tooltip="The file is NAME.refiner.safetensors in models/loras; mine/NAME puts"
                    " it into a subfolder.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False,
                    tooltip="Replace a file of that name. Otherwise the new file gets a number:"
                    " NAME_2, NAME_3.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file",
                    tooltip="The file's name inside models/loras.",
                ),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        try:
            if name is not None:  # else it is linked, and looked at when it is known
                new_file(Path(), name, overwrite=True)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, refiner: RefinerLora, name: str, overwrite: bool) -> io.NodeOutput:
        root = host.model_folder("loras")
        path = new_file(root, name, overwrite)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_refiner(path, refiner.pairs, refiner.card)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written ({error.strerror}): give another name"
            ) from error
        file = path.relative_to(root).as_posix()
        return io.NodeOutput(file, ui=host.show(f"saved as {file}"))
