"""K/V memory: bytes, windows, sinks, raw keys, and two implementations that agree."""

import pytest
import torch

from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.positions import Cut, Relative
from autorefiner.refiner.memory.ring import RingMemory, runs
from autorefiner.refiner.wan.rope import rotation_table, span

from tiny import TINY

FRAMES = 14
CHUNKS = [(start, min(3, FRAMES - start)) for start in range(0, FRAMES, 3)]


def make(kind, *, window=-1, sink=0, **options):
    plan = MemoryPlan.of(
        TINY, (2, 16, FRAMES, 4, 6), window_frames=window, sink_frames=sink, **options
    )
    return kind(plan)


def feed(memory, events=None) -> list[dict[int, torch.Tensor]]:
    """Write fixed K/V chunk by chunk, a noisy and a clean pass each; return what each chunk sees.

    That is the rotated key and the value of every token, by temporal position.
    """
    plan, seen = memory.plan, []
    generator = torch.Generator().manual_seed(0)
    for start, length in CHUNKS:
        if events and start in events:
            events[start](memory)
        shape = (plan.batch, length * plan.frame_tokens, plan.heads, plan.head_dim)
        for _ in range(2):
            key, value = (torch.randn(shape, generator=generator) for _ in range(2))
            view = memory.view(span(start, length))
            table = rotation_table(view.positions, plan.height, plan.width, plan.head_dim, like=key)
            for layer in range(plan.layers):
                read = view.extend(layer, key, value, table, key)
        seen.append(torch.cat([part.flatten(2) for part in read], -1).sort(dim=1).values)
        memory.commit()
    return seen


@pytest.mark.parametrize("keys", ["rotated", "raw"])
@pytest.mark.parametrize(("window", "sink"), [(-1, 0), (6, 0), (9, 3), (7, 1), (8, 4), (5, 2)])
def test_ring_and_graph_memory_show_the_same(window, sink, keys) -> None:
    ring, graph = (
        feed(make(kind, window=window, sink=sink, keys=keys)) for kind in (RingMemory, GraphMemory)
    )
    assert [a.shape for a in ring] == [b.shape for b in graph]
    assert all(torch.equal(a, b) for a, b in zip(ring, graph, strict=True))


@pytest.mark.parametrize(("window", "sink"), [(-1, 0), (9, 3), (7, 1)])
def test_raw_keys_rotated_on_read_equal_rotated_keys(window, sink) -> None:
    raw, rotated = (
        feed(make(RingMemory, window=window, sink=sink, keys=keys)) for keys in ("raw", "rotated")
    )
    assert all(torch.equal(a, b) for a, b in zip(raw, rotated, strict=True))


def test_a_window_holds_sink_past_and_current() -> None:
    ledger = make(RingMemory, window=9, sink=3).ledger
    for start, length in CHUNKS[:4]:
        ledger.commit(span(start, length))
    assert [held.frame for held in ledger.visible(3)] == [0, 1, 2, 9, 10, 11]
    assert [held.frame for held in ledger.visible(1)] == [0, 1, 2, 7, 8, 9, 10, 11]


def test_window_positions_equal_absolute_ones_until_the_window_is_full() -> None:
    absolute = feed(make(RingMemory, window=9, sink=3, keys="raw"))
    window = feed(make(RingMemory, window=9, sink=3, keys="raw", positions=Relative()))
    same = [torch.equal(a, b) for a, b in zip(absolute, window, strict=True)]
    assert same == [True, True, True, False, False]


def test_window_positions_stay_inside_the_window() -> None:
    memory = make(RingMemory, window=9, sink=3, keys="raw", positions=Relative())
    feed(memory)
    assert memory.view(span(99, 3)).positions == (6, 7, 8)
    assert sorted(memory.view(span(99, 3)).slot_positions) == list(range(9))


