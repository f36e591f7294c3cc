"""Start ComfyUI's own main.py from its checkout: launch.py COMFYUI_PATH [arguments of main.py].

A CUDA build of torchvision on a machine without CUDA registers kernels for operators that are not
there and fails: such registrations are skipped. Nothing of ComfyUI is changed.
"""

import os
import runpy
import sys

import torch


def skip_torchvision_fakes() -> None:
    """Let torchvision import where its compiled operators did not load."""
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
