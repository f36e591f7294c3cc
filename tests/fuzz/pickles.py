"""Hostile pickles: random opcodes, allowed functions with wrong arguments, and code to run."""

import io
import pickle
import random
import zipfile
from pathlib import Path

import torch

from .base import Attempt, command, damaged

GLOBALS = (
    "os system", "builtins eval", "builtins exec", "posix system", "subprocess Popen", "torch load",
    "builtins bytearray", "collections OrderedDict", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter", "_codecs encode", "torch FloatStorage",
    "torch.storage UntypedStorage", "torch Size", "torch device", "builtins set",
    "builtins complex", "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_qtensor",
    "torch._utils _rebuild_wrapper_subclass", "torch._tensor _rebuild_from_type_v2",
    "torch serialization",
)  # fmt: skip
PIECES = (
    b"(", b")", b"]", b"}", b"l", b"t", b"d", b"e", b"a", b"s", b"u", b"R", b"b", b"Q", b"0", b"1",
    b"2", b"N", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"q\x00", b"q\x01", b"h\x00", b"h\x01",
    b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"K\x01", b"J\xff\xff\xff\x7f",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"X\x04\x00\x00\x00aaaa",
    b"X\xff\xff\xff\x7f", b"T\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f",
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00", b"P1\n", b"I99\n", b"L99L\n",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x94", b"\x93", b"\x81", b"\x92", b"\x97", b"\x98",
    b"\x80\x05",
)  # fmt: skip


class Runs:
    """Creates a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def instructions(choose: random.Random) -> bytes:
    """Return a pickle of random opcodes."""
    pieces = [*PIECES, *(f"c{name.replace(' ', chr(10))}\n".encode() for name in GLOBALS)]
    return b"\x80\x02" + b"".join(choose.choices(pieces, k=choose.choice((3, 10, 40, 400)))) + b"."


def called(choose: random.Random) -> bytes:
    """Return a pickle that calls one function with unexpected arguments."""
    name = choose.choice(GLOBALS).replace(" ", "\n")
    values = (
        b"K\x01",
        b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x3f",
        b"N",
        b"X\x01\x00\x00\x00a",
        b")",
        b"}",
        b"]",
        b"(K\x01K\x02t",
    )
    arguments = b"".join(choose.choices(values, k=choose.randrange(6)))
    return b"\x80\x02c" + name.encode() + b"\n(" + arguments + b"tR."


def pickles(folder: Path, choose: random.Random) -> Attempt:
    """A hostile pickle as a file, zipped as torch does or bare."""
    way = choose.randrange(5)
    if way == 0:
        content = pickle.dumps({"generator": Runs(folder / "ran")}, protocol=2)
    elif way == 1:
        content = called(choose)
    elif way == 2:
        saved = io.BytesIO()
        torch.save(
            {"a": torch.zeros(3), "b": {"c": [1, 2.5, "x"]}},
            saved,
            _use_new_zipfile_serialization=False,
        )
        content = damaged(saved.getvalue(), choose)
    elif way == 3:
        content = (
            b"\x80\x02"
            + choose.choice((b"(", b"]", b"K\x01", b"}q\x00", b"h\x00"))
            * choose.choice((9, 10**5, 10**7))
            + b"."
        )
    else:
        content = instructions(choose)
    path = folder / "hostile.pt"
    if choose.random() < 0.6:
        zipped = io.BytesIO()
        with zipfile.ZipFile(
            zipped, "w", choose.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        ) as archive:
            for name in choose.sample(
                ("a/data.pkl", "a/version", "a/data/0", "../x", "a/byteorder"), 3
            ):
                archive.writestr(name, content if name.endswith("pkl") else b"3\n")
        content = zipped.getvalue()
    path.write_bytes(content)
    option = choose.choice(("--model", "--vae", "--lora", "--refiner"))
    generate = ["generate", "--prompt", "a", "--frames", "1", "--out", folder / "a.mp4"]
    inspecting = command("inspect", path)
    generating = command(
        *generate, *([] if option == "--model" else ["--model", "sprites"]), option, path
    )
    return Attempt(f"pickle {way}", choose.choice((inspecting, generating)))
