"""The causal forward of Wan2.1, over any module tree with its layout.

It calls the tree's own submodules, so whatever sits in them (quantised weights, offloading, LoRA branches) keeps
working. Timesteps and positions come from the caller, frame by frame; the keys and values of the past from a `View`.

Shape suffixes: B batch, F latent frames, C channels, h w latent size, S tokens of a frame, N = F·S tokens of the call,
T keys, L text tokens, H heads, D head size, M width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .rope import rotate, rotation_table
from .transformer import EPS, PATCH, WanConfig
from .upload import remembered, upload


class KeyValue(NamedTuple):
    """Keys and values of one layer, both [B, T, H, D]."""

    key: Tensor
    value: Tensor


class View(Protocol):
    """What one forward sees of the past, and where its own keys and values go."""

    positions: Sequence[int]  # temporal RoPE position of each frame of the call
    first: int  # tokens at the call's start that do not see the rest of it; 0 where all see all

    def extend(self, layer: int, raw_key_BNHD: Tensor, value_BNHD: Tensor, table: Tensor) -> KeyValue:
        """Take the call's keys (before RoPE) and values; return all that its queries attend to, keys rotated.

        `table` [N, D/2] holds the rotations of the call's own tokens. Called once a layer and pass, and once more
        for each recomputation of a checkpointed layer.
        """
        ...


def attention(q_BNHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
    """Full softmax attention [B, N, H·D], scale D^-½, by torch's fused kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BTHD, v_BTHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def cast(parameter: Tensor, like: Tensor) -> Tensor:
    """A bare parameter in the dtype and on the device of `like`."""
    return parameter.to(like)


def embed(patch_embedding: nn.Module, x: Tensor) -> Tensor:
    """Latents [B, C, F, h, w] to patches [B, M, F, h/2, w/2], in the dtype of x."""
    return patch_embedding(x)


class Modulation(NamedTuple):
    """Shift and scale after a norm, and the gate of the branch; each [B or 1, F or 1, M]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulated_norm(x_BNM: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) · (1 + scale) + shift, per frame; one fused kernel when every frame has the same timestep."""
    width = x_BNM.shape[-1]
    if shift.shape[:2] == (1, 1):
        return F.layer_norm(x_BNM, (width,), 1 + scale[0, 0], shift[0, 0], EPS)
    x_BFSM = F.layer_norm(x_BNM, (width,), eps=EPS).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], x_BFSM, 1 + scale[:, :, None]).flatten(1, 2)


def gated_add(x_BNM: Tensor, branch_BNM: Tensor, gate: Tensor) -> Tensor:
    """x + gate · branch, per frame."""
    frames = gate.shape[1]
    return torch.addcmul(
        x_BNM.unflatten(1, (frames, -1)), branch_BNM.unflatten(1, (frames, -1)), gate[:, :, None]
    ).flatten(1, 2)


