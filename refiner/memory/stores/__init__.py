"""Stores of the sampling memory by the name that users give."""

from ..store import PlainStore, Store
from .int8 import Int8Store
from .offload import OffloadStore

STORES: dict[str, type[Store]] = {
    "plain": PlainStore,
    "int8": Int8Store,
    "offload": OffloadStore,
}
DEFAULT_STORE = "plain"


def get_store(name: str) -> type[Store]:
    """Look up a store by name; ValueError lists the names."""
    if name not in STORES:
        raise ValueError(f"store {name!r} is not known: use one of {', '.join(STORES)}")
    return STORES[name]


__all__ = ["DEFAULT_STORE", "STORES", "Int8Store", "OffloadStore", "get_store"]
