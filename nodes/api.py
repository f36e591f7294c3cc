"""Names that every node file imports: CATEGORY, `io` and `host`.

`io` is ComfyUI's node API (comfy_api.latest.io), or the part of it that the pack needs where there
is no ComfyUI; `host` is the module in hosts/ that acts for the nodes' surroundings.
"""

import sys

from .hosts.protocol import NodeHost

if "folder_paths" in sys.modules:  # ComfyUI imports it before any custom node
    from .hosts import comfy as chosen
else:
    from .hosts import standalone as chosen

CATEGORY = "AutoRefiner"
host: NodeHost = chosen
io = chosen.io
