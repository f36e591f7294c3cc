"""What a run was begun with, noted in its folder, so that a training with other options does not go
on with it."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reading import CONFIG_BYTES, read_json
from .distributed import saved_shards

NOTE = "run.json"
SHORT = 20  # characters of a value that a message shows
PROSE = "source"  # of a preset: words about it, which change nothing
FORMER = {"levels": "steps", "first_levels": "first_steps"}  # of a preset, in older notes


def begin(
    run: Path, told: Mapping[str, Any], may_change: Collection[str], *, first: bool = True
) -> None:
    """Check that a run goes on as it was begun; one that has taken no step yet notes what it is
    `told` now.

    `told` is JSON by name. Of several processes only the `first` one notes it. Raises ValueError
    where a name outside of `may_change` differs, or the note is damaged.
    """
    now = json.loads(json.dumps(told))
    note = run / NOTE
    if not note.exists() or not has_begun(run):
        if first:
            run.mkdir(parents=True, exist_ok=True)
            temporary = run / f".{NOTE}.partial"
            temporary.write_text(json.dumps(now, indent=1) + "\n")
            os.replace(temporary, note)
        return
    try:
        before = dict(read_json(note, CONFIG_BYTES))
        fixed = [
            name for name in now if name not in may_change and name in before
        ]  # older notes say less
        other = next((name for name in fixed if not _agree(before[name], now[name])), None)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{note} cannot be read ({error!r}): give the run another name") from error
    if other is not None:
        pair = before[other], now[other]
        shown = all(
            isinstance(value, (int, float, str)) and len(str(value)) <= SHORT for value in pair
        )
        values = f" {pair[0]} and is {pair[1]} now" if shown else ""
        raise ValueError(
            f"run {run.name} was begun with another {other}{values}: give the run another name"
        )


def _agree(before: object, now: object) -> bool:
    """Compare two values of a note; a table by the names that both have."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return before == now
    before = {name: before[old] for name, old in FORMER.items() if old in before} | before
    return all(_agree(before[name], now[name]) for name in now if name in before and name != PROSE)


def digest(words: Sequence[str]) -> str:
    """Of many words, as a note keeps them."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def has_begun(run: Path) -> bool:
    """Whether a step of a run is saved or logged. Until then, as when its device was too small, it
    may be changed."""
    log = run / "log.jsonl"
    return (
        (run / "state.pt").exists()
        or bool(saved_shards(run))
        or (log.exists() and log.stat().st_size > 0)
    )
