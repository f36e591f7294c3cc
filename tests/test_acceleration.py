"""Compiled parts and replayed passes: the clips of plain runs, and what happens where they fail.

No GPU is needed: `Repeated` stands in for a CUDA graph. It repeats the captured call, with the view
and the inputs of the capture, so a pass that differs in anything else gives another clip.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerated_runs import CONTEXT, FRAMES, OTHER, WINDOW, clip
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autorefiner.refiner.acceleration import Acceleration
from autorefiner.refiner.bench import SIZES, BenchSize, bench
from autorefiner.refiner.cli import main
from autorefiner.refiner.job import notes, prepare
from autorefiner.refiner.memory.policies import POLICIES, Window
from autorefiner.refiner.memory.reflect import ReflectiveCache, reflect
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.memory.stores import STORES, Int8Store, OffloadStore
from autorefiner.refiner.noise.refiner import Branches, Refiner, merged
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.samplers import hiar, self_refine
from autorefiner.refiner.timeline import Flush, Scene, Timeline
from autorefiner.refiner.wan import graphs
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.graphs import MOST, Replays

from tiny import TINY, tiny_network
from tiny_command import command, parse, write_files
from tiny_refiner import pairs_for

PROMPTS = Timeline((Scene(0, CONTEXT), Scene(11, OTHER, Flush(1)), Scene(14, CONTEXT)))


class Repeated:
    """Captures on a CPU; counts captures and replays."""

    def __init__(self) -> None:
        self.captures, self.replays = 0, 0

    def __call__(self, function: Callable[[], Tensor | None], warm: int, pool: object) -> tuple:
        for _ in range(warm):
            result = function()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            again = function()
            if result is not None:
                result.copy_(again)

        return SimpleNamespace(replay=replay), result


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> Repeated:
    stand_in = Repeated()
    monkeypatch.setattr(graphs, "capture", stand_in)
    return stand_in


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def replaying(network: CausalWan, small: bool = True) -> CausalWan:
    """Return the network with replayed passes."""
    replays = Replays(network)
    replays.small = small
    return replace(network, execute=replays)


def test_passes_are_captured_once_and_replayed(repeated: Repeated) -> None:
    """A ring of 5 slots: chunks 5 to 9 fill it anew, 10 to 15 repeat their passes.

    Each of the chunks 10 to 14 makes 2 denoise passes and writes; 15, the last, does not write.
    """
    network = tiny_network()
    assert torch.equal(clip(replaying(network, small=False)), clip(network))
    assert (repeated.captures, repeated.replays) == (5 * 2, 5 * 3 + 2)


def test_a_small_network_is_captured_within_a_chunk(repeated: Repeated) -> None:
    network = tiny_network()
    assert torch.equal(clip(replaying(network)), clip(network))
    # the second denoise pass of chunks 0 to 9, then writes of 10 to 14
    assert (repeated.captures, repeated.replays) == (10 + 5, 10 + 5 * 3 + 2)


RUNS = [
    dict(preset=WINDOW.changed(positions="relative")),
    dict(preset=WINDOW.changed(positions="sink-adjacent")),
    dict(preset=WINDOW.changed(chunk=3, window=7)),
    dict(store=Int8Store),
    dict(batch=2),
    dict(context=PROMPTS),
    dict(context=PROMPTS, preset=WINDOW.changed(positions="relative")),
    dict(preset=WINDOW.changed(window=-1)),
    dict(method=self_refine()),
    dict(method=hiar()),
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("small", [True, False])
def test_a_replayed_run_is_the_plain_one(repeated: Repeated, run: dict, small: bool) -> None:
    network = tiny_network()
    assert torch.equal(clip(replaying(network, small), **run), clip(network, **run))
    assert not small or repeated.replays


@pytest.mark.parametrize("history", ["shared", "none"])
@pytest.mark.parametrize("previous", ["pending", "joint", "none"])
@pytest.mark.parametrize("form", ["merged", "unmerged"])
def test_refine_passes_are_replayed(
    repeated: Repeated, history: str, previous: str, form: str
) -> None:
    network, cache = tiny_network(), ReflectiveCache(history, previous)
    branches = Branches(network.model, pairs_for(network))
    refiners = {
        "merged": Refiner(merged(network, pairs_for(network)), cache, frozenset((500,))),
        "unmerged": Refiner(network, cache, frozenset((500,)), on=branches.on),
    }
    refiner = refiners[form]
    base = clip(replaying(network))
    before = repeated.replays
    faster = replace(refiner, network=replaying(refiner.network))
    assert torch.equal(clip(replaying(network), refiner=faster), clip(network, refiner=refiner))
    assert not torch.equal(clip(network, refiner=refiner), base)
    # chunk 5 is the first whose refine pass comes again, in chunk 10
    assert repeated.replays == 2 * before + 6


def test_passes_that_vary_are_not_replayed(repeated: Repeated) -> None:
    network = tiny_network()
    for policy in (policy() for policy in POLICIES.values() if policy is not Window):
        run = dict(policy=policy, preset=WINDOW.changed(positions="relative"))
        assert torch.equal(clip(replaying(network), **run), clip(network, **run))
    clip(replaying(network), store=OffloadStore)
    assert repeated.captures == 0


@torch.no_grad()
def test_samples_that_keep_their_pending_keys_are_not_replayed(repeated: Repeated) -> None:
    network = replaying(tiny_network())
    rollout = Rollout.of(network, CONTEXT, RunPlan(WINDOW, 2, 4, 4), WhiteNoise(0))
    chunk = rollout.chunks[0]
    x = rollout.begin(chunk)
    for _ in range(3):
        rollout.predict(x, chunk.levels[0], chunk, keep_pending=torch.tensor([True]))
    assert repeated.captures == 0


def test_a_refine_pass_is_none_that_predicts() -> None:
    plan = RunPlan(WINDOW, 2, 4, 4).memory(TINY, torch.float32, refined=True)
    memory = RingMemory(plan)
    views = [memory.view((0,))]
    caches = [ReflectiveCache("shared", previous) for previous in ("pending", "joint", "none")]
    views += [reflect(memory, (0,), cache) for cache in caches]
    assert len({view.kind.places for view in views}) == 4
    assert {view.kind.chunk for view in views} == {(0,)}


@torch.no_grad()
def test_passes_of_other_shapes_are_other_passes(repeated: Repeated) -> None:
    """A timestep for all frames and one for each are of different shapes; results stay valid."""
    network = tiny_network()
    results = []
    for each in (network, replaying(network)):
        memory = RingMemory(RunPlan(WINDOW, 2, 4, 4).memory(network.config, torch.float32))
        text, x = each.text(CONTEXT), torch.randn(1, 16, 2, 4, 4, generator=seeded(3))
        times = [torch.tensor(t).double() for t in ([[750]], [[750]], [[750, 250]], [[750, 250]])]
        results.append([each(x, t, text, memory.view((0, 1))) for t in times])
        results[-1].append(each(2 * x, times[0], text, memory.view((0, 1))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert (repeated.captures, repeated.replays) == (2, 3)


class Graph:
    """A graph of a pool; it repeats a call."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


