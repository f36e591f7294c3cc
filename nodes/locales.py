"""Write ComfyUI's English locale from the nodes' schemas: python -m autorefiner.nodes.locales.

locales/en/nodeDefs.json holds nothing of its own; the other languages are translated by hand.
"""

import json
import os
from pathlib import Path

from .registry import NODES

FILE = Path(__file__).parent.parent / "locales" / "en" / "nodeDefs.json"


def english() -> str:
    """Format display names, descriptions and tooltips as ComfyUI's locale file."""
    nodes = {}
    for schema in (node.define_schema() for node in NODES):
        inputs = {item.id: {"name": item.id, "tooltip": item.tooltip} for item in schema.inputs}
        nodes[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": inputs,
        }
    return json.dumps(nodes, indent=2, ensure_ascii=False) + "\n"


def write_english(path: Path = FILE) -> None:
    """Write the file; an existing one is replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(english(), encoding="utf-8", newline="\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    write_english()
    print(FILE)
