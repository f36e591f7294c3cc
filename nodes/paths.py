"""Resolve names in a workflow: dated as in ComfyUI, inside their folder whatever links say."""

import re
import time
from pathlib import Path

LONGEST, DEEPEST = 1000, 40  # characters of a name, folders in it
SHOWN = 60  # characters of a name in a message
DATE_PART = re.compile("yyyy|yy|dd?|MM?|hh?|mm?|ss?")
TOKENS = ("year", "month", "day", "hour", "minute", "second", "width", "height")
TOKEN = re.compile(rf"%(?:(?P<token>{'|'.join(TOKENS)})|date:(?P<form>[^%]{{1,40}}))%")


def check_inside(root: Path, path: Path, what: str) -> None:
    """Raise ValueError unless `path`, with symlinks resolved, lies inside `root`.

    A symlink in the path to `root` is the user's choice and followed. `what` names the path in
    the message.
    """
    resolved, folder = path.resolve(), root.resolve()
    if not resolved.is_relative_to(folder) or resolved == folder:
        raise ValueError(f"{what} leaves {root}, or a link in it does: give a name inside it")


def inside(root: Path, name: str, what: str) -> Path:
    """Resolve root/name. ValueError for a name that is too long or deep, or not inside `root`."""
    shown = f"{what} {name[:SHOWN]!r}"
    if not name or "\0" in name:
        raise ValueError(f"{shown} leaves {root}: give a name inside it")
    if len(name) > LONGEST or name.count("/") > DEEPEST:
        raise ValueError(
            f"{shown}… has {len(name)} characters and {name.count('/')} folders: give a shorter"
            " name"
        )
    try:
        name.encode()
        check_inside(root, root / name, shown)
        return (root / name).resolve()
    except (OSError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"{shown} is no file's name ({error}): give another") from error


def dated(prefix: str, width: int, height: int, now: time.struct_time) -> str:
    """Fill in %year% to %second%, %width%, %height% and %date:yyyy-MM-dd%; leave the rest."""
    numbers = {
        "month": now.tm_mon,
        "day": now.tm_mday,
        "hour": now.tm_hour,
        "minute": now.tm_min,
        "second": now.tm_sec,
    }
    values = {"year": str(now.tm_year), "width": str(width), "height": str(height)}
    values |= {name: f"{number:02}" for name, number in numbers.items()}
    by_letter = {("M" if name == "month" else name[0]): number for name, number in numbers.items()}

    def formatted(match: re.Match) -> str:
        letters = match[0]
        if letters[0] == "y":
            return str(now.tm_year)[-len(letters) :]
        return str(by_letter[letters[0]]).zfill(len(letters))

    def value(match: re.Match) -> str:
        if match["token"]:
            return values[match["token"]]
        return DATE_PART.sub(formatted, match["form"])

    return TOKEN.sub(value, prefix)
