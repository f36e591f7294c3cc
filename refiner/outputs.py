"""Files that a run writes, and the saved latents that it goes on from: nothing of another run is
lost or left stale."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .files import check_output, partial_path
from .latents import LatentWriter, count_latents, first_lengths, format_lengths, read_latents

# Metadata that decides how a clip goes on, and what it was in files that do not say; a prompt may
# change.
DECIDING = {
    name: "none" for name in ("model", "dtype", "preset", "seed", "levels", "window", "method")
}
DECIDING |= {"lora": "none", "refiner": "none", "weights": "auto", "noise": "1"}


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
        """Where `--save-latents` writes for a video of this name."""
        return self.video.with_suffix(".latents.safetensors")

    @property
    def stopped(self) -> Path:
        """The latents of a run that was stopped."""
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

        A clip that is extended into its own file replaces what it goes on from.
        """
        if (
            self.stopped.exists()
            and not self._extends(self.stopped)
            and count_latents(self.stopped)
        ):
            raise ValueError(
                f"{self.stopped} is of a run that was stopped: if none is writing it, go on with --extend"
                f" {self.stopped}, or start anew with --overwrite"
            )
        if self._extends(self.latents) or self._extends(self.stopped):
            return
        for path in (self.video, self.latents, self.sheet):
            if path is not None and path.exists():
                raise ValueError(f"{path} exists: give another name, or --overwrite")

    def remove_stale(self) -> None:
        """Remove an overwritten video's latents where this run saved none of its own."""
        if self.overwrite and not self.save_latents:
            for path in (self.latents, self.stopped):
                if not self._extends(path):
                    path.unlink(missing_ok=True)

    def _extends(self, path: Path) -> bool:
        return self.extend is not None and self.extend.resolve() == path.resolve()


def read_given(
    path: Path, frames: int, shape: tuple[int, int, int], chunk: int
) -> tuple[Tensor | None, dict[str, str]]:
    """Latents [1, C, F, h, w] of an earlier run and its metadata, to be extended to `frames` of
    `shape` [C, h, w].

    A last chunk that no clip in chunks of `chunk` frames goes on from is left out, with a warning.
    Returns no latents for a run that was stopped before its first chunk. Raises ValueError when
    this run cannot go on from the file.
    """
    if not count_latents(path):
        return None, {}
    given, metadata = read_latents(path)
    if "steps" in metadata:  # what older files call levels
        metadata = {"levels": metadata["steps"], **metadata}
    _, channels, count, height, width = given.shape
    if (channels, height, width) != shape:
        raise ValueError(
            f"{path} holds {channels} channels of {8 * width}x{8 * height} pixels, this run makes {shape[0]} of"
            f" {8 * shape[2]}x{8 * shape[1]}: use its --size and its model"
        )
    if count > frames:
        raise ValueError(
            f"{path} holds {4 * count - 3} pixel frames and --frames asks for {4 * frames - 3} in all: ask for at least"
            f" {4 * count - 3}"
        )
    rest = count % chunk
    if count > chunk and rest > 1 and count < frames:
        warnings.warn(
            f"{path}: the last {rest} of {count} latent frames are no whole chunk, left out",
            stacklevel=2,
        )
        given = given[:, :, : count - rest]
    return given, metadata


def differences(before: Mapping[str, str], now: Mapping[str, str], given: int) -> str:
    """List what decides how a clip goes on and was different in the run that made its first `given`
    latent frames."""
    pairs = [
        (name, before.get(name, default), now.get(name, default))
        for name, default in DECIDING.items()
    ]
    if "chunk_lengths" in before:
        lengths = (first_lengths(metadata["chunk_lengths"], given) for metadata in (before, now))
        pairs.append(("chunks of", *map(format_lengths, lengths)))
    return ", ".join(f"{name} {then} (now {own})" for name, then, own in pairs if then != own)
