"""Methods that hold several chunks, or memories besides the main one: order, history, refusals."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.choices import choose
from autorefiner.refiner.job import notes, prepare
from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.plan import FirstFrames
from autorefiner.refiner.memory.positions import Cut
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.noise.refiner import Refiner, merged
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import Rollout, add_noise, predict_x0
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.samplers import SAMPLERS, Method, hiar, rolling, self_refine, ttc
from autorefiner.refiner.samplers.waves import waves
from autorefiner.refiner.schedule import PRESETS, plan_chunks
from autorefiner.refiner.timeline import Flush, Keep, Recache, Scene, Timeline
from autorefiner.refiner.wan.causal import KeyValue

from tiny import TINY, tiny_network
from tiny_command import command, parse
from tiny_refiner import pairs_for

SF = PRESETS["self-forcing"]
THREE = SF.changed(levels=(1000, 750, 500))
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
FRAMES, HEIGHT, WIDTH = 14, 4, 4  # chunks of 3, 3, 3, 3, 2
KINDS = (RingMemory, GraphMemory)


@pytest.fixture(scope="module")
def network():
    return tiny_network()


def run(network, method=None, preset=SF, context=CONTEXT, initial=None, **options) -> Tensor:
    given = 0 if initial is None else initial.shape[2]
    plan = RunPlan(preset, FRAMES - given, HEIGHT, WIDTH, given=given)
    chunks = sample(network, context, plan, method=method, initial=initial, **options)
    return torch.cat(list(chunks), 2)


def rollout_of(network, method, preset=SF, kind=RingMemory, frames=FRAMES, **options) -> Rollout:
    plan = RunPlan(preset, frames, HEIGHT, WIDTH)
    caches = method.caches(plan.chunks[-1].levels)
    return Rollout.of(network, CONTEXT, plan, WhiteNoise(0), memory=kind, caches=caches, **options)


def by_level(rollout: Rollout):
    """HiAR without a pipeline: all chunks at one level, then all at the next."""
    chunks = list(rollout)
    levels = chunks[-1].levels
    latents = [rollout.draw(chunk, levels[0]) for chunk in chunks]
    for level, below in zip(levels, (*levels[1:], None), strict=True):
        cache = level.step if below else None
        for number, chunk in enumerate(chunks):
            x0 = rollout.predict(latents[number], level, chunk, cache=cache)
            if below is None:
                rollout.commit(x0, chunk)
                yield x0
            else:
                latents[number] = rollout.renoise(x0, below, chunk, cache=cache)
                rollout.commit(latents[number], chunk, below.t, cache)


@pytest.mark.parametrize(("refined", "window"), [(False, -1), (True, 7)])
def test_hiar_in_a_pipeline_is_hiar_level_by_level(network, refined, window) -> None:
    preset = THREE.changed(window=window, sink=1 if window > 0 else 0)
    refiner = Refiner(merged(network, pairs_for(network)), ReflectiveCache()) if refined else None
    sequential = Method("by level", by_level, caches=hiar().caches)
    expected = run(network, sequential, preset, refiner=refiner)
    assert torch.equal(run(network, hiar(), preset, refiner=refiner), expected)
    initial = expected[:, :, :3]
    assert torch.equal(
        run(network, hiar(), preset, initial=initial, refiner=refiner),
        run(network, sequential, preset, initial=initial, refiner=refiner),
    )


@torch.no_grad()
def test_hiar_yields_a_chunk_once_its_levels_are_through_and_holds_no_more(network) -> None:
    reports = []
    rollout = rollout_of(network, hiar(), callback=reports.append)
    rollout.chunks = iter(rollout.chunks)  # their number is unknown
    chunks = hiar().run(rollout)
    first = next(chunks)
    waves_of_first = [(wave - j, j) for wave in range(4) for j in range(wave + 1)]
    assert [(each.chunk.index, each.level) for each in reports] == waves_of_first
    held = chunks.gi_frame.f_locals["latents"]
    assert len(held) == 3
    rest = []
    for x0 in chunks:
        rest.append(x0)
        assert len(held) <= 3
        assert reports[-1].chunk.index == len(rest)
    assert not held
    assert torch.equal(torch.cat([first, *rest], 2), run(network, hiar()))


def test_waves_take_chunk_i_to_level_j_at_i_plus_j() -> None:
    chunks = plan_chunks(THREE, FRAMES)[1]
    taken = []

    def source():
        for chunk in chunks:
            taken.append(chunk.index)
            yield chunk

    for number, wave in enumerate(waves(source())):
        assert taken == list(range(min(number + 1, 5)))
        places = [(place.chunk.index, place.chunk.levels.index(place.level)) for place in wave]
        expected = [(i, number - i) for i in range(5) if 0 <= number - i < 3]
        assert places == expected
        assert all(
            place.below == (place.chunk.levels[j + 1] if j < 2 else None)
            for place, (_, j) in zip(wave, places, strict=True)
        )
    assert number == 5 + 3 - 2
    assert list(waves([])) == []


@pytest.mark.parametrize("window", [-1, 4])
def test_one_level_rolls_as_self_forcing(network, window) -> None:
    one = SF.changed(levels=(1000,), window=window, sink=1 if window > 0 else 0)
    assert torch.equal(run(network, rolling(), one), run(network, preset=one))


@torch.no_grad()
def rolled_by_hand(network, preset) -> Tensor:
    """Rolling Forcing from the formula: every pass in a memory of its own, which holds the last
    committed frames that have room beside the window, each as it was written."""
    plan = RunPlan(preset, FRAMES, HEIGHT, WIDTH)
    memory_plan = replace(plan.memory(TINY, torch.float32), window_frames=FRAMES, sink_frames=0)
    text, noise = network.text(CONTEXT), WhiteNoise(0)
    source = Rollout.of(network, CONTEXT, plan, noise)
    chunks, depth = plan.chunks, len(preset.levels)
    past: list = []  # keys and values of each committed frame, by layer
    done: list[Tensor] = []

    def attend(x: Tensor, times: list[float], frames: tuple[int, ...]):
        memory = GraphMemory(memory_plan)
        if past:
            memory.ledger.commit([frame for frame, _ in past])
            by_layer = zip(*(layers for _, layers in past), strict=True)
            memory.past = [
                KeyValue(*(torch.cat(tensors, 1) for tensors in zip(*frames, strict=True)))
                for frames in by_layer
            ]
        view = memory.view(frames)
        flow = network(x, torch.tensor([times], dtype=torch.float64), text, view)
        return flow, view.new

    x = {chunk.index: source.draw(chunk, chunk.levels[0]) for chunk in chunks}
    for slide in range(len(chunks) + depth - 1):
        window = [chunk for chunk in chunks if 0 <= slide - chunk.index < depth]
        levels = [chunk.levels[slide - chunk.index] for chunk in window]
        frames = tuple(frame for chunk in window for frame in chunk.frames)
        times = [each.t for each, c in zip(levels, window, strict=True) for _ in c.frames]
        room = len(past) if preset.window < 0 else preset.window - len(frames)
        past = past[max(0, len(past) - room) :]
        flow, _ = attend(torch.cat([x[chunk.index] for chunk in window], 2), times, frames)
        flows = flow.split([chunk.length for chunk in window], 2)
        for chunk, level, each in zip(window, levels, flows, strict=True):
            x0 = predict_x0(x[chunk.index], each, level.sigma)
            if level is chunk.levels[-1]:
                done.append(x0)
                _, new = attend(x0, [0.0] * chunk.length, chunk.frames)
                for place, frame in enumerate(chunk.frames):
                    tokens = slice(4 * place, 4 * place + 4)
                    layers = [KeyValue(*(each[:, tokens] for each in new[i])) for i in range(2)]
                    past.append((frame, layers))
            else:
                below = chunk.levels[slide - chunk.index + 1]
                x[chunk.index] = add_noise(x0, source.draw(chunk, below), below.sigma)
    return torch.cat(done, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [-1, 11, 9])
@torch.no_grad()
def test_rolling_is_the_window_worked_by_hand(network, kind, window) -> None:
    """Passes over three chunks of 3, and commits, see the past that has room beside them."""
    preset = THREE.changed(window=window)
    rolled = torch.cat(list(rolling().run(rollout_of(network, rolling(), preset, kind))), 2)
    assert (rolled - rolled_by_hand(network, preset)).abs().max() < 1e-4


@pytest.mark.parametrize("positions", ["absolute", "relative", "sink-adjacent"])
@pytest.mark.parametrize("given", [0, 6])
@torch.no_grad()
def test_both_memories_roll_alike_behind_a_sink(network, positions, given) -> None:
    preset = THREE.changed(window=12, sink=2, positions=positions)
    initial = torch.randn(1, 16, given, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    plan, clips = RunPlan(preset, FRAMES, HEIGHT, WIDTH, given=given), []
    for kind in KINDS:
        rollout = Rollout.of(network, CONTEXT, plan, WhiteNoise(0), memory=kind, initial=initial)
        rollout.commit_given()
        clips.append(torch.cat(list(rolling().run(rollout)), 2))
    assert (clips[0] - clips[1]).abs().max() < 1e-4


@torch.no_grad()
def test_rolling_makes_a_pass_a_slide_and_a_commit_for_all_but_the_last(network) -> None:
    calls, yielded = [], []
    network = tiny_network()
    rollout = rollout_of(network, rolling(), THREE)
    plain = type(network).__call__

    class Counting:
        def __getattr__(self, name):
            return getattr(network, name)

        def __call__(self, x, t, text, view, keys_only=False):
            calls.append((tuple(view.frames), tuple(t[0].tolist()), keys_only))
            return plain(network, x, t, text, view, keys_only)

    rollout.network = Counting()
    for x0 in rolling().run(rollout):
        yielded.append((x0.shape[2], len(calls)))
    high, middle, low = (level.t for level in THREE.chunk_levels())
    starts = [(frames[0], len(frames)) for frames, _, keys_only in calls if not keys_only]
    assert starts == [(0, 3), (0, 6), (0, 9), (3, 9), (6, 8), (9, 5), (12, 2)]
    assert [frames[0] for frames, _, keys_only in calls if keys_only] == [0, 3, 6, 9]
    assert calls[2][1] == (low,) * 3 + (middle,) * 3 + (high,) * 3
    assert calls[3] == ((0, 1, 2), (0.0,), True)
    assert calls[-1][1] == (low,), "one level: one timestep"
    assert [length for length, _ in yielded] == [3, 3, 3, 3, 2]
    assert yielded[0][1] == 4, "the first chunk leaves after as many passes as levels"


@torch.no_grad()
def test_the_page_hears_last_of_the_chunk_that_rolling_finishes(network) -> None:
    reports = []
    rollout = rollout_of(network, rolling(), THREE, callback=reports.append)
    for index, _ in enumerate(rolling().run(rollout)):
        assert (reports[-1].chunk.index, reports[-1].level) == (index, 2)
    counts = [sum(each.chunk.index == index for each in reports) for index in range(5)]
    assert counts == [rolling().passes(chunk) for chunk in rollout.chunks] == [3] * 5


def test_rolling_is_refused_before_anything_is_allocated(network) -> None:
    for preset in (PRESETS["longlive"], SF.changed(window=12, sink=1)):
        with pytest.raises(ValueError, match="window"):
            rolling().check(preset, None)
    rolling().check(SF.changed(window=13, sink=1), None)
    with pytest.raises(ValueError, match="first chunk"):
        rolling().check(PRESETS["causal-forcing-2step"], None)
    with pytest.raises(ValueError, match="refiner"):
        rolling().check(SF, ReflectiveCache())
    plan = RunPlan(PRESETS["longlive"], FRAMES, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="window"):
        next(sample(network, CONTEXT, plan, method=rolling()))


@pytest.mark.parametrize("transition", [Keep(), Recache(6), Flush(1)])
def test_a_new_prompt_holds_for_the_window_that_its_chunk_enters(network, transition) -> None:
    """With three levels the chunk at frame 9 enters when chunk 0 has left and chunk 1 leads."""
    switched = Timeline((Scene(0, CONTEXT), Scene(9, -CONTEXT, transition)))
    same = Timeline((Scene(0, CONTEXT), Scene(9, CONTEXT, Keep())))
    plain = run(network, rolling(), THREE)
    assert torch.equal(run(network, rolling(), THREE, same), plain)
    changed = run(network, rolling(), THREE, switched)
    assert torch.equal(changed[:, :, :3], plain[:, :, :3])
    assert (changed[:, :, 3:6] - plain[:, :, 3:6]).abs().max() > 1e-4


@pytest.mark.parametrize(("method", "keyword"), [(rolling(), "cut"), (ttc(), "cut")])
def test_a_cut_is_refused_by_methods_that_look_across_it(network, method, keyword) -> None:
    preset = SF.changed(positions="relative")
    cut = Timeline((Scene(0, CONTEXT), Scene(9, CONTEXT, Cut(45))))
    with pytest.raises(ValueError, match=keyword):
        run(network, method, preset, cut)


@pytest.mark.parametrize(
    "method", [ttc(count=0), ttc(below=250), choose("ttc:below=100", SAMPLERS, "method")]
)
def test_without_a_corrected_level_ttc_is_self_forcing(network, method) -> None:
    assert torch.equal(run(network, method), run(network))
    assert method.caches(SF.chunk_levels()) == ()
    assert "nothing" in method.note(SF.levels, ())
    assert [method.passes(chunk) for chunk in plan_chunks(SF, 6)[1]] == [4, 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("anchor", "frames"), [(1, FRAMES), (3, 8), (5, 9), (1, 5)])
@torch.no_grad()
def test_ttc_predicts_with_the_first_frames_as_only_history(network, kind, anchor, frames) -> None:
    """By hand: the anchor's keys are those of the first clean chunks in a memory of their own."""
    method = ttc(below=600, count=1, anchor=anchor)
    rollout = rollout_of(network, method, kind=kind, frames=frames)
    result = list(method.run(rollout))
    plan = RunPlan(SF, frames, HEIGHT, WIDTH)
    hand = Rollout.of(network, CONTEXT, plan, WhiteNoise(0))
    hand.last = plan.chunks[-1]
    full = replace(plan.memory(TINY, torch.float32), window_frames=frames, sink_frames=0)
    anchored = GraphMemory(full)
    for chunk, made in zip(plan.chunks, result, strict=True):
        x0 = hand.predict(hand.draw(chunk, chunk.levels[0]), chunk.levels[0], chunk)
        for level in chunk.levels[1:]:
            x0 = hand.predict(hand.renoise(x0, level, chunk), level, chunk)
            if chunk.index and level.step < 600:
                x = hand.renoise(x0, level, chunk, 1)
                t = torch.full((1, 1), level.t, dtype=torch.float64)
                flow = network(x, t, hand.text, anchored.view(chunk.frames))
                x0 = predict_x0(x, flow, level.sigma)
                x0 = hand.predict(hand.renoise(x0, level, chunk, 2), level, chunk)
        assert (x0 - made).abs().max() < 1e-4
        hand.commit(x0, chunk)
        if chunk.start < anchor:
            zero = torch.zeros(1, 1, dtype=torch.float64)
            network(x0, zero, hand.text, anchored.view(chunk.frames), keys_only=True)
            anchored.commit()
            keep = [held for held in anchored.ledger.held if held.frame < anchor]
            stored = [held.frame for held in anchored.ledger.held]
            anchored.ledger.held = keep
            anchored._evict(stored)


