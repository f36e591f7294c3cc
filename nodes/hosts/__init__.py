"""The nodes' surroundings: ComfyUI (comfy.py), or stand-ins where there is none (standalone.py)."""
