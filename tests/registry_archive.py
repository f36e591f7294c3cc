"""The files that the registry packs: those of git without what .comfyignore names."""

import subprocess
from pathlib import Path

import autorefiner

PACK = Path(autorefiner.__file__).parent


def listed(*options: str) -> set[str]:
    """Return the paths that `git ls-files` prints."""
    command = ["git", "-C", str(PACK), "ls-files", "-z", *options]
    output = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    return set(filter(None, output.split("\0")))


def archived() -> list[str]:
    """Return the archive's files, new ones that git does not ignore included."""
    ignored = {path for which in "co" for path in listed(f"-{which}", "-i", "-X", ".comfyignore")}
    present = listed("-co", "--exclude-standard") - ignored
    return sorted(path for path in present if (PACK / path).is_file())
