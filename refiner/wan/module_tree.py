"""Replace layers of a module tree without touching it."""

import copy
from collections.abc import Mapping

from torch import nn


def with_layers(module: nn.Module, layers: Mapping[str, nn.Module], name: str = "") -> nn.Module:
    """Return the module tree with some layers replaced by name; share all other modules."""
    if name in layers:
        return layers[name]
    prefix = f"{name}." if name else ""
    if not any(other.startswith(prefix) for other in layers):
        return module
    new = copy.copy(module)
    new._modules = {
        child: with_layers(inner, layers, prefix + child)
        for child, inner in module._modules.items()
    }
    return new