def timestep_features(t: Tensor, freq_dim: int) -> Tensor:
    """Cosines, then sines, of timesteps on the 0-1000 scale: [..., freq_dim], float64."""
    half = freq_dim // 2
    frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = t.double()[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


@remembered(64)
def known_features(t: tuple[float, ...], freq_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`timestep_features` [1, F, freq_dim] of these timesteps, on the device: sampling has few, again and again."""
    return upload(timestep_features(torch.tensor([t], dtype=torch.float64), freq_dim), device, dtype)


def features_of(t: Tensor, freq_dim: int, like: Tensor) -> Tensor:
    """`timestep_features` in the dtype and on the device of `like`."""
    if len(t) == 1 and t.device.type == "cpu":
        return known_features(tuple(t[0].tolist()), freq_dim, like.dtype, like.device)
    return upload(timestep_features(t, freq_dim), like.device, like.dtype)


def block_modulation(block: nn.Module, e0: Tensor, host: "Host") -> tuple[Modulation, Modulation]:
    """Of the self-attention and the feed-forward branch, from the projected time embedding [B, F, 6, M]."""
    rows = (host.cast(block.modulation, e0)[:, None] + e0).unbind(2)
    return Modulation(*rows[:3]), Modulation(*rows[3:])


Extend = Callable[[Tensor, Tensor, Tensor], KeyValue]


def attend(query_BNHD: Tensor, seen: KeyValue, first: int, host: "Host") -> Tensor:
    """Self-attention of a call; its `first` tokens do not see those behind them, in two calls and without a mask."""
    if not first:
        return host.attention(query_BNHD, seen.key, seen.value)
    known = seen.key.shape[1] - (query_BNHD.shape[1] - first)
    before = host.attention(query_BNHD[:, :first], seen.key[:, :known], seen.value[:, :known])
    return torch.cat((before, host.attention(query_BNHD[:, first:], seen.key, seen.value)), dim=1)


class Projected(NamedTuple):
    """What a block makes of its tokens before its self-attention."""

    query: Tensor  # rotated; like key and value [B, N, H, D]
    key: Tensor  # before RoPE
    value: Tensor
    gate: Tensor  # of the self-attention
    ffn: Modulation


def before_attention(block: nn.Module, x_BNM: Tensor, e0: Tensor, table: Tensor, heads: int, host: "Host") -> Projected:
    """A block's tokens [B, N, M] as queries, keys and values of its modulated self-attention."""
    attn_mod, ffn_mod = block_modulation(block, e0, host)
    h = modulated_norm(x_BNM, attn_mod.shift, attn_mod.scale)
    attn = block.self_attn
    query, key, value = (
        part.unflatten(-1, (heads, -1)) for part in (attn.norm_q(attn.q(h)), attn.norm_k(attn.k(h)), attn.v(h))
    )
    return Projected(rotate(query, table), key, value, attn_mod.gate, ffn_mod)


def after_attention(
    block: nn.Module, x_BNM: Tensor, attended_BNM: Tensor, gate: Tensor, ffn_mod: Modulation, text: KeyValue,
    heads: int, host: "Host",
) -> Tensor:  # fmt: skip
    """The rest of a block: the gated self-attention, cross-attention, modulated feed-forward (reference order)."""
    x = gated_add(x_BNM, block.self_attn.o(attended_BNM), gate)

    cross = block.cross_attn
    query = cross.norm_q(cross.q(block.norm3(x))).unflatten(-1, (heads, -1))
    x = x + cross.o(host.attention(query, text.key, text.value))

    return gated_add(x, block.ffn(modulated_norm(x, ffn_mod.shift, ffn_mod.scale)), ffn_mod.gate)


def text_keys(block: nn.Module, context_BLM: Tensor, heads: int) -> KeyValue:
    """A block's cross-attention keys and values of an embedded prompt."""
    cross = block.cross_attn
    return KeyValue(*(x.unflatten(-1, (heads, -1)) for x in (cross.norm_k(cross.k(context_BLM)), cross.v(context_BLM))))


def project(head: nn.Module, tokens_BNM: Tensor, e: Tensor, host: "Host") -> Tensor:
    """The final layer: patch values [B, N, P·C] of tokens."""
    shift, scale = (host.cast(head.modulation, e)[:, None] + e[:, :, None]).unbind(2)
    return head.head(modulated_norm(tokens_BNM, shift, scale))


def call(function: Callable, module: nn.Module, *arguments: object) -> object:
    """A function of a module that has no forward of its own."""
    return function(module, *arguments)


@dataclass(frozen=True, slots=True)
class Host:
    """What belongs to whoever loaded the modules: how attention is computed, where bare parameters lie, and in what
    dtype patches are embedded (ComfyUI keeps those weights in fp32). Training compiles the halves of a block, and where
    several processes share the parameters they gather a block's `within` what is computed of it."""

    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = attention
    cast: Callable[[Tensor, Tensor], Tensor] = cast
    embed: Callable[[nn.Module, Tensor], Tensor] = embed
    before: Callable[..., Projected] = before_attention
    after: Callable[..., Tensor] = after_attention
    within: Callable[..., Any] = call


def run_block(
    block: nn.Module, x_BNM: Tensor, e0: Tensor, table: Tensor, text: KeyValue, heads: int, extend: Extend,
    first: int, host: Host,
) -> Tensor:  # fmt: skip
    """One transformer block around the self-attention over what its view lets it see."""
    own = host.before(block, x_BNM, e0, table, heads, host)
    seen = extend(own.key, own.value, table)
    attended = attend(own.query, seen, first, host)
    return host.after(block, x_BNM, attended, own.gate, own.ffn, text, heads, host)


@dataclass(frozen=True, slots=True)
class CausalWan:
    """A loaded Wan2.1 module tree and how to run it.

    `checkpointing` recomputes each block in the backward pass instead of keeping its activations.
    """

    model: nn.Module
    config: WanConfig
    host: Host = Host()
    checkpointing: bool = False

    def text(self, context_BLE: Tensor) -> list[KeyValue]:
        """Cross-attention keys and values of a prompt, per layer: computed once and used by every pass.

        `context_BLE` [B, L, text_dim] is the text encoder's output as the model was trained on it: zeros after the
        prompt, up to text_len, and no mask.
        """
        if context_BLE.ndim != 3 or context_BLE.shape[-1] != self.config.text_dim:
            raise ValueError(
                f"context has shape {tuple(context_BLE.shape)}, this model takes [batch, tokens,"
                f" {self.config.text_dim}]: use the text encoder it was trained with"
            )
        context = self.model.text_embedding(context_BLE)
        heads, within = self.config.num_heads, self.host.within
        return [within(text_keys, block, context, heads) for block in self.model.blocks]

    def __call__(
        self, x: Tensor, t: Tensor, text: list[KeyValue], view: View, keys_only: bool = False
    ) -> Tensor | None:
        """The flow v = ε − x0 [B, C, F, h, w] of latents x [B, C, F, h, w]; the new K/V go into `view`.

        `t` is the timestep (0-1000) of each frame: [B, F], or [1, 1] when all are the same, which is faster.
        With `keys_only` nothing is returned and the last block stops after its keys: a pass that only writes memory.
        """
        _, channels, frames, height, width = x.shape
        if channels != self.config.in_dim or height % PATCH[1] or width % PATCH[2]:
            raise ValueError(
                f"latents have shape {tuple(x.shape)}, expected [batch, {self.config.in_dim}, frames, height, width]"
                " with even height and width: pixel sizes are multiples of 16"
            )
        if len(view.positions) != frames:
            raise ValueError(f"{frames} latent frames came with {len(view.positions)} positions: give one for each")
        model, heads = self.model, self.config.num_heads
        grid = (height // PATCH[1], width // PATCH[2])
        tokens = self.host.embed(model.patch_embedding, x).flatten(2).transpose(1, 2)
        e = model.time_embedding(features_of(t, self.config.freq_dim, like=tokens))
        e0 = model.time_projection(e).unflatten(-1, (6, -1))
        table = rotation_table(view.positions, *grid, self.config.head_dim, like=tokens)
        text = [KeyValue(*(part.expand(len(x), -1, -1, -1) for part in layer)) for layer in text]

        last = len(model.blocks) - 1
        for layer, block in enumerate(model.blocks):
            extend = partial(view.extend, layer)
            if keys_only and layer == last:
                own = self.host.within(self.host.before, block, tokens, e0, table, heads, self.host)
                extend(own.key, own.value, table)
                return None
            arguments = (run_block, block, tokens, e0, table, text[layer], heads, extend, view.first, self.host)
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(self.host.within, *arguments, use_reentrant=False)
            else:
                tokens = self.host.within(*arguments)
        out = self.host.within(project, model.head, tokens, e, self.host)
        return rearrange(out, "b (f h w) (p q c) -> b c f (h p) (w q)", h=grid[0], w=grid[1], p=PATCH[1], q=PATCH[2])
