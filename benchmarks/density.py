"""Count how dense the code is: python benchmarks/density.py [--check].

Prints one row for each folder of refiner/ and nodes/, and one for all: files, functions, code
lines, characters per code line (without indentation, blank lines, comments and docstrings, and the
same with docstrings), the 90th percentile and the maximum of the functions' lengths in lines, and
the longest file. With --check, exits with 1 if a file or the average is over its limit.
"""

import argparse
import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("refiner", "nodes")
LONGEST_FILE = 450  # lines
WIDEST = 42  # characters a code line, on average
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
HEADINGS = [
    "folder",
    "files",
    "functions",
    "code lines",
    "chars/line",
    "with docs",
    "p90",
    "max",
    "longest file",
]


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes of one file."""

    path: Path
    lines: int
    widths: list[int]  # characters of each code line
    documented: list[int]  # the same with the lines of docstrings
    functions: list[int]  # lines of each


def code_lines(source: str, without: set[int]) -> list[str]:
    """Return the lines with code and strings, stripped, without comments and the lines numbered."""
    ends: dict[int, int] = {}  # column after the last token of each line
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in NO_CODE:
            continue
        (start, _), (last, column) = token.start, token.end
        ends |= {line: sys.maxsize for line in range(start, last)}
        ends[last] = column
    lines = source.splitlines()
    code = (lines[line - 1][: ends[line]].strip() for line in sorted(ends) if line not in without)
    return [line for line in code if line]


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines of docstrings."""
    documented = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    strings = [node.body[0] for node in documented if ast.get_docstring(node, False) is not None]
    return {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}


def count(path: Path) -> Counts:
    """Count one file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    return Counts(
        path,
        lines=len(source.splitlines()),
        widths=[len(line) for line in code_lines(source, docstring_lines(tree))],
        documented=[len(line) for line in code_lines(source, set())],
        functions=[node.end_lineno - node.lineno + 1 for node in functions],
    )


def percentile(values: list[int], percent: int) -> int:
    """Return the smallest value that at least so many percent of the values do not exceed."""
    if not values:
        return 0
    return sorted(values)[-(-len(values) * percent // 100) - 1]


def mean(values: list[int]) -> float:
    """Return the average; 0 for none."""
    return sum(values) / max(1, len(values))


def row(name: str, files: list[Counts]) -> list[str]:
    """Format the figures of some files."""
    widths = [width for file in files for width in file.widths]
    documented = [width for file in files for width in file.documented]
    functions = [length for file in files for length in file.functions]
    longest = max(files, key=lambda file: (file.lines, file.path.name))
    return [
        name,
        str(len(files)),
        str(len(functions)),
        str(len(widths)),
        f"{mean(widths):.1f}",
        f"{mean(documented):.1f}",
        str(percentile(functions, 90)),
        str(max(functions, default=0)),
        f"{longest.lines} {longest.path.name}",
    ]


def table(files: list[Counts]) -> str:
    """Format one row for each folder, each room and all files."""
    folders: dict[str, list[Counts]] = {}
    for file in files:
        folders.setdefault(file.path.parent.relative_to(ROOT).as_posix() + "/", []).append(file)
    rows = [HEADINGS]
    rows += [row(name, folders[name]) for name in sorted(folders)]
    for room in ROOMS:
        inside = [file for file in files if file.path.is_relative_to(ROOT / room)]
        rows.append(row(f"all of {room}/", inside))
    rows.append(row("all", files))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(aligned(cells, widths) for cells in rows)


def aligned(cells: list[str], widths: list[int]) -> str:
    """Join the cells of a row: figures to the right, first and last to the left."""
    name, *figures, last = cells
    middle = (figure.rjust(width) for figure, width in zip(figures, widths[1:-1], strict=True))
    return "  ".join((name.ljust(widths[0]), *middle, last)).rstrip()


def complaints(files: list[Counts]) -> list[str]:
    """Name each limit that is exceeded."""
    long = [
        f"{file.path.relative_to(ROOT)} has {file.lines} lines: at most {LONGEST_FILE}"
        for file in files
        if file.lines > LONGEST_FILE
    ]
    width = mean([width for file in files for width in file.widths])
    if width > WIDEST:
        long.append(f"a code line has {width:.1f} characters on average: at most {WIDEST}")
    return long


def main() -> int:
    """Print the table; with --check, also what exceeds a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 beyond a limit")
    args = parser.parse_args()
    files = [count(path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    print(table(files))
    exceeded = complaints(files) if args.check else []
    for line in exceeded:
        print(line, file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
