"""Exact metrics: detect a clip's objects and ground from its pixels alone, and score them."""
