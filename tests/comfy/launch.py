"""Start ComfyUI's main.py from its checkout: launch.py COMFYUI_PATH [arguments of main.py].

A CUDA build of torchvision fails on a machine without CUDA, as it registers kernels for operators
that were not loaded; such registrations are skipped. ComfyUI itself is unchanged.
"""

import os
import runpy
import sys

import torch


def skip_torchvision_fakes() -> None:
    """Let torchvision import although its compiled operators did not load."""
    register = torch.library.register_fake

    def patched(name, *args, **kwargs):
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *args, **kwargs)

    torch.library.register_fake = patched


if __name__ == "__main__":
    path = sys.argv[1]
    skip_torchvision_fakes()
    os.chdir(path)
    sys.path.insert(0, path)
    sys.argv = [os.path.join(path, "main.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
