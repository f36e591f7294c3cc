"""The sampling loop: what must not change the result does not, bit for bit where possible."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.positions import Relative
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.noise.source import Draw, WhiteNoise
from autorefiner.refiner.rollout import Cut, Flush, PromptSwitch, Rollout
from autorefiner.refiner.sample import RunPlan, finite, sample
from autorefiner.refiner.samplers import Method, hiar, ode, self_forcing
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import Kernels

from tiny import TINY, tiny_network

SF = PRESETS["self-forcing"]
METHODS = [self_forcing(), ode(), hiar()]
FRAMES, HEIGHT, WIDTH = 14, 4, 6


def run(
    network, context, preset=SF, frames=FRAMES, batch=1, keys=None, initial=None, given=0, **options
):
    plan = RunPlan(preset, frames, HEIGHT, WIDTH, batch, given, keys)
    return torch.cat(list(sample(network, context, plan, initial=initial, **options)), 2)


def rollout(network, context, memory=None, frames=6, preset=SF, **options) -> Rollout:
    made = Rollout.of(
        network, context, RunPlan(preset, frames, HEIGHT, WIDTH), WhiteNoise(0), **options
    )
    return replace(made, memory=memory) if memory else made


def test_a_window_as_long_as_the_video_is_full_history(network, context) -> None:
    full = run(network, context)
    assert torch.equal(run(network, context, SF.changed(window=FRAMES)), full)
    assert torch.equal(run(network, context, SF.changed(window=FRAMES + 7, sink=3)), full)
    assert not torch.equal(run(network, context, SF.changed(window=6)), full)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_a_video_shorter_than_its_window_and_sink_is_full_history(network, context, frames) -> None:
    full = run(network, context, frames=frames)
    assert torch.equal(run(network, context, PRESETS["longlive"], frames=frames), full)
    assert torch.equal(run(network, context, SF.changed(window=9, sink=3), frames=frames), full)


@pytest.mark.parametrize("window", [-1, 9, 7])
def test_raw_keys_equal_rotated_keys(network, context, window) -> None:
    preset = SF.changed(window=window, sink=0 if window < 0 else 3)
    assert torch.equal(run(network, context, preset, keys="raw"), run(network, context, preset))


@pytest.mark.parametrize("window", [-1, 9])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_run_that_was_stopped_and_continued_equals_one_that_was_not(
    network, context, chunks, window
) -> None:
    preset = SF.changed(window=window)
    whole = run(network, context, preset)
    given = 3 * chunks
    rest = run(network, context, preset, FRAMES - given, initial=whole[:, :, :given], given=given)
    assert torch.equal(rest, whole[:, :, given:])


def test_memory_of_training_samples_the_same_video(network, context) -> None:
    plan = MemoryPlan.of(TINY, (1, 16, FRAMES, HEIGHT, WIDTH), window_frames=7, sink_frames=2)
    with torch.no_grad():
        ring, graph = (
            torch.cat(list(self_forcing().run(rollout(network, context, kind(plan), FRAMES))), 2)
            for kind in (RingMemory, GraphMemory)
        )
    assert (ring - graph).abs().max() < 1e-5


def test_a_sample_of_a_batch_equals_the_run_alone(network, context) -> None:
    both = run(network, context, batch=2)
    assert (both[:1] - run(network, context)).abs().max() < 1e-5
    assert (both[0] - both[1]).abs().mean() > 0.1


def test_every_prompt_of_a_batch_has_its_own_context(network, context) -> None:
    contexts = torch.cat((context, -context))
    both = run(network, contexts, batch=2)
    assert (both[:1] - run(network, context)).abs().max() < 1e-5
    assert (both[1:] - run(network, context, batch=2)[1:]).abs().max() > 1e-3


def test_bf16_networks_run_and_stay_near(context) -> None:
    """Latents stay fp32 between passes; weights, activations and memory are bf16."""
    half = run(tiny_network(dtype=torch.bfloat16), context)
    assert half.dtype == torch.float32
    assert (half - run(tiny_network(), context)).abs().mean() < 0.02


class Uploads(TorchDispatchMode):
    """Records copies from the CPU to the meta device: whether each waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        to = (kwargs or {}).get("device")
        if (
            function is torch.ops.aten._to_copy.default
            and to is not None
            and args[0].device.type != to.type
        ):
            self.waits.append(not kwargs.get("non_blocking", False))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("preset", ["longlive", "krea-14b"])
def test_nothing_in_the_loop_waits_for_the_device(context, method, preset) -> None:
    """Tensors on the meta device have no values: a run that reads one fails there."""
    network, frames = tiny_network(), 15
    network.model.to("meta")
    chunks = sample(
        network, context.to("meta"), RunPlan(PRESETS[preset], frames, HEIGHT, WIDTH), method=method
    )
    next(chunks)
    with Uploads() as uploads:
        assert sum(x0.shape[2] for x0 in chunks) == frames - 3
    assert uploads.waits
    assert not any(uploads.waits)


