"""Wan2.1's video VAE at any base width: encode, decode, and decode as latents come, from a state
the caller holds.

Inside, a video is [B, T, C, H, W]: a convolution over time is then one over space on stacked
neighbouring frames, which the CPU does 3 to 13 times as fast as a 3-D one for a chunk of one clip
(not for a batch, which PyTorch hands to oneDNN). Causal in time: nothing looks ahead, so any split
works.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Wan2.1's published statistics of each latent channel; inside the pack latents are (z - mean) /
# std.
# fmt: off
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on
CHANNELS = len(LATENT_MEAN)
WIDTHS = (1, 2, 4, 4)  # of the four resolutions, finest first, in units of the base width
PIXELS_AT_ONCE = (
    1 << 18
)  # of one pass: longer inputs go through in pieces, which bounds the activations


def channel_column(values: Sequence[float] | float, channels: int, name: str) -> Tensor:
    """One value, or one a channel, as [C, 1, 1, 1]; ValueError, which says their name, for another
    number of them."""
    column = torch.tensor(values, dtype=torch.float32)
    if column.numel() not in (1, channels):
        raise ValueError(
            f"{name} has {column.numel()} values: give one, or one a channel, of {channels}"
        )
    return column.expand(channels).reshape(-1, 1, 1, 1).clone()


def normalized(raw_BCFhw: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """The pack's latents of a VAE's raw ones; by Wan2.1's statistics unless given."""
    mean = channel_column(LATENT_MEAN, CHANNELS, "mean").to(raw_BCFhw) if mean is None else mean
    std = channel_column(LATENT_STD, CHANNELS, "std").to(raw_BCFhw) if std is None else std
    return (raw_BCFhw - mean) / std


def raw_latents(
    latents_BCFhw: Tensor, mean: Tensor | None = None, std: Tensor | None = None
) -> Tensor:
    """A VAE's raw latents of the pack's; by Wan2.1's statistics unless given."""
    mean = channel_column(LATENT_MEAN, CHANNELS, "mean").to(latents_BCFhw) if mean is None else mean
    std = channel_column(LATENT_STD, CHANNELS, "std").to(latents_BCFhw) if std is None else std
    return latents_BCFhw * std + mean


@dataclass(slots=True)
class StreamState:
    """What the next frames need of the past: the last inputs of every layer that looks back in
    time.

    The tensors are never written to, so a clone costs nothing and forks may go on from one state.
    """

    last: dict[nn.Module, Tensor] = field(default_factory=dict)

    def clone(self) -> "StreamState":
        """An independent state at the same place in the video."""
        return type(self)(dict(self.last))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.last.values())


class DecoderState(StreamState):
    """State of a streaming decode; a fresh one stands at the start of a video."""


def stacked_conv(x_BTCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution [O, C, K, kh, kw], valid in time and same in space, as one over K stacked
    frames."""
    taps = weight.shape[2]
    frames = x_BTCHW.shape[1] - taps + 1
    stack = (
        torch.cat([x_BTCHW[:, tap : tap + frames] for tap in range(taps)], dim=2)
        if taps > 1
        else x_BTCHW
    )
    flat = weight.transpose(1, 2).flatten(1, 2)
    out = F.conv2d(stack.flatten(0, 1), flat, bias, padding=weight.shape[3] // 2)
    return out.unflatten(0, (-1, frames))


def volume(x_BTCHW: Tensor) -> Tensor:
    """The same as [B, C, T, H, W]; on the CPU with the channels last in memory.

    With few channels a 3-D convolution's backward pass takes a third of the time so, and what is
    joined in this form need not be copied into it.
    """
    x = x_BTCHW.transpose(1, 2)
    return x.contiguous(memory_format=torch.channels_last_3d) if x.device.type == "cpu" else x


def volume_conv(x_BTCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same as one 3-D convolution, which takes a third of the memory."""
    side = weight.shape[3] // 2
    return F.conv3d(volume(x_BTCHW), weight, bias, padding=(0, side, side)).transpose(1, 2)


class CausalConv3d(nn.Conv3d):
    """A convolution that looks back in time only; before the first frame there are zeros."""

    def forward(self, x_BTCHW: Tensor, state: StreamState) -> Tensor:
        stacked = x_BTCHW.device.type == "cpu" and len(x_BTCHW) == 1
        back = self.kernel_size[0] - 1
        if back:
            past = state.last.get(self)
            past = zero_frames(x_BTCHW, back) if past is None else past
            if stacked:
                x_BTCHW = torch.cat((past, x_BTCHW), dim=1)
            else:
                x_BTCHW = torch.cat((volume(past), volume(x_BTCHW)), dim=2).transpose(1, 2)
            state.last[self] = x_BTCHW[
                :, -back:
            ].clone()  # a view would keep the whole activation alive
        return (stacked_conv if stacked else volume_conv)(x_BTCHW, self.weight, self.bias)


def zero_frames(x_BTCHW: Tensor, frames: int) -> Tensor:
    return x_BTCHW.new_zeros(x_BTCHW.shape[0], frames, *x_BTCHW.shape[2:])


class RMSNorm(nn.Module):
    """Channels scaled to unit root mean square; gamma is [C, 1, 1] or [C, 1, 1, 1]."""

    def __init__(self, dim: int, ones: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * ones))

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        # F.normalize takes 15 times as long on the CPU: its norm over a strided axis is not
        # vectorised.
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
        return run(self.residual, x, state) + (
            x if self.shortcut is None else self.shortcut(x, state)
        )


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
    """Half the height and width; with `in_time` half the frames too, but for the video's first,
    which stays."""

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
        """Every second frame, from itself and its two neighbours before."""
        weight = self.time_conv.weight[..., 0, 0]
        taps = torch.cat([x[:, tap : x.shape[1] - 2 + tap : 2] for tap in range(3)], dim=2)
        flat = weight.transpose(1, 2).flatten(1)[..., None, None]
        return F.conv2d(taps.flatten(0, 1), flat, self.time_conv.bias).unflatten(0, (len(x), -1))


