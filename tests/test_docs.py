"""The documents are true: links lead somewhere, commands parse, examples run."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

import autorefiner
from autorefiner.nodes.cli import add_run
from autorefiner.refiner.cli import build_parser
from autorefiner.refiner.preset_table import preset_table
from autorefiner.refiner.train_config import TrainConfig

from decoding import decoded

ROOT = Path(autorefiner.__file__).parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RESULTS.md", "CHANGELOG.md")
] + DOCS
USED = [page for page in PAGES if page.name not in ("RESULTS.md", "CHANGELOG.md")]
FILE = re.compile(r"`((?:refiner|nodes|tests|benchmarks|workflows|web|docs)/[\w./]*)`")
PLACEHOLDER = re.compile(r"\b(NAME|ID)\b")
COMMANDS = ("generate", "inspect", "calibrate", "run", "train", "demo")  # need arguments
BLOCK = re.compile(r"(?:^    .*\n)+|^```.*\n(?:.*\n)*?```$", re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(page: Path) -> str:
    """Return the text of a page without its code."""
    return re.sub(r"`[^`\n]+`", "", BLOCK.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(
        r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def fenced(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def command_lines(page: Path) -> list[list[str]]:
    """Return the commands in code blocks and inline code, split as a shell does."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    indented = re.findall(
        r"^ {4,}((?:autorefiner|torchrun|pytest|python|make) .*)$", text, re.MULTILINE
    )
    quoted = re.findall(r"`((?:autorefiner|pytest|python|make) [^`]*)`", text)
    return [shlex.split(line.replace("\n", " "), comments=True) for line in indented + quoted]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", without_code(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", USED, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    names = {
        name
        for name in FILE.findall(page.read_text(encoding="utf-8"))
        if not PLACEHOLDER.search(name)
    }
    assert not {name for name in names if not (ROOT / name).exists()}


@pytest.mark.parametrize("page", USED, ids=name_of)
def test_commands_are_understood(page: Path) -> None:
    parser = build_parser([add_run])
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, *arguments in command_lines(page):
        if program == "torchrun":
            program, *arguments = arguments[arguments.index("--no-python") + 1 :]
        if program == "make":
            assert set(arguments) <= set(targets), arguments
        elif program in ("python", "pytest"):
            paths = [each for each in arguments if each.startswith(("tests/", "benchmarks/"))]
            assert all((ROOT / path).exists() for path in paths), arguments
        else:
            understood(parser, [each for each in arguments if each != "…"])


def understood(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Fail if the parser refuses the arguments, unless the command is only named."""
    if arguments in ([name] for name in COMMANDS):
        return
    try:
        parser.parse_args(arguments)
    except SystemExit as end:
        assert "--help" in arguments and end.code == 0, arguments


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Return every option of a parser and its subcommands."""
    found = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found |= options(inner)
    return found


@pytest.mark.parametrize("page", USED, ids=name_of)
def test_options_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"`(--[a-z0-9-]+)", page.read_text(encoding="utf-8")))
    assert named <= options(build_parser([add_run]))


def test_the_table_of_presets_is_the_commands() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in preset_table().splitlines()) in text


def test_the_python_examples_run(tmp_path: Path) -> None:
    (tmp_path / "examples.py").write_text("\n".join(fenced(ROOT / "docs" / "python.md", "python")))
    ran = subprocess.run(
        [sys.executable, "examples.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert len(decoded(tmp_path / "star.mp4")) == 21


@pytest.mark.parametrize("number", range(3))
def test_the_training_files_are_understood(number: int, tmp_path: Path) -> None:
    example = fenced(ROOT / "docs" / "training.md", "toml")[number]
    (tmp_path / "example.toml").write_text(example)
    assert TrainConfig.read(tmp_path / "example.toml").out.parent == tmp_path


def test_the_animation_is_small_and_moves() -> None:
    path = ROOT / "docs" / "run.webp"
    assert path.stat().st_size <= 1_500_000
    with Image.open(path) as film:
        assert film.n_frames > 30
        pictures = [film.seek(number) or film.convert("RGB") for number in (0, film.n_frames - 1)]
    assert ImageChops.difference(*pictures).getbbox()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