def test_a_host_may_compute_in_another_dtype_than_it_stores(context) -> None:
    stored = tiny_network().model.patch_embedding
    mixed = tiny_network(
        dtype=torch.bfloat16, kernels=Kernels(embed=lambda module, x: module(x.float()).to(x.dtype))
    )
    mixed.model.patch_embedding = stored  # fp32, as ComfyUI stores it
    expected = run(tiny_network(dtype=torch.bfloat16), context)
    torch.testing.assert_close(
        run(mixed, context, dtype=torch.bfloat16), expected, atol=0.1, rtol=0.1
    )
    widened = run(
        tiny_network(), context.bfloat16(), device=torch.device("cpu"), dtype=torch.float32
    )
    assert torch.equal(widened, run(tiny_network(), context.bfloat16().float()))


def test_one_level_makes_the_two_samplers_equal(network, context) -> None:
    one = SF.changed(levels=(1000,))
    assert torch.equal(run(network, context, one, method=ode()), run(network, context, one))
    assert not torch.equal(run(network, context, method=ode()), run(network, context))


@torch.no_grad()
def test_the_ode_sampler_takes_euler_steps(network, context) -> None:
    """x + (σ' − σ) v (AutoRefiner eq. 19), integrated here directly from the network's flow."""
    run_ = rollout(network, context, frames=3)
    (chunk,) = run_.chunks
    x = run_.draw(chunk, chunk.levels[0])
    memory = GraphMemory(run_.memory.plan)
    sigmas = [level.sigma for level in chunk.levels] + [0.0]
    for level, below in zip(chunk.levels, sigmas[1:], strict=True):
        flow = network(x, torch.full((1, 1), level.t), run_.text, memory.view(range(3)))
        x = x + (below - level.sigma) * flow
    assert (next(ode().run(run_)) - x).abs().max() < 1e-5


def test_the_last_chunk_is_not_committed_and_each_other_one_once(network, context) -> None:
    calls = []
    network.model.patch_embedding.register_forward_hook(lambda *_: calls.append(1))
    run(network, context, frames=9)
    assert len(calls) == 3 * 4 + 2


@torch.no_grad()
def test_a_pending_commit_keeps_the_keys_of_the_last_prediction(network, context) -> None:
    run_ = rollout(network, context)
    chunk, level = run_.chunks[0], run_.chunks[0].levels[0]
    run_.predict(run_.draw(chunk, level), level, chunk)
    written = slice(0, 3 * run_.memory.plan.frame_tokens)  # nothing was written after it
    before = run_.memory.store.keys[1][:, written].clone()
    run_.commit_pending()
    assert torch.equal(run_.memory.store.keys[1][:, written], before)
    assert [held.frame for held in run_.memory.ledger.held] == [0, 1, 2]


def test_closing_the_iterator_frees_the_memory(network, context) -> None:
    kept = []

    def watched(run_):
        kept.append((run_.memory, weakref.ref(run_.memory.store.keys[0])))
        yield from self_forcing().run(run_)

    plan = RunPlan(SF, FRAMES, HEIGHT, WIDTH)
    iterator = sample(network, context, plan, method=Method("watched", watched))
    next(iterator)
    ((memory, buffer),) = kept
    assert memory.nbytes > 0
    iterator.close()
    assert memory.nbytes == 0
    assert buffer() is None


def test_progress_tells_every_prediction(network, context) -> None:
    events = []
    run(
        network,
        context,
        frames=6,
        given=3,
        initial=torch.zeros(1, 16, 3, HEIGHT, WIDTH),
        callback=events.append,
    )
    assert [(p.chunk.index, p.level, p.chunks) for p in events] == [
        (i, j, 3) for i in (1, 2) for j in range(4)
    ]
    assert events[0].x0.shape == (1, 16, 3, HEIGHT, WIDTH)


@torch.no_grad()
def test_forks_draw_their_own_noise_and_the_first_is_the_run_itself(network, context) -> None:
    run_ = rollout(network, context)
    chunk, level = run_.chunks[0], run_.chunks[0].levels[0]
    draws = [fork.draw(chunk, level) for fork in run_.fork(3)]
    assert torch.equal(draws[0], run_.draw(chunk, level))
    assert torch.equal(
        draws[2], WhiteNoise(0)(chunk, Draw(1000, candidate=2), (1, 16, 3, HEIGHT, WIDTH))
    )
    assert all(fork.memory is run_.memory for fork in run_.fork(2))
    nested = [second.candidate for first in run_.fork(2) for second in first.fork(2)]
    assert len(set(nested)) == 4, "candidates of candidates draw noise of their own"


