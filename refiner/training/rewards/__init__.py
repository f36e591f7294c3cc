"""Differentiable rewards: what a refiner may be trained to raise, and what a search may choose
by."""
