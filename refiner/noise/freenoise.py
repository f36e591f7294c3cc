"""FreeNoise: long videos repeat the noise of their first chunks, frames permuted."""

from dataclasses import dataclass

from torch import Tensor

from ..schedule import Chunk
from .shaping import Shaping, chunk_before, shaping
from .source import Draw, NoiseSource


def freenoise(window: int = 7, path: int = 0) -> Shaping:
    """Give chunk i the noise of chunk i − `window`, its frames permuted at random.

    The first `window` chunks are white, and so is a video that has no more. It may freeze motion.
    """
    if window < 1:
        raise ValueError(f"freenoise, window {window}: give at least 1 chunk")
    return shaping(lambda white, chunk: RepeatedNoise(white, window, chunk), path)


@dataclass(frozen=True, slots=True)
class RepeatedNoise:
    """Draw a chunk's noise from one of the first `window` chunks, and permute its frames.

    Permuting again and again is permuting once, so one permutation does for any chunk. A first
    chunk that is shorter than the others is not repeated.
    """

    white: NoiseSource
    window: int
    frames: int  # a chunk

    def __call__(self, chunk: Chunk, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        first = int(chunk_before(chunk, 0, self.frames).length < self.frames)
        rank = chunk.index - first  # among the chunks that are repeated
        if rank < self.window:
            return self.white(chunk, draw, shape)
        source = chunk_before(chunk, first + rank % self.window, self.frames)
        noise = self.white(source, draw, (*shape[:2], source.length, *shape[3:]))
        keys = self.white(chunk, draw, (shape[0], 1, source.length, 1, 1))
        order = keys.argsort(dim=2)[:, :, : shape[2]]
        return noise.gather(2, order.expand(-1, shape[1], -1, *shape[3:]))
