"""The causal forward of Wan2.1, over any module tree with its layout.

It calls the tree's own submodules, so quantised weights, offloading and LoRA branches keep working.
The caller gives a timestep and a position for each frame; a `View` gives the keys and values of the
past.

Shape suffixes: B batch, F latent frames, C channels, h w latent size, S tokens of a frame, N = F·S
tokens of the call, T keys, L text tokens, H heads, D head size, M width.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .rope import rotate, rotation_table
from .transformer import EPS, PATCH, WanConfig
from .upload import cached_tensors, upload


class KeyValue(NamedTuple):
    """Keys and values of one layer, both [B, T, H, D]."""

    key: Tensor
    value: Tensor


class Seen(NamedTuple):
    """Keys and values that one group of heads attends to; a list covers all heads, in order."""

    heads: slice
    key: Tensor  # [B, T, H', D], rotated; T may differ between groups
    value: Tensor  # [B, T, H', D]
    bias: Tensor | None = None  # added to the scores, [B or 1, H' or 1, N or 1, T]


class Kind(NamedTuple):
    """What tells the passes over a memory apart; those of equal `places` do the same work."""

    places: Hashable  # slots that a pass reads and writes, and positions of raw keys
    chunk: tuple[int, ...]  # absolute latent indices of the frames


class View(Protocol):
    """Memory as one forward pass sees it: supplies past keys and values, takes the new ones."""

    kind: Kind | None = None  # None: passes differ in ways that it cannot tell, so none is replayed
    positions: Sequence[int]  # temporal RoPE position of each frame of the call
    frequencies: tuple[float, ...] | None  # of the temporal pairs; None: RoPE's own
    first: int  # leading tokens of the call that do not attend to the later ones; 0: all attend

    def extend(
        self,
        layer: int,
        raw_key_BNHD: Tensor,
        value_BNHD: Tensor,
        table: Tensor,
        raw_query_BNHD: Tensor | None = None,
    ) -> KeyValue | list[Seen] | None:
        """Add the call's keys and values; return all that its queries attend to, keys rotated.

        Keys and queries come before RoPE; `table` [N, D/2] holds the rotations of the call's
        tokens. Without a query, return None. Called once per layer and pass, and again when a
        checkpointed layer is recomputed.
        """
        ...


def attention(q_BNHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax attention [B, N, H·D] with scale D^-½; `bias` is added to the scores."""
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BTHD, v_BTHD))
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def cast(parameter: Tensor, like: Tensor) -> Tensor:
    """Cast a bare parameter to the dtype and device of `like`."""
    return parameter.to(like)


def embed(patch_embedding: nn.Module, x: Tensor) -> Tensor:
    """Embed latents [B, C, F, h, w] as patches [B, M, F, h/2, w/2], in the dtype of x."""
    return patch_embedding(x)


class Modulation(NamedTuple):
    """Shift and scale after a norm, and gate of the residual branch; each [B or 1, F or 1, M]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulated_norm(x_BNM: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return LayerNorm(x) · (1 + scale) + shift, per frame.

    When all frames share a timestep, this is one fused kernel.
    """
    width = x_BNM.shape[-1]
    if shift.shape[:2] == (1, 1):
        return F.layer_norm(x_BNM, (width,), 1 + scale[0, 0], shift[0, 0], EPS)
    x_BFSM = F.layer_norm(x_BNM, (width,), eps=EPS).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], x_BFSM, 1 + scale[:, :, None]).flatten(1, 2)


