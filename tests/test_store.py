"""Stores of the sampling memory: what they return, their bytes, and the clips made with them."""

from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.estimate import Estimate
from autorefiner.refiner.job import notes, prepare
from autorefiner.refiner.memory.policies import EmaSink, TopFrames, Window
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.memory.store import PlainStore, Slots, Store
from autorefiner.refiner.memory.stores import STORES, Int8Store, OffloadStore
from autorefiner.refiner.noise.refiner import Refiner, merged
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.outputs import differences
from autorefiner.refiner.rollout import Rollout
from autorefiner.refiner.run_plan import RunPlan
from autorefiner.refiner.sample import sample
from autorefiner.refiner.samplers import best_of_n, hiar, self_forcing, self_refine
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.timeline import Flush, Scene, Timeline
from autorefiner.refiner.wan.causal import KeyValue
from autorefiner.refiner.wan.rope import rotation_table

from tiny import TINY, tiny_network
from tiny_command import command, parse, write_files
from tiny_refiner import pairs_for
from tiny_reward import indifferent

SF = PRESETS["self-forcing"].changed(levels=(1000, 500))
CONTEXT = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
DEEP = replace(TINY, num_layers=3)  # more layers than a store has on the device
NEAR = 2e-2  # of latents, between int8 and plain
SLOTS = Slots(3, 2, 5, 6, 4, 32, torch.float32)
CPU = torch.device("cpu")


class Watched(OffloadStore):
    """Spoils what a buffer held before a layer is copied to it, and counts copies."""

    def __init__(self, slots: Slots, device: torch.device | str) -> None:
        super().__init__(slots, device)
        self.loaded, self.late = 0, 0

    def _fetch(self, layer: int) -> KeyValue:
        self.late += all(buffer.layer != layer for buffer in self.buffers)
        return super()._fetch(layer)

    def _copy(self, source: KeyValue, target: KeyValue, first: int, end: int) -> None:
        if any(target is buffer.content for buffer in self.buffers):
            self.loaded += 1
            for tensor in target:
                tensor.fill_(torch.nan)
        super()._copy(source, target, first, end)


EACH = pytest.mark.parametrize("store", STORES.values(), ids=STORES)
OTHERS = {Watched: 0, Int8Store: NEAR}  # and how far their latents may be from the plain ones


def refiner_of(previous: str | None) -> Refiner | None:
    network = tiny_network(DEEP)
    cache = ReflectiveCache("shared", previous or "none")
    return Refiner(merged(network, pairs_for(network)), cache) if previous else None


@torch.no_grad()
def clip_and_rollout(plan: RunPlan, method=None, context=CONTEXT, **options):
    method, network = method or self_forcing(), tiny_network(DEEP)
    caches = method.caches(plan.chunks[-1].levels)
    rollout = Rollout.of(network, context, plan, WhiteNoise(0), caches=caches, **options)
    return torch.cat(list(method.run(rollout)), 2), rollout


def clip(*arguments, **options) -> Tensor:
    return clip_and_rollout(*arguments, **options)[0]


def near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() <= tolerance)


def fits(store: type[Store], plan: RunPlan, plain: Tensor, *arguments, **options) -> bool:
    """Whether a store's clip is as far from the plain one's as it says: not at all, if exact."""
    other = clip(replace(plan, store=store), *arguments, **options)
    return near(other, plain, OTHERS[store]) and torch.equal(other, plain) == store.exact


@pytest.mark.parametrize("previous", [None, "pending", "joint", "none"])
@pytest.mark.parametrize(
    ("keys", "policy"), [("rotated", Window()), ("raw", TopFrames(k=1)), ("raw", EmaSink(0.5))]
)
def test_another_store_gives_the_same_clip(previous, keys, policy) -> None:
    plan = RunPlan(SF.changed(window=7, sink=1), 11, 4, 6, batch=2, keys=keys, policy=policy)
    plain = clip(plan, refiner=refiner_of(previous))
    for store in OTHERS:
        assert fits(store, plan, plain, refiner=refiner_of(previous))


@pytest.mark.parametrize("method", [hiar(), self_refine({500: 1}, threshold=0.5)])
def test_another_store_in_other_methods(method) -> None:
    plan = RunPlan(SF.changed(window=7, sink=1), 11, 4, 6, batch=2)
    plain = clip(plan, method)
    for store in OTHERS:
        assert fits(store, plan, plain, method)


def test_another_store_after_a_flush() -> None:
    plan = RunPlan(SF.changed(window=7, sink=2), 14, 4, 6)
    prompts = Timeline((Scene(0, CONTEXT), Scene(9, -CONTEXT, Flush(1))))
    without_flush = Timeline((Scene(0, CONTEXT), Scene(9, -CONTEXT)))
    plain = clip(plan, context=prompts)
    for store in OTHERS:
        assert fits(store, plan, plain, context=prompts)
    assert not near(plain, clip(plan, context=without_flush), 1e-4)


