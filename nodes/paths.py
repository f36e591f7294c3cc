"""Paths by names that a workflow gives: inside their folder, wherever links in it lead, and dated as in ComfyUI."""

import re
import time
from pathlib import Path

LONGEST, DEEPEST = 1000, 40  # characters and folders of a name
SHOWN = 60  # characters of a name in a message
DATE_PART = re.compile("yyyy|yy|dd?|MM?|hh?|mm?|ss?")
TOKENS = ("year", "month", "day", "hour", "minute", "second", "width", "height")
TOKEN = re.compile(rf"%(?:(?P<token>{'|'.join(TOKENS)})|date:(?P<form>[^%]{{1,40}}))%")


def check_inside(root: Path, path: Path, what: str) -> None:
    """Raise ValueError when `path` lies outside of `root`, also by a link that is there already, or is `root` itself.

    A link in the way to `root` is the user's own and followed. `what` names the path in the message.
    """
    resolved, folder = path.resolve(), root.resolve()
    if not resolved.is_relative_to(folder) or resolved == folder:
        raise ValueError(f"{what} leaves {root}, or a link in it does: give a name inside it")


def inside(root: Path, name: str, what: str) -> Path:
    """root/name, resolved; ValueError for a name that leaves `root`, is it, or is longer or deeper than any name."""
    shown = f"{what} {name[:SHOWN]!r}"
    if not name or "\0" in name:
        raise ValueError(f"{shown} leaves {root}: give a name inside it")
    if len(name) > LONGEST or name.count("/") > DEEPEST:
        raise ValueError(f"{shown}… has {len(name)} characters and {name.count('/')} folders: give a shorter name")
    try:
        name.encode()
        check_inside(root, root / name, shown)
        return (root / name).resolve()
    except (OSError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"{shown} is no file's name ({error}): give another") from error


def dated(prefix: str, width: int, height: int, now: time.struct_time) -> str:
    """A prefix in which %year%, …, %second%, %width%, %height% and %date:yyyy-MM-dd% are said; other tokens stay."""
    two = {"month": now.tm_mon, "day": now.tm_mday, "hour": now.tm_hour, "minute": now.tm_min, "second": now.tm_sec}
    values = {"year": str(now.tm_year), "width": str(width), "height": str(height)}
    values |= {name: f"{number:02}" for name, number in two.items()}
    numbers = {"d": now.tm_mday, "M": now.tm_mon, "h": now.tm_hour, "m": now.tm_min, "s": now.tm_sec}

    def part(match: re.Match) -> str:
        letters = match[0]
        if letters[0] == "y":
            return str(now.tm_year)[-len(letters) :]
        return str(numbers[letters[0]]).zfill(len(letters))

    def value(match: re.Match) -> str:
        return values[match["token"]] if match["token"] else DATE_PART.sub(part, match["form"])

    return TOKEN.sub(value, prefix)
