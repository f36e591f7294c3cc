"""The table that `autorefiner presets` prints."""

from .schedule import PRESETS, Preset

HEADINGS = (
    "preset", "levels", "warp", "shift", "chunk", "window/sink", "positions", "memory", "source",
)  # fmt: skip


def preset_table() -> str:
    """Format all presets, one row each, in aligned columns."""
    rows = [HEADINGS, *(_row(name, preset) for name, preset in PRESETS.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, preset: Preset) -> tuple[str, ...]:
    levels = ",".join(map(str, preset.levels))
    if preset.first_levels:
        levels += f" (first {','.join(map(str, preset.first_levels))})"
    return (
        name,
        levels,
        "yes" if preset.warp else "no",
        f"{preset.shift:g}",
        str(preset.chunk),
        "all" if preset.window < 0 else f"{preset.window}/{preset.sink}",
        preset.positions,
        preset.memory,
        preset.source,
    )
