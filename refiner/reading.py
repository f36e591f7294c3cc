"""Read untrusted files: regular files only, up to a limit of bytes for their kind."""

import codecs
import io
import json
import os
import stat
from pathlib import Path

CONFIG_BYTES = 1 << 20  # a model's config, a training's TOML
JSON_BYTES = 16 << 20  # a workflow, an index of shards
TOKENIZER_BYTES = 64 << 20  # umT5's has 17 MB
LINES_BYTES = 256 << 20  # prompts, a training's log
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path) -> None:
    """Raise ValueError unless `path` is a regular file: opening a pipe would block.

    Raises OSError for a missing file, and for a folder that may not be read.
    """
    _check_mode(path, os.stat(path).st_mode)


def _check_mode(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((kind for is_one, kind in KINDS if is_one(mode)), "something else")
        raise ValueError(f"{path} is {kind}, expected a regular file: give the path of one")


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; ValueError for anything else.

    Checks the opened file again, in case another one has taken its place.
    """
    check_regular(path)
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        _check_mode(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: Path, most: int) -> bytes:
    """Read a whole regular file; ValueError for more than `most` bytes.

    Counts the bytes read, as a file may report another size.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(
            f"{path} holds more than {most >> 20} MiB, the most for such a file: give another"
        )
    return content


def read_text(path: Path, most: int) -> str:
    """Read UTF-8, or UTF-16 as Windows saves it, with or without a byte order mark.

    Raises ValueError for other text, and for more than `most` bytes.
    """
    content = read_bytes(path, most)
    try:
        text = content.decode(_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path} is no UTF-8 text but holds NULs: save it as UTF-8")
    return text


def _encoding(content: bytes) -> str:
    """Detect UTF-16 by its byte order mark or by NULs in every second byte; else UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    beginning = content[:4096]
    even, odd = beginning[::2].count(0), beginning[1::2].count(0)
    if max(even, odd) > len(beginning) // 8 and min(even, odd) <= max(even, odd) // 8:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8-sig"


def read_json(path: Path, most: int) -> object:
    """Parse a JSON file; ValueError for anything else, and for more than `most` bytes."""
    text = read_text(path, most)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): save it again") from error
