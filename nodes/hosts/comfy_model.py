"""A MODEL of ComfyUI: its attachments, its network, and what is known of it."""

import comfy.ldm.wan.model
import comfy.model_management as management
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...refiner.acceleration import Acceleration
from ...refiner.schedule import PRESETS
from ...refiner.wan.transformer import WanConfig
from ..run import CHANNELS, ModelFacts
from . import comfy_layers

PRESET = "autorefiner.preset"  # attachment of a MODEL: its preset's name
SIZE = "autorefiner.size"  # attachment of a MODEL: the width and height that it was made for
ACCELERATION = "autorefiner.acceleration"  # attachment of a MODEL: an Acceleration
BASE = "autorefiner.base"  # attachment of a MODEL: the fingerprint of its file


def network_of(model: ModelPatcher) -> nn.Module:
    """Return the Wan2.1 text-to-video module tree of a MODEL; ValueError for another model."""
    network = model.model.diffusion_model
    kind = type(model.model).__name__
    causal = isinstance(network, comfy.ldm.wan.model.WanModel) and network.in_dim == CHANNELS
    if not causal or network.model_type != "t2v" or hasattr(network, "vace_blocks"):
        raise ValueError(
            f"MODEL is a {kind} and not Wan2.1 text-to-video: use Load AR-VDM with an AR model's"
            " file"
        )
    return network


def facts(model: ModelPatcher) -> ModelFacts:
    network = network_of(model)
    config = WanConfig(**{name: getattr(network, name) for name in WanConfig.__dataclass_fields__})
    preset = model.get_attachment(PRESET)
    options = model.model_options.get("transformer_options", {})
    return ModelFacts(
        config,
        dtype=model.model.get_dtype_inference(),
        preset=preset if preset in PRESETS else None,
        device_bytes=int(management.get_total_memory(model.load_device)),
        start=options.get("ar_config", {}).get("initial_latent"),  # set by core's ARVideoI2V
        device=model.load_device,
        size=model.get_attachment(SIZE),
        acceleration=model.get_attachment(ACCELERATION) or Acceleration(),
    )


def accelerated(model: ModelPatcher, acceleration: Acceleration) -> ModelPatcher:
    """Clone the MODEL with an acceleration of its runs."""
    model = model.clone()
    model.set_attachments(ACCELERATION, acceleration)
    return model


def base_of(model: ModelPatcher) -> str | None:
    """Return the fingerprint from loading, or of the live weights of another loader's MODEL."""
    return model.get_attachment(BASE) or comfy_layers.fingerprint_of_live(network_of(model))