def test_ttc_takes_two_passes_a_correction_and_its_memory_is_counted(network) -> None:
    method, reports = ttc(count=2, anchor=2), []
    plan = RunPlan(SF, FRAMES, HEIGHT, WIDTH)
    run(network, method, callback=reports.append)
    assert [method.passes(chunk) for chunk in plan.chunks] == [4, 12, 12, 12, 12]
    assert len(reports) == 4 + 4 * 12
    caches = method.caches(plan.chunks[-1].levels)
    assert caches == (FirstFrames(2),)
    rollout = rollout_of(network, method)
    held = rollout.memory.nbytes + rollout.caches[FirstFrames(2)].nbytes
    assert plan.memory_bytes(TINY, torch.float32, caches=caches) == held
    assert rollout.caches[FirstFrames(2)].plan.window_frames == 5
    for wrong in ({"count": -1}, {"anchor": 0}):
        with pytest.raises(ValueError, match="anchor"):
            ttc(**wrong)


@pytest.mark.parametrize(("anchor", "refined"), [(1, True), (4, False)])
def test_a_corrected_run_goes_on_as_if_it_had_not_stopped(network, anchor, refined) -> None:
    refiner = Refiner(merged(network, pairs_for(network)), ReflectiveCache()) if refined else None
    preset = SF.changed(window=7, sink=1)
    whole = run(network, ttc(anchor=anchor), preset, refiner=refiner)
    rest = run(network, ttc(anchor=anchor), preset, initial=whole[:, :, :6], refiner=refiner)
    assert torch.equal(rest, whole[:, :, 6:])
    assert not torch.equal(whole, run(network, preset=preset, refiner=refiner))