@pytest.mark.parametrize("previous", [None, "pending", "joint"])
def test_offloaded_layers_are_there_before_they_are_read(previous) -> None:
    plan = RunPlan(SF, 9, 4, 6, store=Watched)
    _, rollout = clip_and_rollout(plan, refiner=refiner_of(previous))
    store = rollout.memory.store
    assert store.late == 1, "the first layer of the first pass alone"
    assert store.loaded > 3 * DEEP.num_layers


@EACH
def test_stores_write_pick_and_move_alike(store) -> None:
    random, generator = Random(0), torch.Generator().manual_seed(0)
    plain, other = PlainStore(SLOTS, "cpu"), store(SLOTS, "cpu")
    stores = plain, other
    whole = [torch.zeros(SLOTS.shape) for _ in range(2)]
    for layer in range(SLOTS.layers):
        for each in stores:
            each.put(layer, [(0, 0, SLOTS.frames)], *whole)

    def same() -> None:
        layer, count = random.randrange(SLOTS.layers), random.randint(1, SLOTS.frames)
        other.prefetch(random.randrange(SLOTS.layers))
        for one, two in zip(*(each.prefix(layer, count) for each in stores), strict=True):
            assert one.shape == two.shape and near(one, two, 0 if store.exact else 0.02)
        slots = torch.tensor([[random.randrange(SLOTS.frames) for _ in range(3)] for _ in "ab"])
        picked = (each.pick(layer, slots) for each in stores)
        for one, two in zip(*picked, strict=True):
            assert one.shape == two.shape and near(one, two, 0 if store.exact else 0.02)

    for turn in range(40):
        first = random.randint(0, 2)
        pieces = [(first, 0, 1), (first + 1, 1, 2)]
        new = [torch.randn(2, 3 * 6, 4, 32, generator=generator) for _ in range(2)]
        layer = random.randrange(SLOTS.layers)
        for each in stores:
            each.prefetch(random.randrange(SLOTS.layers))
            each.put(layer, pieces, *new)
        if turn % 8 == 7:
            order = random.sample(range(SLOTS.frames), SLOTS.frames)
            for each in stores:
                each.move(order)
        same()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_store_by_hand(dtype) -> None:
    slots, size = replace(SLOTS, dtype=dtype), dtype.itemsize
    values = 2 * 5 * 6 * 4 * 32  # of the keys of a layer
    scales = 4 * (2 * 5 * 4 * 32) + 4 * (2 * 5 * 6 * 4)
    pinned = {4: 32768, 2: 16384}[size]  # 7,680 values, rounded up
    assert PlainStore.count_bytes(slots) == 3 * 2 * values * size
    assert Int8Store.count_bytes(slots) == 3 * (2 * values + scales) + 2 * values * size
    assert OffloadStore.count_bytes(slots) == 2 * 2 * values * size
    assert OffloadStore.count_host_bytes(slots) == 3 * 2 * pinned


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_store_are_known_and_do_not_grow(store, dtype) -> None:
    slots = replace(SLOTS, dtype=dtype)
    each = store(slots, "cpu")
    sizes = store.count_bytes(slots), store.count_host_bytes(slots)
    assert (each.nbytes, each.host_nbytes) == sizes
    for layer in range(slots.layers):
        each.put(layer, [(0, 0, 5)], *(torch.ones(slots.shape, dtype=dtype) for _ in range(2)))
        each.prefix(layer, 5)
    assert (each.nbytes, each.host_nbytes) == sizes
    each.free()
    assert (each.nbytes, each.host_nbytes) == (0, 0)


def test_a_plan_counts_the_store_on_its_device_and_in_the_host() -> None:
    plan = RunPlan(SF.changed(window=9), 14, 4, 6, batch=2, keys="raw", store=OffloadStore)
    memory = plan.memory(TINY, torch.float32, refined=True)
    device, host = (
        OffloadStore.count_bytes(memory.slots),
        OffloadStore.count_host_bytes(memory.slots),
    )
    rotated = memory.layer_bytes
    assert memory.slots.frames == 12, "the window and a refined chunk"
    assert memory.bytes_on(torch.device("cuda")) == (device + rotated, host)
    assert memory.bytes_on(CPU) == (device + rotated + host, 0)
    assert RingMemory(memory).nbytes == device + rotated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-2, 1.0, 300.0])
def test_int8_of_what_int8_returned_has_the_same_bytes(dtype, size) -> None:
    store = Int8Store(replace(SLOTS, dtype=dtype), "cpu")
    generator = torch.Generator().manual_seed(0)
    new = [(size * torch.randn(SLOTS.shape, generator=generator)).to(dtype) for _ in range(2)]
    new[0][:, :, 0, :3] = 0
    store.put(1, [(0, 0, 5)], *new)
    read = [part.clone() for part in store.prefix(1, 5)]
    held = [part.clone() for part in (*store.codes[1], *store.scales[1])]
    store.put(1, [(0, 0, 5)], *read)
    now = (*store.codes[1], *store.scales[1])
    assert all(torch.equal(one, two) for one, two in zip(held, now, strict=True))
    assert not read[0][:, :, 0, :3].any() and store.scales[1].key.min() > 0


