"""Hostile weight files: damaged bytes, lying headers, and unexpected tensor names."""

import json
import random
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file

from autorefiner.refiner.demo.bundle import FILES, WEIGHTS
from autorefiner.refiner.latents import read_latents

from .base import ESCAPES, Attempt, as_json, changed, command, damaged

NAMES = ("model", "vae", "lora", "six", "context")
BUNDLED = (*FILES.values(), "sprites.refiner.safetensors")


def uses(path: Path, folder: Path, choose: random.Random) -> Attempt:
    """Return an attempt that uses a weight file as a user would."""
    common = [
        "--prompt",
        "a red star",
        "--frames",
        "1",
        "--size",
        "16x16",
        "--out",
        folder / "a.mp4",
        "--overwrite",
    ]
    sprites = [
        "generate",
        "--model",
        "sprites",
        "--prompt",
        "a red star",
        "--frames",
        "1",
        "--out",
        folder / "a.mp4",
    ]
    given = ["--vae", folder / "vae.safetensors", "--context", folder / "context.safetensors"]
    ways = {
        "inspect": ["inspect", path],
        "model": ["generate", "--model", path, "--preset", "self-forcing", *common, *given],
        "vae": [
            "generate",
            "--model",
            folder / "model.safetensors",
            *common,
            *given[2:],
            "--vae",
            path,
        ],
        "lora": [*sprites, "--lora", path],
        "refiner": [*sprites, "--refiner", path],
        "context": [
            "generate",
            "--model",
            folder / "model.safetensors",
            *common,
            *given[:2],
            "--context",
            path,
        ],
        "text encoder": [
            "generate",
            "--model",
            folder / "model.safetensors",
            *common,
            *given[:2],
            "--text-encoder",
            path,
        ],
        "extend": [*sprites, "--extend", path],
    }
    way = choose.choice(("inspect", *ways))
    return Attempt(f"{way} {path.name}", command(*ways[way]))


def safetensors(folder: Path, choose: random.Random) -> Attempt:
    """A .safetensors file with a wrong header or wrong data."""
    name = choose.choice(NAMES)
    content = (folder / f"{name}.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    way = choose.randrange(6)
    if way == 0:
        content = damaged(content[:4096], choose) + content[4096:]
    elif way == 1:
        header = as_json(changed(json.loads(header), choose))
        content = struct.pack("<Q", len(header)) + header + data
    elif way == 2:
        content = (
            struct.pack("<Q", choose.choice((0, 1, length + 1, 2**31, 2**63, 2**64 - 1)))
            + header
            + data
        )
    elif way == 3:
        table = json.loads(header)
        some = choose.sample(list(table), min(3, len(table)))
        for key in some:
            table[
                choose.choice(
                    (ESCAPES, key + ".x", "lora_A." + key, "a" * 9000, "blocks.99999." + key)
                )
            ] = table.pop(key)
        header = as_json(table)
        content = struct.pack("<Q", len(header)) + header + data
    elif way == 4:
        table = json.loads(header)
        table["__metadata__"] = {
            "config": as_json(changed({"transformer": {"num_heads": 2}}, choose)).decode(),
            "autorefiner": choose.choice(
                (ESCAPES, "[" * 9999, '{"preset": "' + ESCAPES + '"}', "{}")
            ),
        }
        header = json.dumps(table).encode()
        content = struct.pack("<Q", len(header)) + header + data
    else:
        content = damaged(content, choose)
    path = folder / "hostile.safetensors"
    path.write_bytes(content)
    return uses(path, folder, choose)


def torch_files(folder: Path, choose: random.Random) -> Attempt:
    """A .pt file of odd containers, keys and tensors, or a damaged one."""
    state: dict = dict(load_file(folder / f"{choose.choice(NAMES[:3])}.safetensors"))
    key = choose.choice(list(state))
    kinds = (
        lambda x: x.to_sparse(), lambda x: x.to("meta"), lambda x: x.to(torch.complex64),
        lambda x: x.bool(), lambda x: x[:0], lambda x: torch.zeros(()),
        lambda x: torch.full_like(x, float("nan")), lambda x: x.int(),
        lambda x: torch.zeros(1).expand(1 << 16, 1 << 16), lambda x: [x], lambda x: None,
        lambda x: x.T if x.ndim == 2 else x, lambda x: torch.zeros(1 << choose.randrange(8), 3),
    )  # fmt: skip
    state[key] = choose.choice(kinds)(state[key])
    if choose.random() < 0.3:
        state[choose.choice((ESCAPES, 3, None, ("a", 1), "a" * 5000, key + ".alpha"))] = (
            torch.zeros(1)
        )
    wrapped = choose.choice(
        (
            state,
            {"generator": state},
            {ESCAPES: state},
            {"state_dict": {"generator": state}},
            [state],
            {"a": 1},
            state[key],
        )
    )
    path = folder / "hostile.pt"
    torch.save(wrapped, path, _use_new_zipfile_serialization=choose.random() < 0.7)
    if choose.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), choose))
    return uses(path, folder, choose)


def folders(folder: Path, choose: random.Random) -> Attempt:
    """A folder of weights whose index, shards and configs do not match."""
    place = folder / "model folder"
    place.mkdir()
    index: object = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    names = (
        "model.safetensors.index.json",
        "config.json",
        "adapter_config.json",
        "one.safetensors",
        "adapter_model.bin",
    )
    for name in choose.sample(names, 3):
        if name.endswith("json"):
            content = as_json(
                changed(
                    index if "index" in name else {"model_type": "umt5", "lora_alpha": 2}, choose
                )
            )
            (place / name).write_bytes(
                damaged(content, choose) if choose.random() < 0.3 else content
            )
        else:
            (place / name).write_bytes((folder / "lora.safetensors").read_bytes())
    (place / "loop").symlink_to(place)
    return uses(place, folder, choose)


def latents(folder: Path, choose: random.Random) -> Attempt:
    """A latents file that claims more than it holds."""
    content = (folder / "six.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    header = as_json(changed(table, choose))[:length].ljust(length)
    path = folder / "hostile.latents.safetensors"
    path.write_bytes(content[:8] + header + content[8 + length :])
    if choose.random() < 0.3:
        with open(path, "rb+") as file:
            file.truncate(choose.choice((0, 7, 100, length + 8, length + 9, 1 << 40)))
    if choose.random() < 0.3:
        return Attempt(
            "latents read", lambda: read_latents(path) if path.stat().st_size < 1 << 30 else None
        )
    return uses(path, folder, choose)


def bundled(folder: Path, choose: random.Random) -> Attempt:
    """One of the pack's own files, damaged."""
    name = choose.choice(BUNDLED)
    content = (WEIGHTS / name).read_bytes()
    path = folder / f"hostile {name}"
    path.write_bytes(damaged(content[: 1 << 16], choose) + content[1 << 16 :])
    return uses(path, folder, choose)
