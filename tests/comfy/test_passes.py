"""How far a run is, as its bar and the page count it."""

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
FRAMES = 7  # latent ones, in chunks of 3, 3 and 1


def counted(
    method: str, make: Callable[..., Method] | None = None
) -> tuple[Passes, list[tuple[int, int, int]]]:
    """Run it; how far it says to be at every prediction: (done, made of the chunk, needed)."""
    search = None
    if make is not None:
        search = SimpleNamespace(
            sampler=lambda verifier=None: make(verifier, 3),
            verifier=lambda *_: nullcontext(indifferent),
        )
    run = Run(plan_run(PRESETS["self-forcing"], (1, FRAMES, 4, 4), None), 3, method, search=search)
    passes, told = Passes(run), []

    def step(progress: Progress) -> None:
        passes.step(progress)
        told.append((passes.done, passes.done_of_chunk, passes.needed))

    network = tiny_network()
    run.clip(network, torch.zeros(1, 8, network.config.text_dim), CPU, torch.float32, step)
    return passes, told


@pytest.mark.parametrize("method", [*SAMPLERS, *SEARCHES])
def test_every_prediction_is_one_of_the_total(method: str) -> None:
    passes, told = counted(method, SEARCHES.get(method))
    each = {"self-refine": 7, "best-of-n": 12, "search-over-path": 12}.get(method, 4)
    assert passes.total == 3 * each
    places = [(chunk, made) for chunk in range(3) for made in range(1, each + 1)]
    if method == "hiar":  # level by level
        places.sort(key=lambda place: place[1])
    assert told == [(done, made, each) for done, (_, made) in enumerate(places, start=1)]


def test_where_repeats_are_saved_the_count_goes_on_with_the_next_level(monkeypatch) -> None:
    monkeypatch.setitem(SAMPLERS, "self-refine", lambda: self_refine(threshold=1e9))  # sure at once
    passes, told = counted("self-refine")
    assert passes.total == 21
    assert [made for _, made, _ in told] == 3 * [
        1,
        2,
        3,
        5,
        6,
        7,
    ]  # the second repeat of level 750 is saved
    assert told[-1] == (21, 7, 7)