def gated_add(x_BNM: Tensor, branch_BNM: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate · branch, per frame."""
    frames = gate.shape[1]
    return torch.addcmul(
        x_BNM.unflatten(1, (frames, -1)), branch_BNM.unflatten(1, (frames, -1)), gate[:, :, None]
    ).flatten(1, 2)


def timestep_features(t: Tensor, freq_dim: int) -> Tensor:
    """Return cosines, then sines, of timesteps (0-1000): [..., freq_dim], float64."""
    half = freq_dim // 2
    frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = t.double()[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


@cached_tensors(64)
def cached_features(
    t: tuple[float, ...], freq_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return `timestep_features` [1, F, freq_dim]; cached, as sampling uses few timesteps."""
    timesteps = torch.tensor([t], dtype=torch.float64)
    return upload(timestep_features(timesteps, freq_dim), device, dtype)


def features_like(t: Tensor, freq_dim: int, like: Tensor) -> Tensor:
    """Return `timestep_features` in the dtype and on the device of `like`."""
    if len(t) == 1 and t.device.type == "cpu":
        return cached_features(tuple(t[0].tolist()), freq_dim, like.dtype, like.device)
    return upload(timestep_features(t, freq_dim), like.device, like.dtype)


def block_modulation(
    block: nn.Module, e0: Tensor, kernels: "Kernels"
) -> tuple[Modulation, Modulation]:
    """Return the modulations of self-attention and feed-forward.

    `e0` [B, F, 6, M] is the projected time embedding.
    """
    rows = (kernels.cast(block.modulation, e0)[:, None] + e0).unbind(2)
    return Modulation(*rows[:3]), Modulation(*rows[3:])


def attend(
    query_BNHD: Tensor,
    seen: KeyValue | list[Seen] | Iterator[Seen],
    first: int,
    kernels: "Kernels",
) -> Tensor:
    """Return the self-attention of a call [B, N, H·D], one group of heads at a time."""
    if isinstance(seen, KeyValue):
        return attend_group(query_BNHD, *seen, None, first, kernels)
    if not isinstance(seen, (list, Iterator)):
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
    """Return attention whose `first` tokens ignore the later ones: two calls instead of a mask."""
    if not first:
        biases = () if bias is None else (bias,)
        return kernels.attention(query_BNHD, key_BTHD, value_BTHD, *biases)
    visible = key_BTHD.shape[1] - (query_BNHD.shape[1] - first)
    key, value, biases_before, biases_after = key_BTHD[:, :visible], value_BTHD[:, :visible], (), ()
    if bias is not None:
        by_query = bias.shape[-2] > 1
        biases_before = (bias[..., : first if by_query else 1, :visible],)
        biases_after = (bias[..., first if by_query else 0 :, :],)
    before = kernels.attention(query_BNHD[:, :first], key, value, *biases_before)
    after = kernels.attention(query_BNHD[:, first:], key_BTHD, value_BTHD, *biases_after)
    return torch.cat((before, after), dim=1)


class Projected(NamedTuple):
    """Inputs of a block's self-attention [B, N, H, D], before RoPE, and the modulation of the rest.

    `gate` belongs to the self-attention.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor
    ffn: Modulation


def before_attention(
    block: nn.Module, x_BNM: Tensor, e0: Tensor, heads: int, kernels: "Kernels"
) -> Projected:
    """Project a block's tokens [B, N, M] to queries, keys and values of its self-attention."""
    attn_mod, ffn_mod = block_modulation(block, e0, kernels)
    h = modulated_norm(x_BNM, attn_mod.shift, attn_mod.scale)
    attn = block.self_attn
    query = attn.norm_q(attn.q(h)).unflatten(-1, (heads, -1))
    key = attn.norm_k(attn.k(h)).unflatten(-1, (heads, -1))
    value = attn.v(h).unflatten(-1, (heads, -1))
    return Projected(query, key, value, attn_mod.gate, ffn_mod)


def after_attention(
    block: nn.Module,
    x_BNM: Tensor,
    attended_BNM: Tensor,
    gate: Tensor,
    ffn_mod: Modulation,
    text: KeyValue,
    heads: int,
    kernels: "Kernels",
) -> Tensor:
    """Run the rest of a block: gated self-attention, cross-attention, modulated feed-forward."""
    x, query = before_text(block, x_BNM, attended_BNM, gate, heads)
    return after_text(block, x, kernels.attention(query, text.key, text.value), ffn_mod)


def before_text(
    block: nn.Module, x_BNM: Tensor, attended_BNM: Tensor, gate: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Add the gated self-attention; return it and the queries of the cross-attention."""
    x = gated_add(x_BNM, block.self_attn.o(attended_BNM), gate)
    cross = block.cross_attn
    return x, cross.norm_q(cross.q(block.norm3(x))).unflatten(-1, (heads, -1))


def after_text(block: nn.Module, x_BNM: Tensor, attended_BNM: Tensor, mod: Modulation) -> Tensor:
    """Add the cross-attention, then the modulated feed-forward."""
    x = x_BNM + block.cross_attn.o(attended_BNM)
    return gated_add(x, block.ffn(modulated_norm(x, mod.shift, mod.scale)), mod.gate)


def text_keys(block: nn.Module, context_BLM: Tensor, heads: int) -> KeyValue:
    """Return a block's cross-attention keys and values of an embedded prompt."""
    cross = block.cross_attn
    key = cross.norm_k(cross.k(context_BLM)).unflatten(-1, (heads, -1))
    value = cross.v(context_BLM).unflatten(-1, (heads, -1))
    return KeyValue(key, value)


def project(head: nn.Module, tokens_BNM: Tensor, e: Tensor, kernels: "Kernels") -> Tensor:
    """Apply the final layer: tokens to patch values [B, N, P·C]."""
    shift, scale = (kernels.cast(head.modulation, e)[:, None] + e[:, :, None]).unbind(2)
    return head.head(modulated_norm(tokens_BNM, shift, scale))


@dataclass(frozen=True, slots=True)
class Kernels:
    """Functions that the owner of the modules may replace.

    ComfyUI brings its own attention, casts bare parameters, and embeds patches in fp32. RoPE may be
    compiled.
    """

    attention: Callable[..., Tensor] = attention  # (q, k, v), and a bias if the policy has one
    cast: Callable[[Tensor, Tensor], Tensor] = cast
    embed: Callable[[nn.Module, Tensor], Tensor] = embed
    rotate: Callable[[Tensor, Tensor], Tensor] = rotate


@dataclass(frozen=True, slots=True)
class Halves:
    """Halves of a block before and after self-attention, which may be compiled."""

    before: Callable[..., Projected] = before_attention
    after: Callable[..., Tensor] = after_attention


def call(function: Callable, module: nn.Module, *arguments: object) -> object:
    """Call a function on a module whose parameters are all in this process."""
    return function(module, *arguments)


def run_block(
    block: nn.Module,
    x_BNM: Tensor,
    e0: Tensor,
    table: Tensor,
    text: KeyValue,
    layer: int,
    view: View,
    network: "CausalWan",
) -> Tensor:
    """Run one transformer block; its self-attention covers the keys that the view returns."""
    heads, kernels, halves = network.config.num_heads, network.kernels, network.halves
    query, key, value, gate, ffn_mod = halves.before(block, x_BNM, e0, heads, kernels)
    seen = view.extend(layer, key, value, table, query)
    attended = attend(kernels.rotate(query, table), seen, view.first, kernels)
    return halves.after(block, x_BNM, attended, gate, ffn_mod, text, heads, kernels)


def write_block(
    block: nn.Module,
    x_BNM: Tensor,
    e0: Tensor,
    table: Tensor,
    layer: int,
    view: View,
    network: "CausalWan",
) -> None:
    """Compute only a block's keys and values: the last block of a pass that only writes memory."""
    projected = network.halves.before(block, x_BNM, e0, network.config.num_heads, network.kernels)
    view.extend(layer, projected.key, projected.value, table)


class PassInputs(NamedTuple):
    """What changes from one pass to the next, on the device."""

    x: Tensor  # latents [B, C, F, h, w]
    features: Tensor  # of the timesteps [B or 1, F or 1, freq_dim]
    table: Tensor  # rotations of the tokens [N, D/2]


def run_pass(
    network: "CausalWan",
    inputs: PassInputs,
    text: list[KeyValue],
    view: View,
    keys_only: bool = False,
) -> Tensor | None:
    """Run a pass on its inputs; see `CausalWan.__call__`."""
    x, features, table = inputs
    model = network.model
    grid = (x.shape[-2] // PATCH[1], x.shape[-1] // PATCH[2])
    tokens = network.kernels.embed(model.patch_embedding, x).flatten(2).transpose(1, 2)
    e = model.time_embedding(features)
    e0 = model.time_projection(e).unflatten(-1, (6, -1))

    last = len(model.blocks) - 1
    for layer, block in enumerate(model.blocks):
        if keys_only and layer == last:
            network.apply(write_block, block, tokens, e0, table, layer, view, network)
            return None
        arguments = (run_block, block, tokens, e0, table, text[layer], layer, view, network)
        if network.checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(network.apply, *arguments, use_reentrant=False)
        else:
            tokens = network.apply(*arguments)
    out = network.apply(project, model.head, tokens, e, network.kernels)
    return rearrange(
        out,
        "b (f h w) (p q c) -> b c f (h p) (w q)",
        h=grid[0],
        w=grid[1],
        p=PATCH[1],
        q=PATCH[2],
    )


@dataclass(frozen=True, slots=True)
class CausalWan:
    """A loaded Wan2.1 module tree and how to run it.

    `checkpointing` recomputes each block in the backward pass instead of keeping its activations.
    `apply` calls a function on a module; where parameters are sharded over processes, it gathers
    them first. `execute` runs a pass; it may replay a CUDA graph instead.
    """

    model: nn.Module
    config: WanConfig
    kernels: Kernels = Kernels()
    checkpointing: bool = False
    halves: Halves = Halves()
    apply: Callable[..., Any] = call
    execute: Callable[..., Tensor | None] = run_pass

    def text(self, context_BLE: Tensor, batch: int | None = None) -> list[KeyValue]:
        """Return a prompt's cross-attention keys and values per layer, for use in every pass.

        `context_BLE` [B, L, text_dim] is the text encoder's output as in training: padded with
        zeros to text_len, without a mask. One prompt is expanded to `batch` samples without a copy.
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
        return [KeyValue(*(x.expand(batch, -1, -1, -1) for x in layer)) for layer in layers]

    def __call__(
        self, x: Tensor, t: Tensor, text: list[KeyValue], view: View, keys_only: bool = False
    ) -> Tensor | None:
        """Predict the flow v = ε − x0 of latents x, both [B, C, F, h, w]; write new K/V to `view`.

        `t` is the timestep (0-1000) of each frame: [B, F], or [1, 1] when all are equal, which is
        faster. `text` has as many samples as x. `keys_only` is a pass that only writes memory: it
        returns None, and the last block stops after its keys.
        """
        self._check(x, view)
        return self.execute(self, self._inputs(x, t, view), text, view, keys_only)

    def _inputs(self, x: Tensor, t: Tensor, view: View) -> PassInputs:
        """Upload what a pass reads besides weights and memory."""
        features = features_like(t, self.config.freq_dim, like=x)
        grid = (x.shape[-2] // PATCH[1], x.shape[-1] // PATCH[2])
        head_dim, frequencies = self.config.head_dim, view.frequencies
        table = rotation_table(view.positions, *grid, head_dim, like=x, frequencies=frequencies)
        return PassInputs(x, features, table)

    def _check(self, x: Tensor, view: View) -> None:
        _, channels, frames, height, width = x.shape
        if channels != self.config.in_dim or height % PATCH[1] or width % PATCH[2]:
            raise ValueError(
                f"latents have shape {tuple(x.shape)}, expected [batch, {self.config.in_dim},"
                " frames, height, width] with even height and width: pixel sizes are multiples"
                " of 16"
            )
        if len(view.positions) != frames:
            raise ValueError(
                f"{frames} latent frames came with {len(view.positions)} positions:"
                " give one for each"
            )
