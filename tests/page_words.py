"""The page's words, read from its module without a browser."""

import re
from pathlib import Path

import autorefiner

WEB = Path(autorefiner.__file__).parent / "web"


def words() -> dict[str, dict[str, str]]:
    """Return the words of each language by name."""
    text = (WEB / "words.js").read_text(encoding="utf-8")
    languages = re.findall(r"^  (\w+): \{\n(.*?)^  \},$", text, re.MULTILINE | re.DOTALL)
    return {
        name: dict(re.findall(r'^    "?([\w ]+?)"?: "(.*)",$', body, re.MULTILINE))
        for name, body in languages
    }


def asked() -> set[str]:
    """Return the names of the words that the page's modules use."""
    text = "".join(path.read_text(encoding="utf-8") for path in WEB.glob("*.js"))
    calls = re.findall(r"\bword\(([^()`]*)\)", text)
    return {name for call in calls for name in re.findall(r'"([^"]+)"', call)}
