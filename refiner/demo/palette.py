"""The world's colours: those of objects, and darker ones for grounds."""

import numpy as np

RGB = dict[str, tuple[int, int, int]]

OBJECT_COLOURS: RGB = {
    "red": (226, 48, 44),
    "yellow": (248, 214, 58),
    "green": (62, 188, 84),
    "blue": (66, 118, 246),
    "purple": (176, 72, 214),
    "cyan": (86, 218, 226),
    "white": (244, 244, 240),
}
GROUND_COLOURS: RGB = {
    "black": (18, 18, 22),
    "grey": (104, 108, 116),
    "navy": (26, 34, 86),
    "brown": (92, 60, 40),
    "olive": (68, 76, 34),
}
# Upper and lower colour of each ground, by name.
GROUNDS: dict[str, tuple[str, str]] = {name: (name, name) for name in GROUND_COLOURS} | {
    f"{top} over {bottom}": (top, bottom)
    for top, bottom in (("navy", "brown"), ("black", "navy"), ("grey", "olive"), ("brown", "black"))
}


def table(colours: RGB) -> np.ndarray:
    """Return the colours as float32 [n, 3] in 0–255, in the order of the dict."""
    return np.array(list(colours.values()), dtype=np.float32)