def test_methods_that_begin_later_chunks_say_that_they_do_not_go_on() -> None:
    assert {name for name, make in SAMPLERS.items() if not make().goes_on} == {"hiar", "rolling"}


def test_repeats_are_set_by_level_in_text() -> None:
    method = choose("self-refine:750=3,500=0,250=1,threshold=0.3,enough=0.9", SAMPLERS, "method")
    expected = self_refine({750: 3, 500: 0, 250: 1}, threshold=0.3, enough=0.9)
    (chunk,) = plan_chunks(SF, 3)[1]
    assert method.passes(chunk) == expected.passes(chunk) == 8
    assert choose("self-refine:750=3", SAMPLERS, "method").passes(chunk) == 8  # 500 stays
    for wrong, message in (("750=x", "whole"), ("750=-1", "repeats"), ("x=1", "750=2, 500=1")):
        with pytest.raises(ValueError, match=message):
            choose(f"self-refine:{wrong}", SAMPLERS, "method")
    with pytest.raises(ValueError, match="knobs are none"):
        choose("ode:750=1", SAMPLERS, "method")


def test_a_job_checks_and_counts_a_method(files, tmp_path) -> None:
    def job(*more: str):
        return prepare(parse(command(files, tmp_path / "a.mp4", *more)))

    plain, anchored, rolled = job(), job("--method", "ttc"), job("--method", "rolling")
    assert rolled.estimate.activations > 2 * plain.estimate.activations  # 9 frames instead of 3
    assert rolled.estimate.kv == plain.estimate.kv
    assert plain.estimate.kv < anchored.estimate.kv < 1.5 * plain.estimate.kv
    with pytest.raises(ValueError, match="rolling"):
        job("--method", "rolling", "--window", "6")
    given = ("--extend", str(files / "six.safetensors"), "--size", "64x64")
    for name, said in (("rolling", True), ("hiar", True), ("ttc", False)):
        lines = " ".join(notes(job("--method", name, *given)))
        assert ("not interrupted" in lines) is said
    assert "nothing" in " ".join(notes(job("--method", "ttc:below=100")))
    assert not any("nothing" in line for line in notes(anchored))


@torch.no_grad()
def test_a_refiner_reads_the_memory_of_the_prediction_before_its_noise(network) -> None:
    seen = []

    class Recording:
        cache = ReflectiveCache()

        def at(self, level) -> bool:
            return level.step < 1000

        def text(self, context, batch=None) -> list:
            return []

        def residual(self, noise, x0, level, chunk, memory, *_) -> Tensor:
            seen.append((chunk.index, level.step, memory.plan.window_frames))
            return torch.zeros_like(noise)

    rollout = rollout_of(network, ttc(), frames=6, refiner=Recording())
    assert torch.equal(
        torch.cat(list(ttc().run(rollout)), 2),
        torch.cat(list(ttc().run(rollout_of(network, ttc(), frames=6))), 2),
    )
    assert [step for index, step, _ in seen if not index] == [750, 500, 250]
    windows = [(step, window) for index, step, window in seen if index]
    corrected = [(step, window) for step in (500, 250) for window in (6, 6, 4)]
    assert windows == [(750, 6), *corrected]
