"""The noise path: where each noise comes from, and what is done to it before it is used."""