@pytest.mark.parametrize("keys", ["rotated", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_known_before_they_are_allocated(keys, dtype) -> None:
    memory = make(RingMemory, window=9, keys=keys, dtype=dtype)
    assert memory.nbytes == memory.plan.nbytes
    assert memory.plan.nbytes == 9 * 6 * 128 * 2 * dtype.itemsize * (2 * 2 + (keys == "raw"))
    memory.free()
    assert memory.nbytes == 0


@pytest.mark.parametrize("window", [-1, 6, 7, 60])
def test_a_window_longer_than_the_video_takes_the_bytes_of_the_video(window) -> None:
    plan = MemoryPlan.of(TINY, (2, 16, 6, 4, 6), window_frames=window, sink_frames=3)
    assert (plan.window_frames, plan.sink_frames) == (6, 0)
    assert plan.nbytes == 2 * 6 * 6 * TINY.dim * 4 * (2 * TINY.num_layers)


def test_the_published_size_takes_the_published_bytes() -> None:
    """Self-Forcing 1.3B at 832x480 over 21 latent frames holds 6.04 GB in bf16."""
    from autorefiner.refiner.wan.transformer import WAN_1_3B

    plan = MemoryPlan.of(WAN_1_3B, (1, 16, 21, 60, 104), dtype=torch.bfloat16)
    assert plan.nbytes == 32760 * 6144 * 30


@pytest.mark.parametrize("kind", [RingMemory, GraphMemory])
def test_memory_does_not_grow_with_the_video(kind) -> None:
    memory = make(kind, window=9, sink=3)
    plan, sizes = memory.plan, []
    key = torch.zeros(plan.batch, 3 * plan.frame_tokens, plan.heads, plan.head_dim)
    table = rotation_table(span(0, 3), plan.height, plan.width, plan.head_dim, like=key)
    for start in range(0, 300, 3):
        view = memory.view(span(start, 3))
        for layer in range(plan.layers):
            view.extend(layer, key, key, table)
        memory.commit()
        sizes.append((memory.nbytes, len(memory.ledger.held)))
    assert len(set(sizes[3:])) == 1


def test_a_flush_of_the_whole_window_changes_nothing() -> None:
    events = {6: lambda memory: memory.flush(keep_last=9)}
    plain, flushed = feed(make(RingMemory, window=9)), feed(make(RingMemory, window=9), events)
    assert all(torch.equal(a, b) for a, b in zip(plain, flushed, strict=True))


@pytest.mark.parametrize("keys", ["rotated", "raw"])
def test_a_flush_keeps_the_sink_and_the_last_frames(keys) -> None:
    events = {12: lambda memory: memory.flush(keep_last=1)}
    ring, graph = (
        feed(make(kind, window=9, sink=3, keys=keys), events) for kind in (RingMemory, GraphMemory)
    )
    assert all(torch.equal(a, b) for a, b in zip(ring, graph, strict=True))
    assert ring[-1].shape[1] == (3 + 1 + 2) * 6, (
        "sink, one past frame and the two of the last chunk"
    )


def test_a_cut_moves_the_next_chunk_alone() -> None:
    memory = make(RingMemory, window=9, sink=1, keys="raw", positions=Relative())
    memory.ledger.cut(Cut(45))
    assert memory.view(span(0, 3)).positions == (45, 46, 47)
    memory.commit()
    assert memory.view(span(3, 3)).positions == (3, 4, 5)
    memory.ledger.cut(Cut(45))
    assert memory.view(span(3, 3)).positions == (45, 46, 47), (
        "also of a chunk that was already begun"
    )
    with pytest.raises(ValueError, match="relative positions"):
        make(RingMemory).ledger.cut(Cut(45))


def test_a_chunk_that_wraps_around_the_ring_is_written_in_two_pieces() -> None:
    assert runs([5, 6, 2]) == [(5, 0, 2), (2, 2, 1)]
    assert runs([2, 3, 4]) == [(2, 0, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window_frames=3, sink_frames=3), "sink"),
        (dict(window_frames=9, positions=Relative()), "need keys='raw'"),
        (dict(window_frames=9, keys="turned"), "expected rotated"),
    ],
)
def test_impossible_plans_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryPlan(layers=1, heads=1, head_dim=128, batch=1, height=2, width=2, **options)


def test_a_window_smaller_than_sink_and_chunk_names_the_one_that_fits() -> None:
    with pytest.raises(ValueError, match="at least 6"):
        make(RingMemory, window=5, sink=3).view(span(0, 3))


@pytest.mark.parametrize("kind", [RingMemory, GraphMemory])
def test_a_commit_without_a_pass_is_refused(kind) -> None:
    with pytest.raises(ValueError, match="nothing to commit"):
        make(kind).commit()
