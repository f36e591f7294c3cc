"""The noise path: noise sources, and the refiner that adds a residual to their noise."""
