"""The files of a run: refuse to lose those of another run, leave none stale, read given latents."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .files import check_output, partial_path
from .latents import LatentWriter, count_latents, first_lengths, format_lengths, read_latents

# Metadata that decides how a clip goes on (a prompt may change), with its value in files that lack
# it.
DECIDING = {
    name: "none" for name in ("model", "dtype", "preset", "seed", "levels", "window", "method")
}
DECIDING |= {"lora": "none", "reward": "none", "refiner": "none", "weights": "auto", "noise": "1"}
DECIDING |= {"memory": "window", "positions": "the preset's", "store": "plain", "recipe": ""}
DECIDING |= {"products": "plain"}


@dataclass(frozen=True, slots=True)
class Outputs:
    """The files of a run: its video, contact sheet and latents, and the latents to extend."""

    video: Path
    sheet: Path | None = None
    extend: Path | None = None
    save_latents: bool = False
    overwrite: bool = False

    @property
    def latents(self) -> Path:
        """The latents file that `--save-latents` writes beside the video."""
        return self.video.with_suffix(".latents.safetensors")

    @property
    def stopped(self) -> Path:
        """The latents file of a stopped run."""
        return partial_path(self.latents)

    def check(self, metadata: dict[str, str]) -> None:
        """Raise ValueError when a file cannot be written, or one of another run would be lost."""
        check_output(self.video)
        if self.sheet:
            if self.sheet.suffix != ".png":
                raise ValueError(
                    f"contact sheet {self.sheet} is not a .png: give a name that ends in .png"
                )
            check_output(self.sheet)
        if self.save_latents:
            check_output(self.latents)
            LatentWriter.check(metadata)
        if not self.overwrite:
            self._check_new()

    def _check_new(self) -> None:
        """Raise ValueError for files that this run would replace, or leave stale beside its video.

        A clip that is extended under its own name may replace its files.
        """
        is_foreign = self.stopped.exists() and not self._extends(self.stopped)
        if is_foreign and count_latents(self.stopped):
            raise ValueError(
                f"{self.stopped} is of a run that was stopped: if none is writing it, go on with"
                f" --extend {self.stopped}, or start anew with --overwrite"
            )
        if self._extends(self.latents) or self._extends(self.stopped):
            return
        for path in (self.video, self.latents, self.sheet):
            if path is not None and path.exists():
                raise ValueError(f"{path} exists: give another name, or --overwrite")

    def remove_stale(self) -> None:
        """Remove the latents of an overwritten video, unless this run saved new ones."""
        if self.overwrite and not self.save_latents:
            for path in (self.latents, self.stopped):
                if not self._extends(path):
                    path.unlink(missing_ok=True)

    def _extends(self, path: Path) -> bool:
        return self.extend is not None and self.extend.resolve() == path.resolve()


def read_given(
    path: Path, frames: int | None, shape: tuple[int, int, int], chunk: int
) -> tuple[Tensor | None, dict[str, str]]:
    """Read the latents [1, C, F, h, w] and metadata of an earlier run, to be extended.

    The new clip has `frames` latent frames (None: no end) of `shape` [C, h, w] in chunks of
    `chunk`. A shorter last chunk, which no clip can continue from, is left out with a warning.
    Returns no latents for a run that was stopped before its first chunk. Raises ValueError when
    the file does not fit.
    """
    if not count_latents(path):
        return None, {}
    given, metadata = read_latents(path)
    if "steps" in metadata:  # the name of `levels` in older files
        metadata = {"levels": metadata["steps"], **metadata}
    _, channels, count, height, width = given.shape
    if (channels, height, width) != shape:
        raise ValueError(
            f"{path} holds {channels} channels of {8 * width}x{8 * height} pixels, this run makes"
            f" {shape[0]} of {8 * shape[2]}x{8 * shape[1]}: use its --size and its model"
        )
    if frames is not None and count > frames:
        raise ValueError(
            f"{path} holds {4 * count - 3} pixel frames and --frames asks for {4 * frames - 3} in"
            f" all: ask for at least {4 * count - 3}"
        )
    rest = count % chunk
    if count > chunk and rest > 1 and count != frames:
        warnings.warn(
            f"{path}: the last {rest} of {count} latent frames are no whole chunk, left out",
            stacklevel=2,
        )
        given = given[:, :, : count - rest]
    return given, metadata


def differences(before: Mapping[str, str], now: Mapping[str, str], given: int) -> str:
    """List the deciding settings that differ between an earlier run and this one.

    `given` are the latent frames that this run takes from the earlier one.
    """
    settings = [
        (name, before.get(name, default), now.get(name, default))
        for name, default in DECIDING.items()
    ]
    if "chunk_lengths" in before:
        lengths = (first_lengths(metadata["chunk_lengths"], given) for metadata in (before, now))
        settings.append(("chunks of", *map(format_lengths, lengths)))
    return ", ".join(f"{name} {old} (now {new})" for name, old, new in settings if old != new)
