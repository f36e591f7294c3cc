"""Search and self-refinement: neutral settings equal the base, otherwise the better one wins."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.noise.refiner import Refiner, merged, target_modules
from autorefiner.refiner.noise.source import WhiteNoise
from autorefiner.refiner.rollout import PromptSwitch, Rollout
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.samplers import best_of_n, ode, search_over_path, self_refine
from autorefiner.refiner.schedule import PRESETS, Level, plan_chunks
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.lora import LoraPair

from tiny import TINY, tiny_network
from tiny_reward import Scored, indifferent

PRESET = PRESETS["self-forcing"]
PLAN = RunPlan(PRESET, 7, 4, 4, batch=2)
CONTEXT = torch.randn(2, TINY.text_len, TINY.text_dim, generator=torch.Generator().manual_seed(0))


def run(network: CausalWan, **options) -> Tensor:
    return torch.cat(list(sample(network, CONTEXT, PLAN, seed=3, **options)), dim=2)


def mean(x0: Tensor) -> Tensor:
    return x0.mean(dim=(1, 2, 3, 4))


brightness = Scored(mean)


def counted(network: CausalWan) -> list[int]:
    """Add an entry to the returned list for every pass from now on."""
    calls: list[int] = []
    network.model.time_embedding.register_forward_hook(
        lambda module, inputs, output: calls.append(1)
    )
    return calls


def refiner_of(network: CausalWan, previous: str = "pending") -> Refiner:
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for name, module in target_modules(network.model).items():
        out, into = module.weight.shape
        down, up = (
            0.1 * torch.randn(*shape, generator=generator) for shape in ((4, into), (out, 4))
        )
        pairs[name] = LoraPair(down, up, 1.0)
    return Refiner(merged(network, pairs), ReflectiveCache("shared", previous))


IDLE = [
    self_refine({}), self_refine(threshold=float("inf")), best_of_n(indifferent, 3),
    search_over_path(indifferent, 3),
]  # fmt: skip


@pytest.mark.parametrize("method", IDLE, ids=lambda method: method.name)
def test_what_changes_nothing_is_the_base_bit_for_bit(method) -> None:
    network = tiny_network()
    assert torch.equal(run(network, method=method), run(network))


def test_passes_are_what_the_method_says() -> None:
    network = tiny_network()
    calls = counted(network)

    def passes(method) -> int:
        calls.clear()
        run(network, method=method)
        return len(calls)

    commits, chunks, levels = 2, 3, 4
    assert passes(self_refine({750: 2, 500: 1}, threshold=0.0)) == chunks * (levels + 3) + commits
    # Certain at once.
    assert passes(self_refine({750: 2}, threshold=float("inf"))) == chunks * (levels + 1) + commits
    assert passes(best_of_n(brightness, 5)) == chunks * levels * 5 + commits
    assert passes(search_over_path(brightness, 5)) == chunks * levels * 5 + commits


@pytest.mark.parametrize(
    ("previous", "threshold", "seed"), [(None, 0.4, 1), ("none", 0.7, 12), ("pending", 0.7, 12)]
)
def test_a_sample_stops_repeating_by_itself(
    previous: str | None, threshold: float, seed: int
) -> None:
    """The first sample becomes certain before the second, and keeps that answer's pending keys."""
    network, method = tiny_network(), self_refine({750: 3, 500: 3, 250: 3}, threshold, enough=0.05)
    refiner = refiner_of(network, previous) if previous else None
    calls = counted(network)

    def first_chunk(batch: int) -> tuple[Tensor, int]:
        calls.clear()
        plan = RunPlan(PRESET, 3, 4, 4, batch=batch)
        x0 = next(
            iter(sample(network, CONTEXT[:batch], plan, seed=seed, method=method, refiner=refiner))
        )
        return x0, len(calls)

    (both, passes), (alone, fewer) = first_chunk(2), first_chunk(1)
    assert fewer < passes
    assert torch.allclose(both[:1], alone, atol=1e-5)


@torch.no_grad()
def test_a_sample_that_is_kept_has_the_pending_keys_of_the_prediction_before() -> None:
    network, kept = tiny_network(), torch.tensor([True, False])
    chunk = plan_chunks(PRESET, 3)[1][0]
    level, below = chunk.levels[:2]

    def residual(kind, predicted: list[tuple[Level, Tensor | None]], keys: str) -> Tensor:
        memory = kind(MemoryPlan.of(TINY, (2, 16, 3, 4, 4), keys=keys, spare_frames=3))
        refiner = refiner_of(network)
        rollout = Rollout(
            network, network.text(CONTEXT), memory, WhiteNoise(3), [chunk], (2, 16, 4, 4),
            torch.device("cpu"), torch.float32, refiner=refiner, refiner_text=refiner.text(CONTEXT),
        )  # fmt: skip
        x = rollout.draw(chunk, level)
        for at, rows in predicted:
            rollout.predict(x, at, chunk, rows)
        return rollout.residual(x, None, below, chunk)

    for kind, keys in product((RingMemory, GraphMemory), ("rotated", "raw")):
        before, behind, mixed = (
            residual(kind, predicted, keys)
            for predicted in ([(level, None)], [(below, None)], [(level, None), (below, kept)])
        )
        assert not torch.allclose(before, behind, atol=1e-4)
        assert torch.equal(mixed, torch.cat((before[:1], behind[1:])))


