"""Differentiable rewards, to train a refiner with or to choose candidates by in a search."""
