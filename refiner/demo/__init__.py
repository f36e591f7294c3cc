"""The embedded demo: a synthetic world of sprites, its metrics, and recipes that train on it."""
