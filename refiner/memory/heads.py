"""Head lists: heads that attend to near frames alone, in files like those of Forcing-KV."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ..reading import CONFIG_BYTES, read_json


class HeadRun(NamedTuple):
    """Neighbouring heads of a layer of one kind."""

    static: bool
    heads: slice  # in the layer
    order: slice  # among the layer's heads of this kind


@dataclass(frozen=True, slots=True)
class HeadList:
    """Static heads of each layer; the others are dynamic."""

    num_heads: int
    static: tuple[tuple[int, ...], ...]  # by layer, ascending

    @classmethod
    def read(cls, path: Path) -> "HeadList":
        """Read a file that `autorefiner calibrate` or Forcing-KV wrote; ValueError for others."""
        content = read_json(path, CONFIG_BYTES)
        try:
            return cls.parse(content)
        except ValueError as error:
            raise ValueError(
                f"{path} is no list of heads ({error}): write one with `autorefiner calibrate`"
            ) from None

    @classmethod
    def parse(cls, content: object) -> "HeadList":
        """Check parsed JSON: every head of every layer once, as static or dynamic."""
        layers = content.get("layers") if isinstance(content, dict) else content
        if not isinstance(layers, list) or not layers:
            raise ValueError("it has no layers")
        static, counts = [], set()
        for number, layer in enumerate(layers):
            if not isinstance(layer, dict) or layer.get("layer_idx") != number:
                raise ValueError(f"layer {number} is missing or out of order")
            near, far = layer.get("static_head"), layer.get("dynamic_head")
            if not isinstance(near, list) or not isinstance(far, list):
                raise ValueError(f"layer {number} has no static_head and dynamic_head")
            heads = [*near, *far]
            if any(type(head) is not int for head in heads) or sorted(heads) != [
                *range(len(heads))
            ]:
                raise ValueError(f"layer {number} does not name every head once, counted from 0")
            static.append(tuple(sorted(near)))
            counts.add(len(heads))
        if len(counts) > 1 or 0 in counts:
            raise ValueError(f"its layers have {min(counts)} to {max(counts)} heads")
        return cls(counts.pop(), tuple(static))

    def check(self, layers: int, heads: int, name: str) -> None:
        """Raise ValueError unless the list, which the file `name` holds, fits a model."""
        if (len(self.static), self.num_heads) != (layers, heads):
            raise ValueError(
                f"{name} lists {len(self.static)} layers of {self.num_heads} heads, this model has"
                f" {layers} of {heads}: use a list that was measured on it"
            )

    def dynamic(self, layer: int) -> tuple[int, ...]:
        """Return the other heads of a layer."""
        return tuple(head for head in range(self.num_heads) if head not in self.static[layer])

    def runs(self, layer: int) -> list[HeadRun]:
        """Return runs of neighbouring heads of one kind, which cover a layer in order."""
        runs, counted = [], {True: 0, False: 0}
        for static, group in groupby(range(self.num_heads), self.static[layer].__contains__):
            heads = list(group)
            first = counted[static]
            counted[static] += len(heads)
            order = slice(first, counted[static])
            runs.append(HeadRun(static, slice(heads[0], heads[-1] + 1), order))
        return runs
