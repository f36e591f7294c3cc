"""Every text of the pack in every language, key by key."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_words import words

import autorefiner

LOCALES = Path(autorefiner.__file__).parent / "locales"
ENGLISH = sorted((LOCALES / "en").glob("*.json"))


def texts(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Return (keys, text) of every text in a locale file."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from texts(inner, (*path, key))
    else:
        yield path, value


def read(path: Path) -> dict[tuple[str, ...], str]:
    return dict(texts(json.loads(path.read_text(encoding="utf-8"))))


def untranslated(english: dict, chinese: dict) -> list:
    """Return the keys whose Chinese text is missing, empty, or the English one."""
    return [key for key, text in english.items() if chinese.get(key) in (None, "", text)]


@pytest.mark.parametrize("path", ENGLISH, ids=lambda path: path.name)
def test_the_chinese_file_translates_every_key_of_the_english_one(path: Path) -> None:
    english, chinese = read(path), read(LOCALES / "zh" / path.name)
    assert set(chinese) == set(english)
    assert untranslated(english, chinese) == []


def test_both_languages_have_the_same_files() -> None:
    assert ENGLISH
    assert {path.name for path in ENGLISH} == {path.name for path in (LOCALES / "zh").iterdir()}


def test_the_words_of_the_page_are_translated() -> None:
    assert untranslated(words()["en"], words()["zh"]) == []
