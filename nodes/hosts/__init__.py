"""What surrounds a node: ComfyUI where it runs, else a stand-in for the little of it that the nodes need.

`host` is `comfy` or `standalone`, two modules with the same functions; `io` holds the names of ComfyUI's node API.
"""

import sys

if "folder_paths" in sys.modules:  # ComfyUI imports it before any custom node
    from . import comfy as host
else:
    from . import standalone as host

io = host.io

__all__ = ["host", "io"]
