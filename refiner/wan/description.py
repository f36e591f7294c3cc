"""The report of `autorefiner inspect`."""

from ..terminal import printable
from .inspection import CheckpointInfo
from .transformer import WanConfig


def describe(info: CheckpointInfo) -> str:
    """Format a file's info as aligned lines of `word text`."""
    rows = [
        ("file", f"{info.path} ({info.container})"),
        ("kind", f"{info.kind}, {info.naming} names"),
    ]
    also = f" (also in it: {', '.join(info.other_keys)})" if info.other_keys else ""
    rows.append(("weights", info.top_key + also))
    removed = " ".join(filter(None, (info.prefix, *info.infixes)))
    rows.append(("removed", removed or "nothing"))
    if info.config:
        rows.append(("sizes", _sizes(info.config)))
    rows.append(
        ("tensors", f"{info.tensors}, {' and '.join(info.dtypes)}, {format_bytes(info.nbytes)}")
    )
    rows.append(("preset", f"{info.preset or 'none'}: {info.preset_reason}"))
    longest = 400 if info.kind == "refiner" else 80  # a refiner's card is in its metadata
    rows += [
        ("metadata", f"{key} = {_short(value, longest)}") for key, value in info.metadata.items()
    ]
    rows += [("note", note) for note in info.notes]
    if info.merged_lora:
        rows.append(("LoRA", f"merged into {info.merged_lora} weights"))
    return "\n".join(f"{word:<10}{printable(text)}" for word, text in rows)


def _sizes(config: WanConfig) -> str:
    return (
        f"width {config.dim}, {config.num_layers} layers, {config.num_heads} heads,"
        f" feed-forward {config.ffn_dim}, {config.in_dim} channels,"
        f" text {config.text_len} x {config.text_dim}"
    )


def format_bytes(count: int) -> str:
    """Format a number of bytes in GB or MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _short(value: str, longest: int) -> str:
    line = " ".join(value.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."