class Pools(Repeated):
    """Captures into pools as torch does: a pool ends with its last graph and takes no other."""

    def __init__(self) -> None:
        super().__init__()
        self.used = False
        self.alive = weakref.WeakSet()

    def __call__(self, function: Callable[[], Tensor | None], warm: int, pool: object) -> tuple:
        if self.used and not self.alive:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        stand_in, result = super().__call__(function, warm, pool)
        graph, self.used = Graph(stand_in.replay), True
        self.alive.add(graph)
        return graph, result


def test_another_prompt_is_captured_into_the_same_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    pools, network = Pools(), tiny_network()
    monkeypatch.setattr(graphs, "capture", pools)
    faster = replaying(network)
    assert torch.equal(clip(faster, PROMPTS), clip(network, PROMPTS))
    assert faster.execute.on and not faster.execute.former
    faster.execute.free()
    assert not pools.alive


def test_tables_that_a_graph_reads_are_held(repeated: Repeated) -> None:
    network = replaying(tiny_network())
    clip(network, preset=WINDOW.changed(positions="relative"))
    assert len(network.execute.tables) > 1


def test_a_run_goes_on_where_nothing_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> tuple:
        raise RuntimeError("CUDA error: out of luck\nand more")

    monkeypatch.setattr(graphs, "capture", fails)
    network = tiny_network()
    with pytest.warns(UserWarning, match="out of luck") as caught:
        assert torch.equal(clip(replaying(network)), clip(network))
    assert len(caught) == 1


def test_a_pass_is_captured_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        devices.append(tensor.device)
        yield
        devices.pop()

    def fails(*_: object) -> tuple:
        raise RuntimeError(f"captured on {devices}")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(graphs, "capture", fails)
    with pytest.warns(UserWarning, match="type='cpu'"):
        clip(replaying(tiny_network()), frames=2)


def test_a_full_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> tuple:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(graphs, "capture", fails)
    with pytest.raises(torch.OutOfMemoryError):
        clip(replaying(tiny_network()))


def test_graphs_do_not_grow_with_the_clip(repeated: Repeated) -> None:
    """With sink-adjacent positions every chunk rotates its window to other positions."""
    preset = WINDOW.changed(positions="sink-adjacent", levels=(1000,))
    network = replaying(tiny_network())
    plan = RunPlan(preset, MOST, 4, 4)
    for _ in sample(network, CONTEXT, plan):
        assert len(network.execute.seen) <= MOST
        assert len(network.execute.captured) <= MOST
    assert len(network.execute.seen) == MOST


