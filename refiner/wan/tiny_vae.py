"""TAEHV, a tiny decoder of Wan2.1's latents: rough pictures for previews.

Convolutions see one frame; only memory blocks look back, each by one frame.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .latent_statistics import CHANNELS, raw_latents
from .vae_layers import StreamState, zero_frames
from .weight_file import FLAT, open_weights

WIDTHS = (256, 128, 64, 64)  # channels of the three stages and of the output, as published
STRIDES = (1, 2, 2)  # frames that a stage makes of one; each also doubles height and width
BLOCKS = 3  # memory blocks of a stage
ENDS = (8, 14, 20)  # the last layer of each stage
MOST_WIDTH = 1024
ACTIVATIONS_AT_ONCE = 1 << 24  # elements: more frames go through in pieces


class SoftClamp(nn.Module):
    """Bound latents softly to ±3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class MemoryBlock(nn.Module):
    """relu(x + three convolutions of x and the frame before); zeros before the first frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(2 * width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width)
        )

    def forward(self, x_BTCHW: Tensor, state: StreamState) -> Tensor:
        before = state.last.get(self)
        before = zero_frames(x_BTCHW, 1) if before is None else before
        state.last[self] = x_BTCHW[:, -1:].clone()  # a view would keep all frames alive
        past = torch.cat((before, x_BTCHW[:, :-1]), dim=1)
        change = self.conv(torch.cat((x_BTCHW, past), dim=2).flatten(0, 1))
        return F.relu(x_BTCHW + change.unflatten(0, (len(x_BTCHW), -1)))


class Grow(nn.Module):
    """Make `stride` frames of each frame."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, stride * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


def _width(weights: Mapping[str, Tensor], name: str) -> int:
    """Return the outputs of a convolution; ValueError for another tensor."""
    shape = list(weights[name].shape) if name in weights else []
    if len(shape) != 4 or not 1 <= shape[0] <= MOST_WIDTH:
        raise ValueError(f"{name} is missing or of shape {shape}")
    return shape[0]


def conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class TinyVAE(nn.Module):
    """A decoder of latents [B, 16, f, H/8, W/8] to pixels [B, 3, F, H, W] in about [-1, 1].

    Names of tensors are those of the published file. With `raw`, the weights expect latents without
    normalisation; `decode` takes normalised ones all the same.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, raw: bool = False) -> None:
        super().__init__()
        self.raw = raw
        layers = [SoftClamp(), conv(CHANNELS, widths[0]), nn.ReLU()]
        for (width, outputs), stride in zip(pairwise(widths), STRIDES, strict=True):
            layers += [MemoryBlock(width) for _ in range(BLOCKS)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, stride)]
            layers.append(conv(width, outputs, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), conv(widths[-1], 3))

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Tensor], raw: bool = False) -> "TinyVAE":
        """Build a decoder of the weights' sizes; ValueError when they are of another model.

        An encoder beside it is ignored.
        """
        weights = {name: tensor for name, tensor in weights.items() if name.startswith("decoder.")}
        widths = [_width(weights, f"decoder.{index}.weight") for index in (1, *ENDS)]
        with torch.device("meta"):
            tiny = cls(widths, raw)
        expected = tiny.state_dict()
        wrong = [
            name
            for name in expected.keys() | weights.keys()
            if name not in weights
            or name not in expected
            or weights[name].shape != expected[name].shape
            or not weights[name].is_floating_point()
        ]
        if wrong:
            raise ValueError(
                f"{len(wrong)} tensors are missing, unexpected or of another shape"
                f" ({', '.join(name[:80] for name in sorted(wrong)[:3])})"
            )
        tiny.load_state_dict(weights, assign=True)
        return tiny.eval().requires_grad_(False)

    def decode(self, latents_BCfhw: Tensor, state: StreamState | None = None) -> Tensor:
        """Decode the next latents of a video: 1 frame for the first latent, 4 for each later one.

        `state` continues earlier calls and is updated; without one the latents start a video.
        """
        shape = tuple(latents_BCfhw.shape)
        if len(shape) != 5 or shape[1] != CHANNELS or 0 in shape:
            raise ValueError(
                f"latents have shape {shape}, expected [batch, {CHANNELS}, frames, height, width]"
            )
        state = StreamState() if state is None else state
        starts = not state.last
        latents = raw_latents(latents_BCfhw) if self.raw else latents_BCfhw
        frames = self._run(0, latents.to(self.decoder[1].weight).transpose(1, 2), state)
        pixels = 2 * frames.transpose(1, 2) - 1
        return pixels[:, :, 3:] if starts else pixels

    def _run(self, index: int, x_BTCHW: Tensor, state: StreamState) -> Tensor:
        """Run the layers from `index` on; large inputs in pieces, which bounds the activations."""
        x = x_BTCHW
        for at, layer in enumerate(self.decoder[index:], index):
            pieces = x.split(max(1, ACTIVATIONS_AT_ONCE // x[:, 0].numel()), dim=1)
            if len(pieces) > 1:
                return torch.cat([self._run(at, piece, state) for piece in pieces], dim=1)
            if isinstance(layer, MemoryBlock):
                x = layer(x, state)
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, (len(x), -1))
        return x


def load_tiny_vae(path: Path | str, raw: bool = False) -> TinyVAE:
    """Load a decoder from a safetensors file as stored; ValueError in one line for another file."""
    file = open_weights(path)
    try:
        if file.container != "safetensors":
            raise ValueError("it is no .safetensors file")
        headers = file.groups.get(FLAT, {})
        TinyVAE.from_state_dict(headers, raw)  # before anything is read
        names = [name for name in headers if name.startswith("decoder.")]
        return TinyVAE.from_state_dict({name: file.read(FLAT, name) for name in names}, raw)
    except ValueError as error:
        raise ValueError(
            f"{path} is no tiny decoder of Wan2.1 ({error}): pass taew2_1.safetensors"
        ) from error
