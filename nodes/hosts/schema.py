"""The names of ComfyUI's node API (comfy_api.latest.io) that the pack's nodes use, for where there is no ComfyUI."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Socket:
    """An input: a widget, or only a socket where its type has none. `min`, `max` and `options` are checked."""

    id: str
    io_type: str
    optional: bool = False
    tooltip: str | None = None
    default: Any = None
    min: float | None = None
    max: float | None = None
    options: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a type."""

    io_type: str
    display_name: str | None = None
    tooltip: str | None = None


@dataclass(frozen=True, slots=True)
class SocketType:
    """A type of sockets by its name; arguments that only change how a widget looks are taken and left."""

    io_type: str

    def Input(
        self,
        id: str,
        *,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        default: Any = None,
        min: float | None = None,
        max: float | None = None,
        step: float | None = None,
        options: Sequence[str] | None = None,
        multiline: bool = False,
        advanced: bool = False,
        control_after_generate: bool = False,
    ) -> Socket:
        """An input of this type."""
        return Socket(
            id, self.io_type, optional, tooltip, default, min, max, None if options is None else tuple(options)
        )

    def Output(self, *, display_name: str | None = None, tooltip: str | None = None) -> Output:
        """An output of this type."""
        return Output(self.io_type, display_name, tooltip)


Custom = SocketType
Int, Float, String, Boolean, Combo = (SocketType(name) for name in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"))
Model, Clip, Vae, Conditioning = (SocketType(name) for name in ("MODEL", "CLIP", "VAE", "CONDITIONING"))
Latent, Image, Mask, Video = (SocketType(name) for name in ("LATENT", "IMAGE", "MASK", "VIDEO"))
Sampler = SocketType("SAMPLER")


class MultiType:
    """A socket that takes one of several types."""

    @staticmethod
    def Input(id: str, types: Sequence[SocketType], *, optional: bool = False, tooltip: str | None = None) -> Socket:
        """An input whose type is their names with commas between, as ComfyUI has it."""
        return Socket(id, ",".join(kind.io_type for kind in types), optional, tooltip)


class Hidden:
    """What ComfyUI tells a node of itself and its graph; nothing here."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"


@dataclass(frozen=True, slots=True)
class Schema:
    """What a node is called, takes and gives."""

    node_id: str
    display_name: str = ""
    category: str = ""
    description: str = ""
    search_aliases: Sequence[str] = ()
    inputs: Sequence[Socket] = ()
    outputs: Sequence[Output] = ()
    hidden: Sequence[str] = ()
    is_output_node: bool = False
    is_input_list: bool = False


class NodeOutput:
    """What a node gave: its outputs, and what a page would show of it."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class ComfyNode:
    """A node: `define_schema` and `execute` are class methods."""

    hidden = None

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def execute(cls, **inputs: Any) -> NodeOutput:
        raise NotImplementedError
