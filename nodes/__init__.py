"""The pack's nodes for ComfyUI, and the command that runs their workflows without it."""
