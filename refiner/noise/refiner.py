"""The noise refiner T_φ (AutoRefiner, section 3): the base network with LoRA branches and a
silenced final layer.

What the refiner adds to a noise is what the LoRA branch of the final layer says, whose base weight
and bias count as zero. So a fresh refiner, whose B factors are zero, adds exactly nothing.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..memory.reflect import ReflectiveCache, reflect
from ..schedule import Chunk, Level
from ..wan.causal import CausalWan, KeyValue
from ..wan.linear import Linear
from ..wan.lora import LoraPair

HEAD = "head.head"
TARGETS = re.compile(
    r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])|head\.head"
)  # whole names
LEVELS = frozenset((750, 500, 250))


@dataclass(frozen=True, slots=True)
class Refiner:
    """T_φ on a base network, and when and how it is used.

    `network` runs T_φ within `on()`: a merged copy, or the base's own tree with its branches
    switched on there.
    """

    network: CausalWan
    cache: ReflectiveCache = field(default_factory=ReflectiveCache)
    levels: frozenset[int] = (
        LEVELS  # nominal steps whose noise is refined; 1000 is the initial noise
    )
    strength: float = 1.0
    on: Callable[[], AbstractContextManager] = nullcontext
    watch: Callable[[Tensor, Tensor, Level], None] | None = (
        None  # told every noise, and its residual before scaling
    )

    def at(self, level: Level) -> bool:
        """Whether the noise of this level is refined."""
        return self.strength != 0 and level.step in self.levels

    def text(self, context_BLE: Tensor, batch: int | None = None) -> list[KeyValue]:
        """T_φ's own cross-attention keys and values of a prompt, as `CausalWan.text`."""
        with self.on():
            return self.network.text(context_BLE, batch)

    def residual(
        self, noise: Tensor, x0: Tensor | None, level: Level, chunk: Chunk, memory, text: list[KeyValue],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """strength · T_φ(ε; x0, history) [B, C, F, h, w], in the dtype of the noise; one pass in
        `dtype`.

        `x0` is the previous level's prediction; it is read with the `joint` cache only.
        """
        joint = self.cache.previous == "joint"
        if joint and x0 is None:
            raise ValueError(
                "the joint cache refines a noise by the x0 before it, and the initial noise has none"
            )
        view = reflect(memory, chunk.frames, self.cache)
        t = torch.full((1, 1), level.t, dtype=torch.float64)
        x = noise
        if joint:
            t = torch.cat((torch.zeros(1, chunk.length), t.expand(1, chunk.length)), dim=1).to(
                torch.float64
            )
            x = torch.cat((x0, noise), dim=2)
        with self.on():
            flow = self.network(x.to(dtype), t, text, view)
        residual = flow[:, :, -chunk.length :].to(noise.dtype)
        if self.watch is not None:
            self.watch(noise, residual, level)
        return self.strength * residual


def target_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with a branch, by name: every Linear of the blocks, and the final layer."""
    return {name: module for name, module in model.named_modules() if TARGETS.fullmatch(name)}


def check_pairs(pairs: Mapping[str, LoraPair], model: nn.Module) -> None:
    """Raise ValueError, in one line without a file's name, unless the factors are finite and fit
    the network."""
    targets = target_modules(model)
    missing, foreign = sorted(targets.keys() - pairs.keys()), sorted(pairs.keys() - targets.keys())
    if missing or foreign:
        raise ValueError(
            f"has branches for {len(pairs)} layers and the network has {len(targets)}"
            f" ({', '.join((missing + foreign)[:2])} …): it belongs to another architecture"
        )
    for name, pair in pairs.items():
        down, up, weight = (
            tuple(pair.down.shape),
            tuple(pair.up.shape),
            tuple(targets[name].weight.shape),
        )
        if (up[0], down[1]) != weight or up[1] != down[0]:
            raise ValueError(
                f"has factors of {up} and {down} for {name}, whose weight is {weight}: it belongs to a network of"
                " another size"
            )
        if not (pair.up.isfinite().all() and pair.down.isfinite().all()):
            raise ValueError(
                f"has values that are not finite for {name}: its training went wrong, use another file"
            )


def own_weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a plain layer."""
    return module.weight, module.bias


Weights = Callable[[nn.Module], tuple[Tensor, Tensor | None]]


def merged(
    base: CausalWan,
    pairs: Mapping[str, LoraPair],
    silent_head: bool = True,
    weights: Weights = own_weights,
) -> CausalWan:
    """T_φ as a second copy of the weights: no LoRA arithmetic in the pass, all memory of a model
    again.

    What has no branch is shared with the base. Without `silent_head` it is the base with a plain
    LoRA. `weights` gives weight and bias of a layer as it computes with them; a host knows better
    where they are kept elsewhere or patched.
    """
    check_pairs(pairs, base.model)
    layers = {}
    with torch.no_grad():
        for name, module in target_modules(base.model).items():
            weight, bias = weights(module)
            up, down = (
                part.to(weight.device).float() for part in (pairs[name].up, pairs[name].down)
            )
            change, silent = pairs[name].scale * (up @ down), silent_head and name == HEAD
            whole = change if silent else weight.float() + change
            bias = torch.zeros_like(bias) if silent and bias is not None else bias
            layers[name] = plain_linear(whole.to(weight.dtype), bias)
    return replace(base, model=with_layers(base.model, layers), checkpointing=False)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen layer of these tensors."""
    layer = Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def with_layers(module: nn.Module, layers: Mapping[str, nn.Module], name: str = "") -> nn.Module:
    """The tree with these layers, by their names, in the place of its own; all other modules are
    the same ones."""
    if name in layers:
        return layers[name]
    prefix = f"{name}." if name else ""
    if not any(other.startswith(prefix) for other in layers):
        return module
    new = copy.copy(module)
    new._modules = {
        child: with_layers(own, layers, prefix + child) for child, own in module._modules.items()
    }
    return new


def shared_copy(model: nn.Module) -> nn.Module:
    """New modules over the same parameters and buffers."""
    same = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=same)


class Branches:
    """LoRA branches on a live tree, whoever loaded it: off but within `on()`, and gone after
    `remove()`."""

    def __init__(
        self, model: nn.Module, pairs: Mapping[str, LoraPair], dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        """Factors lie on `device` in `dtype`, unless told those of each layer's weight. ValueError
        as check_pairs."""
        check_pairs(pairs, model)
        self.active = False
        self.handles = []
        for name, module in target_modules(model).items():
            pair, like = pairs[name], (device or module.weight.device, dtype or module.weight.dtype)
            down, up = (pair.down * pair.scale).to(*like), pair.up.to(*like)
            self.handles.append(
                module.register_forward_hook(self._branch(down, up, silent=name == HEAD))
            )

    def _branch(self, down: Tensor, up: Tensor, silent: bool) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            if not self.active:
                return None
            x = inputs[0]
            own = (x @ down.to(x).t()) @ up.to(x).t()
            return own if silent else output + own

        return hook

    @contextmanager
    def on(self) -> Iterator[None]:
        """Switch the branches on for the passes inside."""
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def remove(self) -> None:
        """Leave the tree as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
