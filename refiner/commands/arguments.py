"""Arguments that several commands share, and how text becomes a value."""

import argparse
from typing import NoReturn

from ..acceleration import GRAPHS
from ..device import DTYPES
from ..fit import Budget
from ..refiner_plan import FORMS
from ..schedule import STEPS
from ..terminal import warn
from ..wan.lora import LoraFile

ERROR = "autorefiner: error: "


class Parser(argparse.ArgumentParser):
    """Report wrong arguments in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        warn(f"{ERROR}{message}; see {self.prog} --help")
        self.exit(2)


def falling_levels(text: str) -> tuple[int, ...]:
    """Parse nominal levels, from pure noise down."""
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers) or int(numbers[0]) != STEPS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give levels that fall from {STEPS}, like 1000,750,500,250"
        )
    return tuple(int(number) for number in numbers)


def levels(text: str) -> tuple[int, ...]:
    """Parse nominal levels in any order."""
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: give nominal levels, like 750,500")
    return tuple(int(number) for number in numbers)


def refiner_form(text: str) -> str:
    """Parse the form of a refiner; `branches` is the older name of `unmerged`."""
    form = {"branches": "unmerged"}.get(text, text)
    if form not in FORMS:
        raise argparse.ArgumentTypeError(f"{text!r}: give auto, merged or unmerged")
    return form


def frames(text: str) -> int | None:
    """Parse a number of frames; None for `endless`."""
    if text == "endless":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number, or endless") from None


def size(text: str) -> tuple[int, int]:
    """Parse a width and height in pixels."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: give WIDTHxHEIGHT in pixels, like 832x480")
    return int(sides[0]), int(sides[1])


def budget(text: str) -> Budget:
    """Parse a number of bytes with its unit."""
    try:
        return Budget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def lora(text: str) -> LoraFile:
    """Parse FILE or FILE:STRENGTH."""
    try:
        return LoraFile.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_acceleration(command: argparse._ActionsContainer) -> None:
    """Add --compile and --graphs."""
    about = (
        "fuse norms, gates and RoPE by torch.compile; the first chunk takes longer, and torch keeps"
        " the result on disk; needs a C++ compiler, on a GPU Triton"
    )
    command.add_argument("--compile", action="store_true", help=about)
    about = "auto: replay on a CUDA GPU the passes that repeat from chunk to chunk (default off)"
    command.add_argument("--graphs", choices=GRAPHS, default="off", help=about)


def add_machine(command: argparse._ActionsContainer) -> None:
    """Add --device and --dtype."""
    about = "cpu, cuda, cuda:1, mps (default: a GPU if there is one)"
    command.add_argument("--device", default="auto", help=about)
    about = "default bf16, on a CPU fp32"
    command.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help=about)
