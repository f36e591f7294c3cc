"""Stand-in for the part of ComfyUI's node API (comfy_api.latest.io) that the pack uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Socket:
    """An input. `min`, `max` and `options` are checked before a workflow runs."""

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
    io_type: str
    display_name: str | None = None
    tooltip: str | None = None


@dataclass(frozen=True, slots=True)
class SocketType:
    """A socket type; arguments that only change how a widget looks are ignored."""

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
        extra_dict: dict[str, Any] | None = None,
    ) -> Socket:
        choices = None if options is None else tuple(options)
        return Socket(id, self.io_type, optional, tooltip, default, min, max, choices)

    def Output(self, *, display_name: str | None = None, tooltip: str | None = None) -> Output:
        return Output(self.io_type, display_name, tooltip)


Custom = SocketType
Int, Float, String = (SocketType(name) for name in ("INT", "FLOAT", "STRING"))
Boolean, Combo = (SocketType(name) for name in ("BOOLEAN", "COMBO"))
Model, Clip, Vae, Conditioning = (
    SocketType(name) for name in ("MODEL", "CLIP", "VAE", "CONDITIONING")
)
Latent, Image, Mask, Video = (SocketType(name) for name in ("LATENT", "IMAGE", "MASK", "VIDEO"))
Sampler = SocketType("SAMPLER")


class MultiType:
    """A socket that takes one of several types."""

    @staticmethod
    def Input(
        id: str,
        types: Sequence[SocketType],
        *,
        optional: bool = False,
        tooltip: str | None = None,
    ) -> Socket:
        """An input whose type is the names joined by commas, as in ComfyUI."""
        return Socket(id, ",".join(kind.io_type for kind in types), optional, tooltip)


class Hidden:
    """Names of what ComfyUI passes to a node about itself and its graph; unused here."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"


@dataclass(frozen=True, slots=True)
class Schema:
    """A node's names, inputs and outputs."""

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
    """A node's outputs, and in `ui` what a page would show."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class ComfyNode:
    """Base of nodes; `hidden` is set by ComfyUI only."""

    hidden = None

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def execute(cls, **inputs: Any) -> NodeOutput:
        raise NotImplementedError
