"""Layers of Wan2.1's video VAE, and its encoder and decoder.

Tensors are [B, T, C, H, W], so that a convolution over time is one over space on stacked
neighbouring frames. For one clip on the CPU that is 3 to 13 times as fast as a 3-D convolution; a
batch uses the 3-D one, which PyTorch hands to oneDNN. All layers are causal in time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
WIDTHS = (1, 2, 4, 4)  # of the four resolutions, finest first, in multiples of the base width


@dataclass(slots=True)
class StreamState:
    """Past that the next frames need: the last inputs of each layer that looks back in time.

    The tensors are never written to, so clones share them.
    """

    last: dict[nn.Module, Tensor] = field(default_factory=dict)

    def clone(self) -> "StreamState":
        """Return an independent state at the same point of the video."""
        return type(self)(dict(self.last))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.last.values())


def stacked_conv(x_BTCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve with weight [O, C, K, kh, kw] in 2-D, over K frames stacked as channels.

    Padding is none in time and "same" in space.
    """
    taps = weight.shape[2]
    frames = x_BTCHW.shape[1] - taps + 1
    stack = x_BTCHW
    if taps > 1:
        stack = torch.cat([x_BTCHW[:, tap : tap + frames] for tap in range(taps)], dim=2)
    flat = weight.transpose(1, 2).flatten(1, 2)
    out = F.conv2d(stack.flatten(0, 1), flat, bias, padding=weight.shape[3] // 2)
    return out.unflatten(0, (-1, frames))


def volume(x_BTCHW: Tensor, weight: Tensor) -> Tensor:
    """Return x as [B, C, T, H, W]; on the CPU, or as the weight, with channels last in memory.

    With few channels this cuts the time of a 3-D convolution's backward pass on the CPU to a third,
    and tensors concatenated in this format need no copy.
    """
    x = x_BTCHW.transpose(1, 2)
    last = weight.is_contiguous(memory_format=torch.channels_last_3d)
    if x.device.type == "cpu" or (last and not weight.is_contiguous()):
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x


def volume_conv(x_BTCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `stacked_conv` as one 3-D convolution, which takes a third of the memory."""
    side = weight.shape[3] // 2
    return F.conv3d(volume(x_BTCHW, weight), weight, bias, padding=(0, side, side)).transpose(1, 2)


def channels_last(module: Module) -> Module:
    """Store weights of convolutions with channels last in memory; activations follow.

    Tensor cores convolve half precision in this format; cuDNN converts any other to it and back.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    return module


class CausalConv3d(nn.Conv3d):
    """Convolution over the present and past frames; zeros before the first frame."""

    def forward(self, x_BTCHW: Tensor, state: StreamState) -> Tensor:
        stacked = x_BTCHW.device.type == "cpu" and len(x_BTCHW) == 1
        back = self.kernel_size[0] - 1
        if back:
            past = state.last.get(self)
            past = zero_frames(x_BTCHW, back) if past is None else past
            if stacked:
                x_BTCHW = torch.cat((past, x_BTCHW), dim=1)
            else:
                pieces = (volume(each, self.weight) for each in (past, x_BTCHW))
                x_BTCHW = torch.cat(tuple(pieces), dim=2).transpose(1, 2)
            # Clone, as a view would keep the whole activation alive.
            state.last[self] = x_BTCHW[:, -back:].clone()
        return (stacked_conv if stacked else volume_conv)(x_BTCHW, self.weight, self.bias)


def zero_frames(x_BTCHW: Tensor, frames: int) -> Tensor:
    return x_BTCHW.new_zeros(x_BTCHW.shape[0], frames, *x_BTCHW.shape[2:])


class RMSNorm(nn.Module):
    """Scale channels to unit root mean square; gamma is [C, 1, 1] or [C, 1, 1, 1]."""

    def __init__(self, dim: int, ones: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * ones))

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        # Not F.normalize, which takes 15 times as long on the CPU: its norm over a strided axis is
        # not vectorised.
        squares = x_BTCHW.square() if x_BTCHW.dtype != torch.float16 else x_BTCHW.float().square()
        inverse = squares.sum(dim=2, keepdim=True).clamp_min(1e-24).rsqrt().to(x_BTCHW.dtype)
        return x_BTCHW * inverse * (len(self.gamma) ** 0.5 * self.gamma.reshape(-1, 1, 1))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(dim_in, 3), nn.SiLU(), CausalConv3d(dim_in, dim_out, 3),
            RMSNorm(dim_out, 3), nn.SiLU(), nn.Identity(), CausalConv3d(dim_out, dim_out, 3),
        )  # fmt: skip
        self.shortcut = CausalConv3d(dim_in, dim_out, 1) if dim_in != dim_out else None

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x, state)
        return run(self.residual, x, state) + shortcut


