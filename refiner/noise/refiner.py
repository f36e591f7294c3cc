"""The noise refiner T_φ: the base network with LoRA branches and a silenced final layer.

AutoRefiner, section 3. The final layer's base weight and bias count as zero, so the refiner's
output is that of the final layer's LoRA branch, and a fresh refiner, whose B factors are zero, adds
exactly nothing.
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
from ..wan.module_tree import with_layers

HEAD = "head.head"
# whole names of layers with a branch
TARGETS = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])|head\.head")
LEVELS = frozenset((750, 500, 250))


@dataclass(frozen=True, slots=True)
class Refiner:
    """T_φ on a base network, with the options of its use.

    `network` computes T_φ within `on()`: a merged copy, or the base itself with its branches
    switched on.
    """

    network: CausalWan
    cache: ReflectiveCache = field(default_factory=ReflectiveCache)
    levels: frozenset[int] = LEVELS  # nominal steps of the refined noises; 1000 is the initial one
    strength: float = 1.0
    on: Callable[[], AbstractContextManager] = nullcontext
    # receives every noise, and its residual before scaling
    watch: Callable[[Tensor, Tensor, Level], None] | None = None

    def at(self, level: Level) -> bool:
        """Whether the noise of this level is refined."""
        return self.strength != 0 and level.step in self.levels

    def text(self, context_BLE: Tensor, batch: int | None = None) -> list[KeyValue]:
        """Compute T_φ's cross-attention keys and values of a prompt; see `CausalWan.text`."""
        with self.on():
            return self.network.text(context_BLE, batch)

    def residual(
        self,
        noise: Tensor,
        x0: Tensor | None,
        level: Level,
        chunk: Chunk,
        memory,
        text: list[KeyValue],
        dtype: torch.dtype,
    ) -> Tensor:
        """Return strength · T_φ(ε; x0, history) [B, C, F, h, w], by one pass in `dtype`.

        `x0` is the prediction at the level before, and is read with the `joint` cache only.
        """
        joint = self.cache.previous == "joint"
        if joint and x0 is None:
            raise ValueError(
                "the joint cache refines a noise by the x0 before it, and the initial noise has"
                " none: refine later levels only"
            )
        view = reflect(memory, chunk.frames, self.cache)
        t = torch.full((1, 1), level.t, dtype=torch.float64)
        x = noise
        if joint:
            clean = torch.zeros(1, chunk.length, dtype=torch.float64)
            t = torch.cat((clean, t.expand(1, chunk.length)), dim=1)
            x = torch.cat((x0, noise), dim=2)
        with self.on():
            flow = self.network(x.to(dtype), t, text, view)
        residual = flow[:, :, -chunk.length :].to(noise.dtype)
        if self.watch is not None:
            self.watch(noise, residual, level)
        return self.strength * residual


def target_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with a branch by name: every Linear of the blocks and the final layer."""
    return {name: module for name, module in model.named_modules() if TARGETS.fullmatch(name)}


def check_pairs(pairs: Mapping[str, LoraPair], model: nn.Module) -> None:
    """Raise ValueError, without a file's name, unless factors are finite and fit the network."""
    targets = target_modules(model)
    missing, foreign = sorted(targets.keys() - pairs.keys()), sorted(pairs.keys() - targets.keys())
    if missing or foreign:
        raise ValueError(
            f"has branches for {len(pairs)} layers and the network has {len(targets)}"
            f" ({', '.join((missing + foreign)[:2])} …): it belongs to another architecture"
        )
    for name, pair in pairs.items():
        down, up = tuple(pair.down.shape), tuple(pair.up.shape)
        weight = tuple(targets[name].weight.shape)
        if (up[0], down[1]) != weight or up[1] != down[0]:
            raise ValueError(
                f"has factors of {up} and {down} for {name}, whose weight is {weight}: it belongs"
                " to a network of another size"
            )
        if not (pair.up.isfinite().all() and pair.down.isfinite().all()):
            raise ValueError(
                f"has values that are not finite for {name}: its training went wrong, use another"
                " file"
            )


def own_weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of a plain layer."""
    return module.weight, module.bias


def as_it_is(name: str, layer: nn.Module) -> nn.Module:
    """Return the layer."""
    return layer


Weights = Callable[[nn.Module], tuple[Tensor, Tensor | None]]
Convert = Callable[[str, nn.Module], nn.Module]


def merged(
    base: CausalWan,
    pairs: Mapping[str, LoraPair],
    silent_head: bool = True,
    weights: Weights = own_weights,
    convert: Convert = as_it_is,
) -> CausalWan:
    """Merge the factors into a copy of the base: a faster pass for a second set of weights.

    Layers without a branch are shared with the base. Without `silent_head` the result is the base
    with a plain LoRA. `weights` returns the weight and bias that a layer computes with; a host that
    stores or patches them elsewhere passes its own function. `convert` receives each merged layer
    and its name, and returns the layer to use.
    """
    check_pairs(pairs, base.model)
    layers = {}
    with torch.no_grad():
        for name, module in target_modules(base.model).items():
            weight, bias = weights(module)
            up = pairs[name].up.to(weight.device).float()
            down = pairs[name].down.to(weight.device).float()
            change = pairs[name].scale * (up @ down)
            if silent_head and name == HEAD:
                whole = change
                bias = None if bias is None else torch.zeros_like(bias)
            else:
                whole = weight.float() + change
            layers[name] = convert(name, plain_linear(whole.to(weight.dtype), bias))
    return replace(base, model=with_layers(base.model, layers), checkpointing=False)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a frozen layer of these tensors."""
    layer = Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy the modules, but share their parameters and buffers."""
    same = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=same)


class Branches:
    """LoRA branches on a loaded model: active within `on()` only, removed by `remove()`."""

    def __init__(
        self,
        model: nn.Module,
        pairs: Mapping[str, LoraPair],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Add the branches; `dtype` and `device` of the factors default to those of each weight.

        Raises ValueError as `check_pairs` does.
        """
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
            change = (x @ down.to(x).t()) @ up.to(x).t()
            return change if silent else output + change

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
        """Remove the branches from the model."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
