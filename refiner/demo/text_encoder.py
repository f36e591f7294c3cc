"""The sprites' text encoder: a small transformer over the world's closed vocabulary."""

import torch
from torch import Tensor, nn

from .captions import MOST_WORDS, vocabulary, words

UNKNOWN = "?"


class SpriteTextEncoder(nn.Module):
    """Encodes captions to [B, text_len, dim], zero-padded like Wan2.1's umT5 output."""

    def __init__(
        self, dim: int = 128, text_len: int = MOST_WORDS, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.text_len, self.text_dim = text_len, dim
        self.words = (UNKNOWN, *vocabulary())
        self.numbers = {word: number for number, word in enumerate(self.words)}
        self.embedding = nn.Embedding(len(self.words), dim)
        self.position = nn.Parameter(torch.randn(text_len, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return word numbers [B, text_len], truncated, and a mask of those that are words."""
        ids = torch.zeros(len(prompts), self.text_len, dtype=torch.long)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            numbers = [self.numbers.get(word, 0) for word in words(prompt)][: self.text_len]
            ids[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
            real[row, : len(numbers)] = True
        return ids, real

    def forward(self, prompts: list[str]) -> Tensor:
        device = self.position.device
        ids, real = (tensor.to(device) for tensor in self.tokens(prompts))
        x = self.embedding(ids) + self.position
        # An empty prompt attends to its padding, whose output is zeroed with the rest.
        x = self.layers(x, src_key_padding_mask=~real & real.any(1, keepdim=True))
        return self.norm(x) * real[..., None]
