"""The causal forward of Wan2.1, over any module tree with its layout.

It calls the tree's own submodules, so whatever sits in them (quantised weights, offloading, LoRA
branches) keeps working. Timesteps and positions come from the caller, frame by frame; the keys and
values of the past from a `View`.

Shape suffixes: B batch, F latent frames, C channels, h w latent size, S tokens of a frame, N = F·S
tokens of the call, T keys, L text tokens, H heads, D head size, M width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


class Seen(NamedTuple):
    """What one group of heads attends to. A list of them covers all heads, in order."""

    heads: slice
    key: Tensor  # [B, T, H', D], rotated; T may differ between groups
    value: Tensor  # [B, T, H', D]
    bias: Tensor | None = None  # added to the scores, [B or 1, 1, 1, T]


class View(Protocol):
    """What one forward sees of the past, and where its own keys and values go."""

    positions: Sequence[int]  # temporal RoPE position of each frame of the call
    first: int  # tokens at the call's start that do not see the rest of it; 0 where all see all

    def extend(
        self,
        layer: int,
        raw_key_BNHD: Tensor,
        value_BNHD: Tensor,
        table: Tensor,
        raw_query_BNHD: Tensor | None = None,
    ) -> KeyValue | list[Seen] | None:
        """Take the call's keys and values; return what its queries attend to, keys rotated.

        Keys and queries come before RoPE; `table` [N, D/2] holds the rotations of the call's own
        tokens. Without a query nothing is read and None returned. Called once a layer and pass, and
        once more for each recomputation of a checkpointed layer.
        """
        ...


def attention(q_BNHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention [B, N, H·D], scale D^-½, by torch's fused kernel; `bias` is added to the
    scores."""
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BTHD, v_BTHD))
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


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
    """LayerNorm(x) · (1 + scale) + shift, per frame; one fused kernel when every frame has the same
    timestep."""
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
def known_features(
    t: tuple[float, ...], freq_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`timestep_features` [1, F, freq_dim] of these timesteps, on the device: sampling has few,
    again and again."""
    return upload(
        timestep_features(torch.tensor([t], dtype=torch.float64), freq_dim), device, dtype
    )


def features_of(t: Tensor, freq_dim: int, like: Tensor) -> Tensor:
    """`timestep_features` in the dtype and on the device of `like`."""
    if len(t) == 1 and t.device.type == "cpu":
        return known_features(tuple(t[0].tolist()), freq_dim, like.dtype, like.device)
    return upload(timestep_features(t, freq_dim), like.device, like.dtype)


def block_modulation(
    block: nn.Module, e0: Tensor, kernels: "Kernels"
) -> tuple[Modulation, Modulation]:
    """Of the self-attention and the feed-forward branch, from the projected time embedding [B, F,
    6, M]."""
    rows = (kernels.cast(block.modulation, e0)[:, None] + e0).unbind(2)
    return Modulation(*rows[:3]), Modulation(*rows[3:])


def attend(
    query_BNHD: Tensor, seen: KeyValue | list[Seen], first: int, kernels: "Kernels"
) -> Tensor:
    """Self-attention of a call [B, N, H·D], by groups of heads where `seen` is a list of them."""
    if isinstance(seen, KeyValue):
        return attend_group(query_BNHD, *seen, None, first, kernels)
    if not isinstance(seen, list):
        kind = type(seen).__name__
        raise ValueError(f"a memory policy returned {kind}: return KeyValue or a list of Seen")
    groups = (
        attend_group(
            query_BNHD[:, :, group.heads], group.key, group.value, group.bias, first, kernels
        )
        for group in seen
    )
    return torch.cat(list(groups), dim=-1)


def attend_group(
    query_BNHD: Tensor,
    key_BTHD: Tensor,
    value_BTHD: Tensor,
    bias: Tensor | None,
    first: int,
    kernels: "Kernels",
) -> Tensor:
    """Attention whose `first` tokens do not see those behind them: two calls, no mask."""
    biases = () if bias is None else (bias,)
    if not first:
        return kernels.attention(query_BNHD, key_BTHD, value_BTHD, *biases)
    visible = key_BTHD.shape[1] - (query_BNHD.shape[1] - first)
    key, value = key_BTHD[:, :visible], value_BTHD[:, :visible]
    before = kernels.attention(
        query_BNHD[:, :first], key, value, *(each[..., :visible] for each in biases)
    )
    return torch.cat(
        (before, kernels.attention(query_BNHD[:, first:], key_BTHD, value_BTHD, *biases)), dim=1
    )


class Projected(NamedTuple):
    """A block's tokens, projected for its self-attention; all three [B, N, H, D], before RoPE."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor  # of the self-attention
    ffn: Modulation


def before_attention(
    block: nn.Module, x_BNM: Tensor, e0: Tensor, heads: int, kernels: "Kernels"
) -> Projected:
    """A block's tokens [B, N, M] as queries, keys and values of its modulated self-attention."""
    attn_mod, ffn_mod = block_modulation(block, e0, kernels)
    h = modulated_norm(x_BNM, attn_mod.shift, attn_mod.scale)
    attn = block.self_attn
    query, key, value = (
        part.unflatten(-1, (heads, -1))
        for part in (attn.norm_q(attn.q(h)), attn.norm_k(attn.k(h)), attn.v(h))
    )
    return Projected(query, key, value, attn_mod.gate, ffn_mod)


def after_attention(
    block: nn.Module, x_BNM: Tensor, attended_BNM: Tensor, gate: Tensor, ffn_mod: Modulation, text: KeyValue,
    heads: int, kernels: "Kernels",
) -> Tensor:  # fmt: skip
    """The rest of a block: the gated self-attention, cross-attention, modulated feed-forward
    (reference order)."""
    x = gated_add(x_BNM, block.self_attn.o(attended_BNM), gate)

    cross = block.cross_attn
    query = cross.norm_q(cross.q(block.norm3(x))).unflatten(-1, (heads, -1))
    x = x + cross.o(kernels.attention(query, text.key, text.value))

    return gated_add(x, block.ffn(modulated_norm(x, ffn_mod.shift, ffn_mod.scale)), ffn_mod.gate)


def text_keys(block: nn.Module, context_BLM: Tensor, heads: int) -> KeyValue:
    """A block's cross-attention keys and values of an embedded prompt."""
    cross = block.cross_attn
    return KeyValue(
        *(
            x.unflatten(-1, (heads, -1))
            for x in (cross.norm_k(cross.k(context_BLM)), cross.v(context_BLM))
        )
    )


def project(head: nn.Module, tokens_BNM: Tensor, e: Tensor, kernels: "Kernels") -> Tensor:
    """The final layer: patch values [B, N, P·C] of tokens."""
    shift, scale = (kernels.cast(head.modulation, e)[:, None] + e[:, :, None]).unbind(2)
    return head.head(modulated_norm(tokens_BNM, shift, scale))


@dataclass(frozen=True, slots=True)
class Kernels:
    """Functions that belong to whoever loaded the modules.

    ComfyUI computes attention its own way, casts bare parameters, and embeds patches in fp32.
    """

    attention: Callable[..., Tensor] = attention  # of q, k, v, and a bias where a policy gives one
    cast: Callable[[Tensor, Tensor], Tensor] = cast
    embed: Callable[[nn.Module, Tensor], Tensor] = embed


@dataclass(frozen=True, slots=True)
class Halves:
    """The two halves of a block around its self-attention; training may compile them."""

    before: Callable[..., Projected] = before_attention
    after: Callable[..., Tensor] = after_attention


def call(function: Callable, module: nn.Module, *arguments: object) -> object:
    """Apply a function to a module whose parameters lie here."""
    return function(module, *arguments)


def run_block(
    block: nn.Module, x_BNM: Tensor, e0: Tensor, table: Tensor, text: KeyValue, layer: int, view: View,
    network: "CausalWan",
) -> Tensor:  # fmt: skip
    """One transformer block around the self-attention over what its view lets it see."""
    heads, kernels, halves = network.config.num_heads, network.kernels, network.halves
    own = halves.before(block, x_BNM, e0, heads, kernels)
    seen = view.extend(layer, own.key, own.value, table, own.query)
    attended = attend(rotate(own.query, table), seen, view.first, kernels)
    return halves.after(block, x_BNM, attended, own.gate, own.ffn, text, heads, kernels)


def write_block(
    block: nn.Module,
    x_BNM: Tensor,
    e0: Tensor,
    table: Tensor,
    layer: int,
    view: View,
    network: "CausalWan",
) -> None:
    """As far as a block's keys and values: the last one of a pass that only writes memory."""
    own = network.halves.before(block, x_BNM, e0, network.config.num_heads, network.kernels)
    view.extend(layer, own.key, own.value, table)


@dataclass(frozen=True, slots=True)
class CausalWan:
    """A loaded Wan2.1 module tree and how to run it.

    `checkpointing` recomputes each block in the backward pass instead of keeping its activations.
    `apply` runs a function of a module; where several processes share the parameters, it gathers
    them first.
    """

    model: nn.Module
    config: WanConfig
    kernels: Kernels = Kernels()
    checkpointing: bool = False
    halves: Halves = Halves()
    apply: Callable[..., Any] = call

    def text(self, context_BLE: Tensor, batch: int | None = None) -> list[KeyValue]:
        """Cross-attention keys and values of a prompt, per layer: computed once and used by every
        pass.

        `context_BLE` [B, L, text_dim] is the text encoder's output as the model was trained on it:
        zeros after the prompt, up to text_len, and no mask. One prompt is expanded to `batch`
        samples, without a copy.
        """
        if context_BLE.ndim != 3 or context_BLE.shape[-1] != self.config.text_dim:
            raise ValueError(
                f"context has shape {tuple(context_BLE.shape)}, this model takes [batch, tokens,"
                f" {self.config.text_dim}]: use the text encoder it was trained with"
            )
        context, heads = self.model.text_embedding(context_BLE), self.config.num_heads
        layers = [self.apply(text_keys, block, context, heads) for block in self.model.blocks]
        if batch is None:
            return layers
        return [KeyValue(*(part.expand(batch, -1, -1, -1) for part in layer)) for layer in layers]

    def __call__(
        self, x: Tensor, t: Tensor, text: list[KeyValue], view: View, keys_only: bool = False
    ) -> Tensor | None:
        """The flow v = ε − x0 [B, C, F, h, w] of latents x [B, C, F, h, w]; the new K/V go into
        `view`.

        `t` is the timestep (0-1000) of each frame: [B, F], or [1, 1] when all are the same, which
        is faster. `text` is of as many samples as x. With `keys_only` nothing is returned and the
        last block stops after its keys: a pass that only writes memory.
        """
        _, channels, frames, height, width = x.shape
        if channels != self.config.in_dim or height % PATCH[1] or width % PATCH[2]:
            raise ValueError(
                f"latents have shape {tuple(x.shape)}, expected [batch, {self.config.in_dim}, frames, height, width]"
                " with even height and width: pixel sizes are multiples of 16"
            )
        if len(view.positions) != frames:
            raise ValueError(
                f"{frames} latent frames came with {len(view.positions)} positions: give one for each"
            )
        model = self.model
        grid = (height // PATCH[1], width // PATCH[2])
        tokens = self.kernels.embed(model.patch_embedding, x).flatten(2).transpose(1, 2)
        e = model.time_embedding(features_of(t, self.config.freq_dim, like=tokens))
        e0 = model.time_projection(e).unflatten(-1, (6, -1))
        table = rotation_table(view.positions, *grid, self.config.head_dim, like=tokens)

        last = len(model.blocks) - 1
        for layer, block in enumerate(model.blocks):
            if keys_only and layer == last:
                self.apply(write_block, block, tokens, e0, table, layer, view, self)
                return None
            arguments = (run_block, block, tokens, e0, table, text[layer], layer, view, self)
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(self.apply, *arguments, use_reentrant=False)
            else:
                tokens = self.apply(*arguments)
        out = self.apply(project, model.head, tokens, e, self.kernels)
        return rearrange(
            out,
            "b (f h w) (p q c) -> b c f (h p) (w q)",
            h=grid[0],
            w=grid[1],
            p=PATCH[1],
            q=PATCH[2],
        )