def test_an_accelerated_run_leaves_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Repeated()
    monkeypatch.setattr(graphs, "capture", stand_in)
    monkeypatch.setattr(Acceleration, "replays", lambda *_: True)
    network, cpu = tiny_network(), torch.device("cpu")
    refiner = Refiner(merged(network, pairs_for(network)), levels=frozenset((500,)))
    with Acceleration(graphs="auto").attached(network, refiner, cpu) as (faster, refined):
        assert torch.equal(clip(faster, refiner=refined), clip(network, refiner=refiner))
        executes = faster.execute, refined.network.execute
        assert all(each.captured for each in executes)
    assert not any(each.captured or each.tables or each.text for each in executes)


def test_a_run_without_acceleration_stays_as_it_is() -> None:
    network, cpu = tiny_network(), torch.device("cpu")
    refiner = Refiner(network)
    for plain in (Acceleration(), Acceleration(graphs="auto")):  # a CPU replays nothing
        with plain.attached(network, refiner, cpu) as same:
            assert same == (network, refiner)


class OnDevice(TorchDispatchMode):
    """Fails if an operation on the meta device takes a tensor with values from the CPU."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        kinds = {each.device.type for each in tensors if each.ndim}
        assert kinds != {"cpu", "meta"}, f"{function} takes a tensor from the CPU"
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(
    ("positions", "store", "previous"),
    [
        ("absolute", "plain", "pending"),
        ("relative", "int8", "joint"),
        ("relative", "plain", "none"),
    ],
)
def test_a_replayed_pass_needs_nothing_from_the_cpu(
    positions: str, store: str, previous: str, repeated: Repeated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph would read it where it was. On the meta device nothing has a value to read."""
    network = tiny_network()
    network.model.to("meta")
    preset = WINDOW.changed(positions=positions, window=3)
    plan = RunPlan(preset, 6, 4, 4, store=STORES[store])
    refiner = Refiner(replaying(network), ReflectiveCache("shared", previous), frozenset((500,)))
    stand_in = graphs.capture

    def watched(function: Callable[[], Tensor | None], warm: int, pool: object) -> tuple:
        with OnDevice():
            return stand_in(function, warm, pool)

    monkeypatch.setattr(graphs, "capture", watched)
    for _ in sample(replaying(network), CONTEXT, plan, refiner=refiner):
        pass
    # chunks 0 to 2 repeat the denoise pass, 3 and 4 write and refine as 1 and 2 did
    assert repeated.captures == 3 + 2 * 2


def test_notes_name_what_does_nothing() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    plan = RunPlan(WINDOW.changed(positions="relative"), FRAMES, 4, 4)
    config = tiny_network().config

    def told(acceleration: Acceleration, device: torch.device, **changes) -> list[str]:
        return acceleration.notes(replace(plan, **changes).memory(config, torch.float32), device)

    graphs = Acceleration(graphs="auto")
    assert told(Acceleration(compile=True), cpu) == told(graphs, cuda) == []
    assert len(told(graphs, cpu)) == 1 and "cpu" in told(graphs, cpu)[0]
    assert "offload" in told(graphs, cuda, store=OffloadStore)[0]
    assert "ema-sink" in told(graphs, cuda, policy=POLICIES["ema-sink"]())[0]
    with pytest.raises(ValueError, match="graphs"):
        Acceleration(graphs="always")


def test_the_command_says_how_long_it_compiled(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    write_files(tmp_path)
    plain, faster = tmp_path / "plain.mp4", tmp_path / "faster.mp4"
    assert main(command(tmp_path, plain)) == 0
    assert "compiling" not in capsys.readouterr().out
    assert main(command(tmp_path, faster, "--compile", "--graphs", "auto")) == 0
    text = capsys.readouterr()
    assert "compiling included" in text.out and "graphs do nothing on cpu" in text.err


def test_graphs_take_the_activations_of_a_pass_again(tmp_path, monkeypatch) -> None:
    write_files(tmp_path)
    out = tmp_path / "clip.mp4"
    plain = prepare(parse(command(tmp_path, out)))
    monkeypatch.setattr(Acceleration, "replays", lambda each, _: each.graphs == "auto")
    replayed = prepare(parse(command(tmp_path, out, "--graphs", "auto")))
    assert replayed.estimate.activations == 2 * plain.estimate.activations
    assert replayed.estimate == replace(plain.estimate, activations=replayed.estimate.activations)
    assert any("graphs" in note for note in notes(replayed)) and not notes(plain)
    stored = command(tmp_path, out, "--store", "offload")
    idle = prepare(parse([*stored, "--graphs", "auto"]))
    assert idle.estimate == prepare(parse(stored)).estimate


def test_the_bench_counts_compiling_apart(monkeypatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", BenchSize(TINY, 4, 4, 8))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    cpu = torch.device("cpu")
    report = bench("tiny", cpu, torch.float32, 2, acceleration=Acceleration(compile=True))
    assert report.compile_s > 0 and "compiling" in report.table()
