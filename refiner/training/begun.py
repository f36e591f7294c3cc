"""A note in a run's folder of its options, so that no training resumes it with other options."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reading import CONFIG_BYTES, read_json
from .distributed import saved_shards

NOTE = "run.json"
SHORT = 20  # longest value, in characters, that a message shows
PROSE = "source"  # a preset's description, which does not affect training
FORMER = {"levels": "steps", "first_levels": "first_steps"}  # a preset's names in older notes


def begin(
    run: Path, options: Mapping[str, Any], may_change: Collection[str], *, first: bool = True
) -> None:
    """Check a run's options against its note; write the note if no step has been taken yet.

    `options` is JSON by name. Only the `first` of several processes writes. ValueError if a name
    outside `may_change` differs, or the note is damaged.
    """
    now = json.loads(json.dumps(options))
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
        # older notes hold fewer names
        fixed = [name for name in now if name not in may_change and name in before]
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
    """Compare two values of a note; tables by the names that both have."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return before == now
    before = {name: before[old] for name, old in FORMER.items() if old in before} | before
    return all(_agree(before[name], now[name]) for name in now if name in before and name != PROSE)


def digest(words: Sequence[str]) -> str:
    """Hash a list of prompts, for a note."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def has_begun(run: Path) -> bool:
    """Return whether a step of the run is saved or logged; until then its options may change."""
    log = run / "log.jsonl"
    return (
        (run / "state.pt").exists()
        or bool(saved_shards(run))
        or (log.exists() and log.stat().st_size > 0)
    )