class FrameAttention(nn.Module):
    """Single-head attention within each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        batch, _, _, height, _ = x.shape
        tokens = rearrange(
            self.to_qkv(self.norm(x).flatten(0, 1)), "n (three c) h w -> three n 1 (h w) c", three=3
        )
        out = rearrange(F.scaled_dot_product_attention(*tokens), "n 1 (h w) c -> n c h w", h=height)
        return x + self.proj(out).unflatten(0, (batch, -1))


class Downsample(nn.Module):
    """Halve height and width; with `in_time` also the frames after the video's first."""

    def __init__(self, dim: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        x = self.resample(x.flatten(0, 1)).unflatten(0, (len(x), -1))
        if self.time_conv is None:
            return x
        past = state.last.get(self)
        state.last[self] = x[:, -1:].clone()
        if past is not None:
            return self._halved(torch.cat((past, x), dim=1))
        return torch.cat((x[:, :1], self._halved(x)), dim=1) if x.shape[1] > 1 else x

    def _halved(self, x: Tensor) -> Tensor:
        """Convolve over three frames with stride 2."""
        weight = self.time_conv.weight[..., 0, 0]
        taps = torch.cat([x[:, tap : x.shape[1] - 2 + tap : 2] for tap in range(3)], dim=2)
        flat = weight.transpose(1, 2).flatten(1)[..., None, None]
        return F.conv2d(taps.flatten(0, 1), flat, self.time_conv.bias).unflatten(0, (len(x), -1))


class Upsample(nn.Module):
    """Double height and width, halve channels; with `in_time` double the frames after the first.

    The video's first frame stays out of the history of later frames, which starts with zeros.
    """

    def __init__(self, dim: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"),
            nn.Conv2d(dim, dim // 2, 3, padding=1),
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        if self.time_conv is not None:
            x = self._doubled(x, state)
        return self.resample(x.flatten(0, 1)).unflatten(0, (len(x), -1))

    def _doubled(self, x: Tensor, state: StreamState) -> Tensor:
        first, rest = x[:, :0], x
        if self.time_conv not in state.last:
            first, rest = x[:, :1], x[:, 1:]
            state.last[self.time_conv] = zero_frames(x, 2)
        if not rest.shape[1]:
            return first
        pairs = rearrange(self.time_conv(rest, state), "b t (two c) h w -> b (t two) c h w", two=2)
        return torch.cat((first, pairs), dim=1)


STATEFUL = (CausalConv3d, ResidualBlock, FrameAttention, Downsample, Upsample)


def run(layers: nn.Sequential, x: Tensor, state: StreamState) -> Tensor:
    """Run layers in order; those that look back in time also take the state."""
    for layer in layers:
        x = layer(x, state) if isinstance(layer, STATEFUL) else layer(x)
    return x


class Coder(nn.Module):
    """Layers that encoder and decoder share: conv1, middle and head."""

    def __init__(self, channels: tuple[int, int], widths: Sequence[int]) -> None:
        super().__init__()
        first, last, middle = widths[0], widths[-1], max(widths)
        self.conv1 = CausalConv3d(channels[0], first, 3)
        self.middle = nn.Sequential(
            ResidualBlock(middle, middle), FrameAttention(middle), ResidualBlock(middle, middle)
        )
        self.head = nn.Sequential(RMSNorm(last, 3), nn.SiLU(), CausalConv3d(last, channels[1], 3))


class Encoder(Coder):
    def __init__(self, dim: int, z_dim: int) -> None:
        widths = [dim, *(dim * factor for factor in WIDTHS)]
        super().__init__((3, 2 * z_dim), widths)
        layers: list[nn.Module] = []
        for stage, (dim_in, dim_out) in enumerate(pairwise(widths)):
            layers += [ResidualBlock(dim_in, dim_out), ResidualBlock(dim_out, dim_out)]
            if stage < 3:
                layers.append(Downsample(dim_out, in_time=stage > 0))
        self.downsamples = nn.Sequential(*layers)

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        x = run(self.downsamples, self.conv1(x, state), state)
        return run(self.head, run(self.middle, x, state), state)


class Decoder(Coder):
    def __init__(self, dim: int, z_dim: int) -> None:
        widths = [dim * factor for factor in (WIDTHS[-1], *reversed(WIDTHS))]
        super().__init__((z_dim, 3), widths)
        layers: list[nn.Module] = []
        for stage, (dim_in, dim_out) in enumerate(pairwise(widths)):
            dim_in = dim_in // 2 if stage else dim_in  # an upsample halved the channels
            layers += [
                ResidualBlock(dim_in, dim_out),
                *(ResidualBlock(dim_out, dim_out) for _ in range(2)),
            ]
            if stage < 3:
                layers.append(Upsample(dim_out, in_time=stage < 2))
        self.upsamples = nn.Sequential(*layers)

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        x = run(self.middle, self.conv1(x, state), state)
        return run(self.head, run(self.upsamples, x, state), state)