@pytest.mark.parametrize("kind", [best_of_n, search_over_path])
def test_the_best_candidate_of_each_sample_is_taken(kind) -> None:
    network = tiny_network()
    plan = RunPlan(PRESET, 3, 4, 4, batch=2)

    def first_chunk(method=None) -> Tensor:
        return next(
            iter(sample(network, CONTEXT, plan, seed=3, **({"method": method} if method else {})))
        )

    best = mean(first_chunk(kind(brightness, 4)))
    worst = mean(first_chunk(kind(Scored(lambda x0: -mean(x0)), 4)))
    base = mean(first_chunk())
    assert (best >= base).all()
    assert (worst <= base).all()
    assert (best > worst).all()


@pytest.mark.parametrize("kind", [best_of_n, search_over_path])
def test_every_candidate_has_noise_of_its_own_at_every_level(kind) -> None:
    network, seen = tiny_network(), []

    def score(x0: Tensor) -> Tensor:
        seen.append(x0)
        return torch.zeros(len(x0))

    plan = RunPlan(PRESET, 3, 4, 4, batch=2)
    list(sample(network, CONTEXT, plan, seed=3, method=kind(Scored(score), 3)))
    assert len(seen) == (3 if kind is best_of_n else 3 * len(PRESET.levels))
    for start in range(0, len(seen), 3):
        for one, other in combinations(seen[start : start + 3], 2):
            assert (one - other).abs().mean() > 1e-3


def test_self_refinement_repeats_the_second_and_third_level_by_default() -> None:
    chunk, network = plan_chunks(PRESET, 3)[1][0], tiny_network()
    assert [self_refine().passes(replace(chunk, levels=chunk.levels[:n])) for n in range(5)] == [
        0,
        1,
        4,
        6,
        7,
    ]
    explicit = self_refine({750: 2, 500: 1}, threshold=0.25, enough=0.999)
    assert torch.equal(run(network, method=self_refine()), run(network, method=explicit))


def test_a_method_says_where_it_changes_nothing() -> None:
    assert self_refine({750: 2, 500: 0}).note((1000, 750), ()) is None
    assert "750" in self_refine({750: 2, 500: 0}).note((1000, 500), ())
    assert ode().note((1000, 750), (1000,)) is None
    assert ode().note((1000, 750), ()) is None
    assert "ode" in ode().note((1000, 750), (750,))


@pytest.mark.parametrize("kind", [best_of_n, search_over_path])
@torch.no_grad()
def test_a_search_follows_a_prompt_switch(kind) -> None:
    network = tiny_network()

    def second_chunk(switched: bool) -> Tensor:
        rollout = Rollout(
            network, network.text(CONTEXT), RingMemory(MemoryPlan.of(TINY, (2, 16, 6, 4, 4))),
            WhiteNoise(3), plan_chunks(PRESET, 6)[1], (2, 16, 4, 4), torch.device("cpu"),
            torch.float32,
        )  # fmt: skip
        chunks = kind(indifferent, 2).run(rollout)
        next(chunks)
        if switched:
            rollout.event(PromptSwitch(-CONTEXT))
        return next(chunks)

    assert (second_chunk(True) - second_chunk(False)).abs().max() > 1e-3


def test_the_host_waits_for_the_device_only_where_a_repeat_may_be_saved() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    def reads(**options) -> int:
        with Reads() as mode:
            run(tiny_network(), **options)
        return mode.count

    chunks, base = 3, reads()
    assert reads(method=self_refine({750: 1, 500: 1}, threshold=0.0)) == base
    assert reads(method=self_refine({750: 3}, threshold=0.0)) == base + 2 * chunks


def test_a_place_that_is_certain_keeps_its_first_answer() -> None:
    network = tiny_network()
    base, some, none = (
        run(network, method=self_refine({250: 1}, threshold=t)) for t in (float("inf"), 0.4, 0.0)
    )
    first = slice(0, 3)  # later chunks have different histories
    kept = (some == base)[:, :, first].all(dim=1)
    assert 0 < kept.float().mean() < 1
    changed = torch.where(kept[:, None], base[:, :, first], none[:, :, first])
    assert torch.equal(some[:, :, first], changed)


def test_self_refinement_goes_on_top_of_a_refiner_and_search_says_where_it_does_not() -> None:
    network = tiny_network()
    refined = run(network, refiner=refiner_of(network))
    both = run(network, refiner=refiner_of(network), method=self_refine(threshold=0.0))
    assert not torch.equal(both, refined)
    assert torch.equal(run(network, refiner=refiner_of(network), method=self_refine({})), refined)
    assert torch.equal(
        run(network, refiner=refiner_of(network), method=best_of_n(indifferent, 2)), refined
    )
    joint = refiner_of(network, "joint")
    method = search_over_path(indifferent, 2)
    assert torch.equal(run(network, refiner=joint, method=method), run(network, refiner=joint))
    with pytest.raises(ValueError, match="use Best-of-N"):
        run(network, refiner=refiner_of(network), method=search_over_path(indifferent, 2))


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        best_of_n(indifferent, 1)
    with pytest.raises(ValueError, match="within"):
        self_refine(enough=0.0)
