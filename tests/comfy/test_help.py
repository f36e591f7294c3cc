"""Help pages and locales cover every node and input; the English locale matches the schema."""

import json
from pathlib import Path

import pytest
from page_words import asked, words

import autorefiner
from autorefiner.nodes.locales import FILE, english, write_english
from autorefiner.nodes.registry import NODES
from autorefiner.refiner.memory.policies import POLICIES
from autorefiner.refiner.memory.positions import POSITIONS
from autorefiner.refiner.memory.stores import STORES
from autorefiner.refiner.noise.sources import NOISES
from autorefiner.refiner.samplers import METHODS

ROOT = Path(autorefiner.__file__).parent
SCHEMAS = {schema.node_id: schema for schema in (node.define_schema() for node in NODES)}


def locale(name: str) -> dict:
    return json.loads((ROOT / "locales" / name / "nodeDefs.json").read_text(encoding="utf-8"))


def test_the_english_locale_is_what_the_nodes_say() -> None:
    assert FILE.read_text(encoding="utf-8") == english(), "make locales"
    for kind, schema in SCHEMAS.items():
        assert locale("en")[kind]["display_name"] == schema.display_name
        tooltips = {name: texts["tooltip"] for name, texts in locale("en")[kind]["inputs"].items()}
        assert tooltips == {socket.id: socket.tooltip for socket in schema.inputs}


def test_make_locales_writes_the_same_file_each_time(tmp_path: Path) -> None:
    path = tmp_path / "en" / "nodeDefs.json"
    for _ in range(2):
        write_english(path)
        assert path.read_bytes() == FILE.read_bytes()
    assert [*path.parent.iterdir()] == [path]


def test_the_chinese_locale_has_every_node_and_input() -> None:
    found = locale("zh")
    assert set(found) == set(SCHEMAS)
    for kind, schema in SCHEMAS.items():
        assert found[kind]["display_name"] and found[kind]["description"]
        assert set(found[kind]["inputs"]) == {socket.id for socket in schema.inputs}
        assert all(spec["name"] and spec["tooltip"] for spec in found[kind]["inputs"].values())


def test_the_page_has_each_of_its_words_in_every_language() -> None:
    found = words()
    assert set(found) == {"en", "zh"} and set(found["en"]) == set(found["zh"])
    assert all(text for language in found.values() for text in language.values())
    assert asked() and asked() <= set(found["en"])
    source = (ROOT / "web" / "words.js").read_text(encoding="utf-8")
    assert sum(map(len, found.values())) == source.count('",\n'), "each word on a line of its own"


@pytest.mark.parametrize("page", ["{}.md", "{}/zh.md"])
def test_every_node_has_a_help_page(page: str) -> None:
    names = {
        locale("zh")[kind]["display_name"] if "zh" in page else SCHEMAS[kind].display_name
        for kind in SCHEMAS
    }
    pages = [
        (ROOT / "web" / "docs" / page.format(kind)).read_text(encoding="utf-8") for kind in SCHEMAS
    ]
    assert {text.splitlines()[0] for text in pages} == {f"# {name}" for name in names}
    folder = ROOT / "web" / "docs"
    assert {path.name for path in folder.iterdir()} == {
        *SCHEMAS,
        *(f"{kind}.md" for kind in SCHEMAS),
        "pictures",
    }


@pytest.mark.parametrize("page", ["{}.md", "{}/zh.md"])
def test_every_help_page_shows_its_node(page: str) -> None:
    for kind, schema in SCHEMAS.items():
        text = (ROOT / "web" / "docs" / page.format(kind)).read_text(encoding="utf-8")
        assert text.count(f"](pictures/{kind}.png)") == 1, f"{schema.display_name}: make pictures"


@pytest.mark.parametrize("page", ["{}.md", "{}/zh.md"])
def test_the_help_of_reflective_cache_names_every_choice(page: str) -> None:
    path = ROOT / "web" / "docs" / page.format("AutoRefinerReflectiveCache")
    text = path.read_text(encoding="utf-8")
    assert not [name for name in (*POLICIES, *STORES, *POSITIONS) if f"`{name}`" not in text]


@pytest.mark.parametrize("page", ["{}.md", "{}/zh.md"])
def test_the_help_of_the_sampler_names_every_method_and_noise(page: str) -> None:
    path = ROOT / "web" / "docs" / page.format("AutoRefinerSampler")
    text = path.read_text(encoding="utf-8")
    assert not [name for name in (*METHODS, *NOISES) if f"`{name}`" not in text]


def test_the_pictures_are_small_and_each_of_a_node() -> None:
    sizes = {
        path.stem: path.stat().st_size for path in (ROOT / "web" / "docs" / "pictures").iterdir()
    }
    assert set(sizes) == {*SCHEMAS, "page"}
    assert max(size for name, size in sizes.items() if name != "page") <= 40_000
    assert sum(sizes.values()) <= 600_000