class Upsample(nn.Module):
    """Twice the height and width, half the channels; with `in_time` twice the frames but for the
    video's first.

    That first frame is no part of the history of those behind it, which begins with zeros.
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
    """The layers in turn, with the state for those that take it."""
    for layer in layers:
        x = layer(x, state) if isinstance(layer, STATEFUL) else layer(x)
    return x


class Coder(nn.Module):
    """What encoder and decoder share: conv1, a column of stages, a middle, a head."""

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


class WanVAE(nn.Module):
    """Wan2.1's VAE: 194 tensors named as in the published file. `dim` is the base width (96 as
    published).

    Pixels are [B, 3, F, H, W] in [-1, 1] with F = 1 + 4n; latents [B, 16, 1 + n, H/8, W/8],
    normalised.
    """

    def __init__(
        self,
        dim: int = 96,
        z_dim: int = 16,
        latent_mean: Sequence[float] | float = LATENT_MEAN,
        latent_std: Sequence[float] | float = LATENT_STD,
    ) -> None:
        super().__init__()
        self.dim, self.z_dim = dim, z_dim
        self.encoder = Encoder(dim, z_dim)
        self.conv1 = CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim)
        self._set_statistics(latent_mean, latent_std)

    def _set_statistics(
        self,
        latent_mean: Sequence[float] | float = LATENT_MEAN,
        latent_std: Sequence[float] | float = LATENT_STD,
    ) -> None:
        for name, values in (("latent_mean", latent_mean), ("latent_std", latent_std)):
            self.register_buffer(name, channel_column(values, self.z_dim, name), persistent=False)

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Tensor], **options) -> "WanVAE":
        """A VAE of the width that the weights have; ValueError when they are not a Wan2.1 VAE's.

        `options` are latent_mean and latent_std.
        """
        gamma = weights.get("decoder.head.0.gamma")
        if gamma is None or not gamma.ndim:
            raise ValueError(
                f"{len(weights)} tensors without decoder.head.0.gamma: give the weights of a Wan2.1 VAE"
            )
        with torch.device("meta"):
            vae = cls(len(gamma))
        own = vae.state_dict()
        wrong = [
            name
            for name, tensor in own.items()
            if name not in weights or weights[name].shape != tensor.shape
        ]
        wrong += [name for name in weights if name not in own]
        if wrong:
            raise ValueError(
                f"{len(wrong)} tensors are missing, foreign or not as a Wan2.1 VAE of width {vae.dim} has them"
                f" ({', '.join(wrong[:3])}): give the whole published file"
            )
        vae.load_state_dict(weights, assign=True)
        vae._set_statistics(**options)
        return vae

    def normalize(self, raw_BCFhw: Tensor) -> Tensor:
        """The pack's latents of this VAE's raw ones."""
        return normalized(raw_BCFhw, self.latent_mean, self.latent_std)

    def denormalize(self, latents_BCFhw: Tensor) -> Tensor:
        """This VAE's raw latents of the pack's."""
        return raw_latents(latents_BCFhw, self.latent_mean, self.latent_std)

    def encode(self, pixels_BCFHW: Tensor) -> Tensor:
        """Normalised mean latents of pixels."""
        return self.normalize(self.moments(pixels_BCFHW)[0])

    def moments(self, pixels_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents of pixels, before normalisation; a long clip goes in
        pieces."""
        if pixels_BCFHW.ndim != 5 or pixels_BCFHW.shape[1] != 3 or 0 in pixels_BCFHW.shape:
            raise ValueError(
                f"pixels have shape {tuple(pixels_BCFHW.shape)}, expected [batch, 3, frames, height, width]"
            )
        frames, height, width = pixels_BCFHW.shape[2:]
        if frames % 4 != 1 or height % 8 or width % 8:
            raise ValueError(
                f"pixels of {frames} frames, {height}x{width}: give 1 + 4n frames and sides that are multiples of 8"
            )
        state = StreamState()
        step = 4 * max(1, PIXELS_AT_ONCE // (4 * height * width))
        lengths = [1 + min(step, frames - 1), *_lengths(frames - 1 - step, step)]
        pieces = pixels_BCFHW.transpose(1, 2).split(lengths, dim=1)
        moments = torch.cat(
            [self.conv1(self.encoder(piece, state), state) for piece in pieces], dim=1
        )
        return moments.transpose(1, 2).chunk(2, dim=1)

    def decode(self, latents_BCFhw: Tensor, state: DecoderState | None = None) -> Tensor:
        """Pixels of the next latents of a video: 1 frame for its first latent, 4 for each later
        one.

        `state` carries on from the calls before and is brought up to date; without one a video
        starts and ends here. Any split of latents into calls gives the same pixels. They are not
        clamped: a decoder overshoots a little.
        """
        if (
            latents_BCFhw.ndim != 5
            or latents_BCFhw.shape[1] != self.z_dim
            or 0 in latents_BCFhw.shape
        ):
            raise ValueError(
                f"latents have shape {tuple(latents_BCFhw.shape)}, expected [batch, {self.z_dim}, frames, height,"
                " width]"
            )
        state = DecoderState() if state is None else state
        self._check_continues(latents_BCFhw, state)
        z = self.conv2(self.denormalize(latents_BCFhw).transpose(1, 2), state)
        step = max(1, PIXELS_AT_ONCE // (256 * z.shape[-2] * z.shape[-1]))
        return torch.cat(
            [self.decoder(piece, state) for piece in z.split(step, dim=1)], dim=1
        ).transpose(1, 2)

    def _check_continues(self, latents_BCFhw: Tensor, state: DecoderState) -> None:
        if not state.last:
            return
        past = state.last.get(self.decoder.conv1)
        if past is None or past[:, 0, 0].shape != latents_BCFhw[:, 0, 0].shape:
            raise ValueError(
                f"latents of shape {tuple(latents_BCFhw.shape)} do not go on from a state of another VAE, batch or"
                " size: begin a video with a fresh DecoderState"
            )

    @staticmethod
    def state_bytes(dim: int, height: int, width: int, dtype: torch.dtype) -> int:
        """What a DecoderState of height x width pixels holds."""
        # Two frames before each 3-tap convolution, at 1/8, 1/4, 1/2 and full resolution.
        values = (
            2 * height * width * ((16 + 44 * dim) / 64 + 26 * dim / 16 + 12 * dim / 4 + 7 * dim)
        )
        return math.ceil(values * dtype.itemsize)

    @classmethod
    def decode_bytes(
        cls, dim: int, height: int, width: int, frames: int, dtype: torch.dtype
    ) -> int:
        """About the most that decoding `frames` latents of height x width pixels holds: weights,
        state, activations."""
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in WanVAE(dim).decoder.parameters())
        area = height * width
        at_once = min(frames, max(1, PIXELS_AT_ONCE // (4 * area)))
        activations = (
            10 * dim * area * (4 * at_once + 2)
        )  # of the last stage, as measured on the CPU
        return (weights + activations) * dtype.itemsize + cls.state_bytes(dim, height, width, dtype)


def _lengths(total: int, step: int) -> list[int]:
    """`total` cut into pieces of `step`, the last maybe shorter."""
    return [min(step, total - start) for start in range(0, max(total, 0), step)]
