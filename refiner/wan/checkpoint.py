"""Published model files, identified and loaded without conversion.

info = inspect("self_forcing_dmd.pt")               # reads names and shapes only
model, info = load_transformer("longlive_base.pt", lora="lora.pt", dtype=torch.bfloat16)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .description import describe
from .inspection import (
    CheckpointInfo,
    add_loras,
    headers_by_name,
    inspect_weights,
    require_transformer,
)
from .layouts import INSTEAD, Layout
from .lora import LoraFile, LoraPair, check_targets, read_lora
from .stored import StoredWeights, as_comfyui_reads, stored_weights
from .transformer import WanTransformer
from .vae import CHANNELS
from .weight_file import WeightFile, choose_dtype, open_weights, save_safetensors

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "describe",
    "inspect",
    "load_transformer",
    "load_vae_state",
    "open_checkpoint",
    "read_transformer",
    "require_transformer",
    "save_safetensors",
]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open model file: what it is, and how to load it. A run opens each of its files once."""

    info: CheckpointInfo
    file: WeightFile
    layout: Layout
    loras: tuple[tuple[LoraFile, Mapping[str, LoraPair]], ...] = ()

    def transformer(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> tuple[WanTransformer, CheckpointInfo]:
        """Load the network, frozen and in eval mode, with its info completed by `merged_lora`.

        LoRAs are merged in fp32, one after the other; strength 0 changes nothing. `dtype` None
        keeps the stored one (of most bytes where mixed; bf16 for fp8). On the CPU, unconverted
        weights stay mapped from the file. Raises ValueError in one line for any other kind of file.
        """
        config, path = require_transformer(self.info), self.info.path
        stored = stored_weights(self.file, self.info.top_key, self.layout)
        with torch.device("meta"):
            model = WanTransformer(config)
        expected = model.state_dict()
        _check_tensors(expected, stored.headers, path)
        dtype = choose_dtype(dtype, stored.headers, path)
        for lora, pairs in self.loras:
            check_targets(pairs, expected, lora.path)
        state = {}
        for name in stored.names:
            changes = list(self._changes(name.removesuffix(".weight")))
            state[name] = _merge_and_cast(stored.read(name), changes, dtype, device)
        model.load_state_dict(state, assign=True)
        merged = sum(len(pairs) for _, pairs in self.loras) + len(stored.pairs)
        return model.eval().requires_grad_(False), replace(self.info, merged_lora=merged)

    def _changes(self, module: str) -> Iterator[tuple[LoraPair, float]]:
        for lora, pairs in self.loras:
            if module in pairs and lora.strength:
                yield pairs[module], lora.strength

    def stored_transformer(self) -> dict[str, Tensor]:
        """Return the weights as stored, mapped, by Wan's names, for a host with its own modules.

        Quantised weights stay so where ComfyUI reads them; other scaled fp8 becomes bf16. Raises
        ValueError in one line for any other kind of file, or an incomplete one.
        """
        config, info = require_transformer(self.info), self.info
        with torch.device("meta"):
            expected = WanTransformer(config).state_dict()
        missing = [name for name in expected if name not in self.layout.names]
        if missing:
            raise ValueError(_incomplete(info.path, missing))
        if self.layout.adapter or not as_comfyui_reads(self.file, info.top_key):
            stored = stored_weights(self.file, info.top_key, self.layout)
            dtype = choose_dtype(None, stored.headers, info.path)
            return {name: _as_one_dtype(stored, name, dtype) for name in stored.names}
        return {
            name: self.file.read(info.top_key, stored) for name, stored in self.layout.names.items()
        }

    def vae_width(self) -> int:
        """Return the base width of a Wan2.1 VAE; raise ValueError for any other kind of file."""
        return len(self._vae_headers()["decoder.head.0.gamma"])

    def vae_state(self) -> dict[str, Tensor]:
        """Return a Wan2.1 VAE's state dict: original names, on the CPU; errors as `vae_width`."""
        self._vae_headers()
        return {
            name: self.file.read(self.info.top_key, stored)
            for name, stored in self.layout.names.items()
        }

    def _vae_headers(self) -> dict[str, Tensor]:
        path, wanted = self.info.path, "Wan2.1_VAE.pth or ComfyUI's wan_2.1_vae.safetensors"
        if self.info.kind != "vae":
            raise ValueError(f"{path} is {INSTEAD[self.info.kind]}; the VAE is {wanted}")
        if self.info.naming != "wan":
            raise ValueError(f"{path} is a VAE in diffusers' names: pass {wanted}")
        headers = headers_by_name(self.file, self.info, self.layout)
        channels = headers["conv2.weight"].shape[:1] if "conv2.weight" in headers else ()
        if not headers["decoder.head.0.gamma"].ndim:
            raise ValueError(
                f"{path} is a VAE whose decoder.head.0.gamma is one number:"
                " it is damaged, download it again"
            )
        if channels != (CHANNELS,):
            raise ValueError(
                f"{path} is a VAE of {sum(channels)} latent channels and not Wan2.1's {CHANNELS}:"
                " pass Wan2.1_VAE.pth"
            )
        return headers


def open_checkpoint(
    path: Path | str, *, weights: str = "auto", lora: Sequence[LoraFile] = ()
) -> Checkpoint:
    """Open and identify a file without reading its tensors.

    `weights` is auto, ema (averaged) or raw, for files that have both. LoRAs are read in full, but
    until weights are loaded they only affect the preset. Raises ValueError in one line when a file
    cannot be opened safely or holds no tensors.
    """
    file = open_weights(path)
    info, layout = inspect_weights(file, weights)
    pairs = [read_lora(each.path) for each in lora]
    return Checkpoint(
        add_loras(info, lora, pairs), file, layout, tuple(zip(lora, pairs, strict=True))
    )


def inspect(
    path: Path | str, *, weights: str = "auto", lora: Sequence[LoraFile] = ()
) -> CheckpointInfo:
    """Identify a file, as `open_checkpoint` does."""
    return open_checkpoint(path, weights=weights, lora=lora).info


def load_transformer(
    path: Path | str,
    *,
    lora: Path | str | Sequence[LoraFile] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    weights: str = "auto",
) -> tuple[WanTransformer, CheckpointInfo]:
    """Load the network of a file, as `Checkpoint.transformer`."""
    files = [LoraFile(Path(lora))] if isinstance(lora, (str, Path)) else [*(lora or ())]
    return open_checkpoint(path, weights=weights, lora=files).transformer(
        dtype=dtype, device=device
    )


def read_transformer(
    path: Path | str, *, weights: str = "auto"
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Read the weights of a file, as `Checkpoint.stored_transformer`."""
    checkpoint = open_checkpoint(path, weights=weights)
    return checkpoint.stored_transformer(), checkpoint.info


def load_vae_state(path: Path | str) -> dict[str, Tensor]:
    """Read a VAE file, as `Checkpoint.vae_state`."""
    return open_checkpoint(path).vae_state()


def _as_one_dtype(stored: StoredWeights, name: str, dtype: torch.dtype) -> Tensor:
    """Read a weight in its stored dtype, or in `dtype` where it had to be computed."""
    tensor = stored.read(name)
    return tensor if tensor.dtype == stored.headers[name].dtype else tensor.to(dtype)


def _merge_and_cast(
    tensor: Tensor,
    loras: Sequence[tuple[LoraPair, float]],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    if not loras:
        return tensor.to(device=device, dtype=dtype)
    tensor = tensor.to(device)
    for pair, strength in loras:
        tensor = pair.merged(tensor, strength)
    return tensor.to(dtype)


def _check_tensors(expected: dict[str, Tensor], headers: dict[str, Tensor], path: Path) -> None:
    missing = [name for name in expected if name not in headers]
    extra = [name for name in headers if name not in expected]
    if missing:
        raise ValueError(_incomplete(path, missing))
    if scales := [name for name in extra if "scale" in name or "quant" in name]:
        raise ValueError(
            f"{path} has quantised weights in another format ({_few(scales)}):"
            " pass the bf16 or fp16 file"
        )
    if extra:
        raise ValueError(
            f"{path} has {len(extra)} tensors that Wan2.1 has not ({_few(extra)}):"
            " it is another model, pass a Wan2.1 text-to-video one"
        )
    for name, tensor in expected.items():
        if headers[name].shape != tensor.shape:
            raise ValueError(
                f"{path} has a {name} of {list(headers[name].shape)}, which should be"
                f" {list(tensor.shape)}: the file is damaged or another model"
            )


def _incomplete(path: Path, missing: list[str]) -> str:
    return (
        f"{path} lacks {len(missing)} tensors ({_few(missing)}):"
        " the file is not complete, download it again"
    )


def _few(names: list[str]) -> str:
    return ", ".join(name[:80] for name in names[:3]) + (", ..." if len(names) > 3 else "")
