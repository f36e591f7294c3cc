"""A scene as a list of facts: attributes of each object, named by its unique colour, and ground."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..captions import Stated
from ..motion import DIRECTIONS, RATES
from ..palette import GROUNDS, OBJECT_COLOURS
from ..shapes import SHAPES
from ..world import SIZES

VALUES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "motion": tuple(DIRECTIONS),
    "direction": tuple(dict.fromkeys(name for names in DIRECTIONS.values() for name in names)),
    "speed": tuple(dict.fromkeys(name for rates in RATES.values() for name in rates)),
    "size": tuple(SIZES),
}
FACTS = [
    (colour, name, value)
    for colour in OBJECT_COLOURS
    for name, values in VALUES.items()
    for value in values
]
FACTS += [("", "ground", value) for value in GROUNDS]
PLACE = {fact: place for place, fact in enumerate(FACTS)}


def facts_of(objects: Sequence[Stated], ground: str | None) -> tuple[Tensor, Tensor]:
    """Return which facts hold and which are known, each [len(FACTS)] of 0 or 1.

    An attribute that is not stated of an object is unknown. No fact holds of a colour that no
    object has.
    """
    holds, known = torch.zeros(len(FACTS)), torch.ones(len(FACTS))
    stated = [(one.colour, name, getattr(one, name)) for one in objects for name in VALUES]
    for colour, name, value in [*stated, ("", "ground", ground)]:
        if value is not None:
            holds[PLACE[colour, name, value]] = 1
        else:
            for other in VALUES.get(name, GROUNDS):
                known[PLACE[colour, name, other]] = 0
    return holds, known
