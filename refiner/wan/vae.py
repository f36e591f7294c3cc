"""Wan2.1's video VAE at any base width: encode, decode, and streaming decode."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .latent_statistics import (
    CHANNELS,
    LATENT_MEAN,
    LATENT_STD,
    channel_column,
    normalized,
    raw_latents,
)
from .vae_layers import CausalConv3d, Decoder, Encoder, StreamState

__all__ = [
    "CHANNELS",
    "LATENT_MEAN",
    "LATENT_STD",
    "DecoderState",
    "WanVAE",
    "normalized",
    "raw_latents",
]

# Pixels per pass: longer inputs go through in pieces, which bounds the activations.
PIXELS_AT_ONCE = 1 << 18


class DecoderState(StreamState):
    """State of a streaming decode; a new one starts a video."""


class WanVAE(nn.Module):
    """Wan2.1's VAE: 194 tensors, named as in the published file, of base width `dim`.

    Pixels are [B, 3, F, H, W] in [-1, 1] with F = 1 + 4n; latents are [B, 16, 1 + n, H/8, W/8],
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
        """Build a VAE of the weights' width; `options` are latent_mean and latent_std.

        Raises ValueError when the weights are not those of a Wan2.1 VAE.
        """
        gamma = weights.get("decoder.head.0.gamma")
        if gamma is None or not gamma.ndim:
            raise ValueError(
                f"{len(weights)} tensors without decoder.head.0.gamma:"
                " give the weights of a Wan2.1 VAE"
            )
        with torch.device("meta"):
            vae = cls(len(gamma))
        expected = vae.state_dict()
        wrong = [
            name
            for name, tensor in expected.items()
            if name not in weights or weights[name].shape != tensor.shape
        ]
        wrong += [name for name in weights if name not in expected]
        if wrong:
            raise ValueError(
                f"{len(wrong)} tensors are missing, unexpected or of another shape than in a Wan2.1"
                f" VAE of width {vae.dim} ({', '.join(wrong[:3])}): give the whole published file"
            )
        vae.load_state_dict(weights, assign=True)
        vae._set_statistics(**options)
        return vae

    def normalize(self, raw_BCFhw: Tensor) -> Tensor:
        """Normalise this VAE's raw latents."""
        return normalized(raw_BCFhw, self.latent_mean, self.latent_std)

    def denormalize(self, latents_BCFhw: Tensor) -> Tensor:
        """Undo `normalize`."""
        return raw_latents(latents_BCFhw, self.latent_mean, self.latent_std)

    def encode(self, pixels_BCFHW: Tensor) -> Tensor:
        """Return the normalised mean latents of pixels."""
        return self.normalize(self.moments(pixels_BCFHW)[0])

    def moments(self, pixels_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of raw latents; a long clip is encoded in pieces."""
        if pixels_BCFHW.ndim != 5 or pixels_BCFHW.shape[1] != 3 or 0 in pixels_BCFHW.shape:
            raise ValueError(
                f"pixels have shape {tuple(pixels_BCFHW.shape)},"
                " expected [batch, 3, frames, height, width]"
            )
        frames, height, width = pixels_BCFHW.shape[2:]
        if frames % 4 != 1 or height % 8 or width % 8:
            raise ValueError(
                f"pixels of {frames} frames, {height}x{width}:"
                " give 1 + 4n frames and sides that are multiples of 8"
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
        """Decode the next latents of a video: 1 frame for the first latent, 4 for each later one.

        `state` continues earlier calls and is updated; without one the latents are a whole video.
        Any split of latents into calls gives the same pixels. Pixels are not clamped, and overshoot
        [-1, 1] a little.
        """
        if (
            latents_BCFhw.ndim != 5
            or latents_BCFhw.shape[1] != self.z_dim
            or 0 in latents_BCFhw.shape
        ):
            raise ValueError(
                f"latents have shape {tuple(latents_BCFhw.shape)},"
                f" expected [batch, {self.z_dim}, frames, height, width]"
            )
        state = DecoderState() if state is None else state
        self._check_continues(latents_BCFhw, state)
        z = self.conv2(self.denormalize(latents_BCFhw).transpose(1, 2), state)
        step = max(1, PIXELS_AT_ONCE // (256 * z.shape[-2] * z.shape[-1]))
        return torch.cat(
            [self.decoder(piece, state) for piece in z.split(step, dim=1)], dim=1
        ).transpose(1, 2)

    def compile_decoder(self, compiler: Callable[[Callable], Callable]) -> None:
        """Compile the decoder, streaming state included, by a function that compiles functions.

        The first pieces of a video make up to four graphs, for the state grows; later videos of
        this size use them again.
        """
        self.decoder.forward = compiler(self.decoder.forward)

    def _check_continues(self, latents_BCFhw: Tensor, state: DecoderState) -> None:
        if not state.last:
            return
        past = state.last.get(self.decoder.conv1)
        if past is None or past[:, 0, 0].shape != latents_BCFhw[:, 0, 0].shape:
            raise ValueError(
                f"latents of shape {tuple(latents_BCFhw.shape)} do not continue this state, which"
                " is of another VAE, batch or size: start a video with a new DecoderState"
            )

    @staticmethod
    def state_bytes(dim: int, height: int, width: int, dtype: torch.dtype) -> int:
        """Return the size of a DecoderState for height x width pixels."""
        # Two frames before each 3-tap convolution, at 1/8, 1/4, 1/2 and full resolution.
        channels = (16 + 44 * dim) / 64 + 26 * dim / 16 + 12 * dim / 4 + 7 * dim
        return math.ceil(2 * height * width * channels * dtype.itemsize)

    @classmethod
    def decode_bytes(
        cls, dim: int, height: int, width: int, frames: int, dtype: torch.dtype
    ) -> int:
        """Estimate the peak memory of decoding `frames` latents to height x width pixels.

        Counts weights, state and activations.
        """
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in WanVAE(dim).decoder.parameters())
        area = height * width
        at_once = min(frames, max(1, PIXELS_AT_ONCE // (4 * area)))
        activations = 10 * dim * area * (4 * at_once + 2)  # last stage, as measured on the CPU
        return (weights + activations) * dtype.itemsize + cls.state_bytes(dim, height, width, dtype)


def _lengths(total: int, step: int) -> list[int]:
    """Cut `total` into pieces of `step`; the last may be shorter."""
    return [min(step, total - start) for start in range(0, max(total, 0), step)]
