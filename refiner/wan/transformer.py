"""Parameters of the Wan2.1 text-to-video transformer, named and shaped as in published files.

causal.py runs them. It needs only this layout, so it runs other module trees too.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from .linear import Linear

HEAD_DIM = 128  # in all published sizes; smaller models state their number of heads in metadata
PATCH = (1, 2, 2)
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class WanConfig:
    """Sizes of a Wan2.1 transformer; defaults are the published 1.3B model.

    Raises ValueError when the sizes do not fit together.
    """

    dim: int = 1536
    num_heads: int = 12
    ffn_dim: int = 8960
    num_layers: int = 30
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)}: a size must be at least 1"
                )
        if self.dim % self.num_heads:
            raise ValueError(
                f"width {self.dim} does not divide into {self.num_heads} heads: change num_heads"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"heads of {self.head_dim}: RoPE needs an even head size of at least 6,"
                " change num_heads"
            )
        if self.freq_dim % 2:
            raise ValueError(
                f"freq_dim {self.freq_dim} is odd: give an even number, as the timestep embedding"
                " has a cosine for each sine"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


WAN_TINY = WanConfig(dim=256, num_heads=2, ffn_dim=1024, num_layers=6)
WAN_1_3B = WanConfig()
WAN_14B = WanConfig(dim=5120, num_heads=40, ffn_dim=13824, num_layers=40)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, in fp32; the weight applies in x's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
        return (wide * torch.rsqrt(mean_square + EPS)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Parameters of one attention layer, self or cross."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)


class Block(nn.Module):
    """One transformer block: modulated self-attention, cross-attention, modulated feed-forward."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config.dim)
        self.norm3 = nn.LayerNorm(config.dim, eps=EPS)
        self.cross_attn = Attention(config.dim)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)


class Head(nn.Module):
    """Final modulated projection to patch values, channels fastest."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head = Linear(config.dim, config.out_dim * PATCH[0] * PATCH[1] * PATCH[2])
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)


class WanTransformer(nn.Module):
    """Wan2.1's module tree: 825 tensors at 1.3B, 1095 at 14B."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, kernel_size=PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, config.dim),
            nn.GELU(approximate="tanh"),
            Linear(config.dim, config.dim),
        )
        self.time_embedding = nn.Sequential(
            Linear(config.freq_dim, config.dim), nn.SiLU(), Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(config.dim, 6 * config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