def test_int8_has_a_scale_for_each_channel_of_keys_and_each_value() -> None:
    store, generator = Int8Store(SLOTS, "cpu"), torch.Generator().manual_seed(0)
    key, value = (torch.randn(SLOTS.shape, generator=generator) for _ in range(2))
    key[:, :6, :, 5] *= 1000  # a channel of the first frame
    value[:, 7] *= 1000  # a token
    store.put(0, [(0, 0, 5)], key, value)
    read = store.prefix(0, 5)
    frames = (each.unflatten(1, (5, 6)) for each in (read.key - key, key))
    wrong, right = frames
    step = right.abs().amax(2, keepdim=True) / 127
    assert (wrong.abs() <= 0.501 * step).all()
    assert ((read.value - value).abs() <= 0.501 * value.abs().amax(3, keepdim=True) / 127).all()


def test_int8_writes_a_frame_and_leaves_the_others() -> None:
    store, generator = Int8Store(SLOTS, "cpu"), torch.Generator().manual_seed(0)
    new = [torch.randn(SLOTS.shape, generator=generator) for _ in range(2)]
    store.put(0, [(0, 0, 5)], *new)
    held = [part.clone() for part in (*store.codes[0], *store.scales[0])]
    store.put(0, [(3, 1, 1)], *(100 * part for part in new))
    for before, now in zip(held, (*store.codes[0], *store.scales[0]), strict=True):
        changed = (before != now).flatten(2).any(2).any(0)
        assert changed.tolist() == [False, False, False, True, False]


def test_int8_reads_every_layer_into_the_same_place() -> None:
    store = Int8Store(SLOTS, "cpu")
    one, two = (store.prefix(layer, 5) for layer in range(2))
    assert [part.data_ptr() for part in one] == [part.data_ptr() for part in two]
    assert one.key.data_ptr() != one.value.data_ptr()


@EACH
def test_a_sample_that_keeps_its_pending_keys_has_the_same_bytes(store) -> None:
    plan = RunPlan(SF.changed(window=7, sink=1), 14, 4, 6, batch=2, store=store)
    memory = RingMemory(plan.memory(TINY, torch.float32))
    plan, generator = memory.plan, torch.Generator().manual_seed(0)
    shape = (2, 3 * plan.frame_tokens, plan.heads, plan.head_dim)

    def write(keep: Tensor | None, start: int) -> KeyValue:
        view = memory.view(range(start, start + 3), keep)
        key, value = (torch.randn(shape, generator=generator) for _ in range(2))
        table = rotation_table(view.positions, plan.height, plan.width, plan.head_dim, like=key)
        return KeyValue(*(part.clone() for part in view.extend(1, key, value, table, key)))

    for start in (0, 3):
        write(None, start)
        memory.commit()
    before = write(None, 6)  # wraps around the ring
    after = write(torch.tensor([True, False]), 6)
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])


def test_candidates_read_by_the_policy() -> None:
    network, frames = tiny_network(), 9

    def chosen(policy: TopFrames | None) -> Tensor:
        plan = RunPlan(SF, frames, 4, 6, **({"policy": policy} if policy else {}))
        method = best_of_n(indifferent, 2)
        return torch.cat(list(sample(network, CONTEXT, plan, method=method)), 2)

    assert torch.equal(chosen(TopFrames(k=frames)), chosen(None))
    assert not torch.equal(chosen(TopFrames(k=1, recent=1)), chosen(None))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def test_generate_takes_a_store(files, tmp_path) -> None:
    jobs = {
        store: prepare(parse(command(files, tmp_path / "a.mp4", "--store", store)))
        for store in STORES
    }
    assert all(job.plan.store is STORES[store] for store, job in jobs.items())
    before = jobs["plain"].metadata
    assert jobs["offload"].metadata == before, "the clip is the same"
    assert "store plain (now int8)" in differences(before, jobs["int8"].metadata, 0)
    assert any("saves nothing" in note for note in notes(jobs["offload"]))


def test_a_dry_run_counts_the_store(files, tmp_path) -> None:
    def kv(*extra: str) -> int:
        return prepare(parse(command(files, tmp_path / "a.mp4", "--dry-run", *extra))).estimate.kv

    plan = RunPlan(SF, 9, 4, 6, store=Int8Store).memory(TINY, torch.float32)
    assert kv("--store", "int8") == plan.nbytes < kv()
    assert kv("--store", "int8", "--method", "hiar") == 4 * plan.nbytes


def test_an_estimate_has_the_host_apart() -> None:
    parts = Estimate(weights=9, kv=1, text_kv=0, activations=0, decode=0, kv_host=10**9)
    assert parts.total == 10 and "1.000 GB" in parts.lines()
    assert "host" not in replace(parts, kv_host=0).lines()
    with pytest.raises(ValueError, match="host"):
        replace(parts, kv_host=10**18).check(10)


def test_an_unknown_store_is_refused(files, tmp_path) -> None:
    options = replace(parse(command(files, tmp_path / "a.mp4")), store="disk")
    with pytest.raises(ValueError, match="offload"):
        prepare(options)
