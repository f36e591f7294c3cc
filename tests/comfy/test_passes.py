"""Progress of a run as the progress bar and the page count it."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from autorefiner.nodes.passes import Passes
from autorefiner.nodes.run import Run, plan_run
from autorefiner.refiner.rollout import Progress
from autorefiner.refiner.samplers import SAMPLERS, SEARCHES, Method, self_refine
from autorefiner.refiner.schedule import PRESETS

from tiny import tiny_network
from tiny_reward import indifferent

CPU = torch.device("cpu")
FRAMES = 7  # latent frames, in chunks of 3, 3 and 1
NUM_CHUNKS, NUM_LEVELS = 3, 4
# Methods that are not listed make one pass a level.
PASSES_OF_A_CHUNK = {"self-refine": 7, "best-of-n": 12, "search-over-path": 12}
PIPELINED = {"hiar", "rolling"}  # chunk i is at level j in wave i + j, newest chunk first


def counted(
    method: str, make: Callable[..., Method] | None = None
) -> tuple[Passes, list[tuple[int, int, int]]]:
    """Run a method; return its Passes and (done, done of chunk, needed) after every prediction."""
    search = None
    if make is not None:
        search = SimpleNamespace(
            sampler=lambda verifier=None: make(verifier, 3),
            verifier=lambda *_: nullcontext(indifferent),
        )
    run = Run(plan_run(PRESETS["self-forcing"], (1, FRAMES, 4, 4), None), 3, method, search=search)
    passes, counts = Passes(run), []

    def step(progress: Progress) -> None:
        passes.step(progress)
        counts.append((passes.done, passes.done_of_chunk, passes.needed))

    network = tiny_network()
    run.clip(network, torch.zeros(1, 8, network.config.text_dim), CPU, torch.float32, step)
    return passes, counts


@pytest.mark.parametrize("method", [*SAMPLERS, *SEARCHES])
def test_every_prediction_is_one_of_the_total(method: str) -> None:
    passes, counts = counted(method, SEARCHES.get(method))
    needed = [PASSES_OF_A_CHUNK.get(method, NUM_LEVELS)] * NUM_CHUNKS
    if method == "ttc":  # corrects two levels of every chunk but the first
        needed = [NUM_LEVELS, NUM_LEVELS + 4, NUM_LEVELS + 4]
    assert passes.total == sum(needed)
    places = [(chunk, done) for chunk in range(NUM_CHUNKS) for done in range(1, needed[chunk] + 1)]
    if method in PIPELINED:
        places.sort(key=lambda place: (place[0] + place[1], place[1]))
    assert counts == [
        (done, of_chunk, needed[chunk]) for done, (chunk, of_chunk) in enumerate(places, 1)
    ]


def test_where_repeats_are_saved_the_count_goes_on_with_the_next_level(monkeypatch) -> None:
    # Certain at once.
    monkeypatch.setitem(SAMPLERS, "self-refine", lambda: self_refine(threshold=1e9))
    passes, counts = counted("self-refine")
    assert passes.total == 21
    skipped = 4  # the second repeat of level 750
    expected = [done for done in range(1, 8) if done != skipped]
    assert [of_chunk for _, of_chunk, _ in counts] == NUM_CHUNKS * expected
    assert counts[-1] == (21, 7, 7)
