"""The pack's core: pure PyTorch, no ComfyUI."""
