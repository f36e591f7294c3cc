"""The embedded default: a synthetic world of sprites, its metrics, and the recipes that train on
it."""