def test_runs_with_other_levels_share_the_noise_of_the_levels_that_they_share(
    network, context
) -> None:
    drawn: dict[tuple[int, ...], dict[tuple[int, int], torch.Tensor]] = {}
    for steps in ((1000, 750, 500, 250), (1000, 500), (1000, 750, 250)):
        run_ = rollout(network, context, preset=SF.changed(levels=steps))
        drawn[steps] = {
            (chunk.index, level.step): run_.draw(chunk, level)
            for chunk in run_.chunks
            for level in chunk.levels
        }
    four, *others = drawn.values()
    for other in others:
        assert len(other) < len(four)
        assert all(torch.equal(noise, four[place]) for place, noise in other.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: method.name)
def test_a_run_stops_at_the_first_chunk_that_is_not_finite(network, context, value, method) -> None:
    def noise(chunk, draw, shape):
        drawn = WhiteNoise(0)(chunk, draw, shape)
        return drawn.index_fill(1, torch.tensor([3]), value) if chunk.index == 1 else drawn

    plan = RunPlan(SF, 9, HEIGHT, WIDTH, 2)
    chunks = finite(sample(network, context, plan, noise=noise, method=method))
    assert next(chunks).isfinite().all()
    with pytest.raises(ValueError, match="chunk 2"):
        next(chunks)


def test_a_start_that_is_not_finite_is_refused(network, context) -> None:
    initial = torch.zeros(1, 16, 3, HEIGHT, WIDTH)
    initial[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        run(network, context, frames=3, given=3, initial=initial)


def test_a_run_of_given_frames_alone_makes_none(network, context) -> None:
    plan = RunPlan(SF, 0, HEIGHT, WIDTH, given=8)
    assert not [*sample(network, context, plan, initial=torch.zeros(1, 16, 8, HEIGHT, WIDTH))]
    assert plan.lengths == (3, 3, 2)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_choose_nothing(score) -> None:
    run_ = rollout(tiny_network(), torch.zeros(1, 8, 32))
    with pytest.raises(ValueError, match="score"):
        run_.select([torch.zeros(1, 16, 3, 1, 1)] * 2, torch.tensor([[0.3], [score]]))


def test_select_takes_the_best_of_each_sample() -> None:
    run_ = rollout(tiny_network(), torch.zeros(1, 8, 32))
    run_.frame_shape = (2, 16, HEIGHT, WIDTH)
    a, b = torch.zeros(2, 16, 3, 1, 1), torch.ones(2, 16, 3, 1, 1)
    chosen = run_.select([a, b], torch.tensor([[0.3, 0.1], [0.2, 0.9]]))
    assert chosen[0].max() == 0
    assert chosen[1].min() == 1
    with pytest.raises(ValueError, match="2 candidates, 2 samples"):
        run_.select([a, b], torch.zeros(2, 1))


def with_event(network, context, event, memory_options=None):
    """Sample two chunks with an event between them."""
    plan = MemoryPlan.of(TINY, (1, 16, 6, HEIGHT, WIDTH), **(memory_options or {}))
    run_ = rollout(network, context, RingMemory(plan))
    with torch.no_grad():
        iterator = self_forcing().run(run_)
        first = next(iterator)
        if event is not None:
            run_.event(event)
        return first, next(iterator)


def test_a_prompt_switch_changes_what_follows(network, context) -> None:
    plain = with_event(network, context, None)
    same = with_event(network, context, PromptSwitch(context))
    other = with_event(network, context, PromptSwitch(-context))
    assert torch.equal(same[1], plain[1])
    assert torch.equal(other[0], plain[0])
    assert (other[1] - plain[1]).abs().max() > 1e-3


def test_a_flush_forgets_and_a_cut_moves_away(network, context) -> None:
    plain = with_event(network, context, None)
    assert torch.equal(with_event(network, context, Flush(keep_last=3))[1], plain[1])
    assert (with_event(network, context, Flush(keep_last=0))[1] - plain[1]).abs().max() > 1e-4
    relative = dict(positions=Relative())
    assert torch.equal(with_event(network, context, None, relative)[1], plain[1])
    assert (with_event(network, context, Cut(45), relative)[1] - plain[1]).abs().max() > 1e-4


def test_what_does_not_fit_is_said_before_anything_runs(network, context) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        RunPlan(SF, 6, 5, 6)
    with pytest.raises(ValueError, match="at least 1"):
        RunPlan(SF, 6, 4, 6, batch=0)
    with pytest.raises(ValueError, match=r"\(1, 16, 3, 4, 6\)"):
        run(network, context, frames=3, given=3, initial=torch.zeros(1, 16, 3, 4, 4))
    with pytest.raises(ValueError, match="3 prompts"):
        run(network, context.expand(3, -1, -1), frames=3, batch=2)
    with pytest.raises(ValueError, match="9223372036854775808"):
        run(network, context, frames=3, seed=1 << 63)
    with pytest.raises(ValueError, match="start from"):
        run(network, context, frames=3, given=3)
