"""The refine pass: inputs, outputs, and which tensors have a graph."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autorefiner.nodes.run import Run, plan_run
from autorefiner.refiner.estimate import Estimate, parameter_count, pass_bytes, text_kv_bytes
from autorefiner.refiner.memory.graph import GraphMemory
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.positions import Absolute, Relative
from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.noise.refiner import Refiner, merged, target_modules
from autorefiner.refiner.noise.source import Draw, WhiteNoise
from autorefiner.refiner.rollout import PromptSwitch, Rollout
from autorefiner.refiner.sample import RunPlan
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.training.self_rollout import self_rollout
from autorefiner.refiner.wan.causal import CausalWan
from autorefiner.refiner.wan.lora import LoraPair
from autorefiner.refiner.wan.vae import LATENT_MEAN, LATENT_STD, WanVAE, normalized, raw_latents

from tiny import TINY, tiny_network

SF = PRESETS["self-forcing"]
SHAPE = (2, 16, 6, 4, 4)
CONTEXTS = torch.randn(
    2, 2, TINY.text_len, TINY.text_dim, generator=torch.Generator().manual_seed(0)
)
CPU = torch.device("cpu")


def t_phi(network: CausalWan) -> CausalWan:
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for name, module in target_modules(network.model).items():
        out, into = module.weight.shape
        parts = (0.1 * torch.randn(shape, generator=generator) for shape in ((4, into), (out, 4)))
        pairs[name] = LoraPair(*parts, 1.0)
    return merged(network, pairs)


class Recording:
    """A network that records its calls."""

    def __init__(self, network: CausalWan) -> None:
        self.network, self.calls = network, []

    def __call__(self, x: Tensor, t: Tensor, text: list, view, keys_only: bool = False) -> Tensor:
        self.calls.append((x.clone(), t.clone(), text))
        return self.network(x, t, text, view, keys_only=keys_only)

    def text(self, context: Tensor, batch: int | None = None) -> list:
        return self.network.text(context, batch)


def rollout_of(network: CausalWan, refiner: Refiner | None, memory=None) -> Rollout:
    plan = RunPlan(SF, SHAPE[2], 4, 4, batch=2)
    make = (lambda *_: memory) if memory else RingMemory
    return Rollout.of(network, CONTEXTS[0], plan, WhiteNoise(3), memory=make, refiner=refiner)


@torch.no_grad()
@pytest.mark.parametrize("previous", ["pending", "joint", "none"])
def test_a_refine_pass_takes_the_noise_at_its_level_behind_x0_at_zero(previous: str) -> None:
    network = tiny_network()
    recording = Recording(t_phi(network))
    rollout = rollout_of(network, Refiner(recording, ReflectiveCache("shared", previous)))
    chunk = rollout.chunks[0]
    first, level = chunk.levels[:2]
    x0 = rollout.predict(rollout.draw(chunk, first), first, chunk)
    assert not recording.calls, "the initial noise is not refined"
    rollout.renoise(x0, level, chunk)
    ((x, t, text),) = recording.calls
    noise = WhiteNoise(3)(chunk, Draw(level.step), (2, 16, 3, 4, 4))
    assert text is rollout.refiner_text
    if previous == "joint":
        assert torch.equal(x, torch.cat((x0, noise), dim=2))
        assert t.tolist() == [[0.0] * 3 + [level.t] * 3]
    else:
        assert torch.equal(x, noise)
        assert t.flatten().tolist() == [level.t]


@torch.no_grad()
def test_joint_is_the_noise_half_of_a_pass_behind_one_that_writes_x0() -> None:
    """Through the refiner, two passes (x0 at t = 0, then the noise at its level) give the same."""
    network = tiny_network()
    tphi = t_phi(network)
    results = []
    for together in (True, False):
        rollout = rollout_of(
            network, Refiner(tphi, ReflectiveCache("shared", "joint" if together else "pending"))
        )
        for chunk in rollout.chunks:
            first, level = chunk.levels[:2]
            x0 = rollout.predict(rollout.draw(chunk, first), first, chunk)
            noise = WhiteNoise(3)(chunk, Draw(level.step), (2, 16, 3, 4, 4))
            if not together:  # then pending reads the K/V of x0 itself
                view = rollout.memory.view(chunk.frames)
                tphi(
                    x0,
                    torch.zeros(1, 1, dtype=torch.float64),
                    rollout.refiner_text,
                    view,
                    keys_only=True,
                )
            results.append(rollout.residual(noise, x0, level, chunk))
            rollout.commit(x0, chunk)
    for one, other in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert (results[0] - results[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_refine_pass_needs_its_own_chunks_prediction_and_room_for_what_it_writes() -> None:
    network = tiny_network()
    refiner = Refiner(t_phi(network))
    rollout = rollout_of(network, refiner)
    chunk, later = rollout.chunks
    first, level = chunk.levels[:2]
    x0 = rollout.predict(rollout.draw(chunk, first), first, chunk)
    with pytest.raises(ValueError, match="predict"):
        rollout.renoise(x0, level, later)
    narrow = rollout_of(
        network, refiner, RingMemory(MemoryPlan.of(TINY, SHAPE, spare_frames=chunk.length - 1))
    )
    narrow.predict(narrow.draw(chunk, first), first, chunk)
    with pytest.raises(ValueError, match="spare"):
        narrow.renoise(x0, level, chunk)


@torch.no_grad()
def test_strength_multiplies_the_residual_and_the_watch_sees_it_whole() -> None:
    network, seen = tiny_network(), []
    base = Refiner(
        t_phi(network),
        ReflectiveCache("shared", "none"),
        watch=lambda *arguments: seen.append(arguments),
    )
    found = []
    for strength in (1.0, -0.5):
        rollout = rollout_of(network, replace(base, strength=strength))
        chunk = rollout.chunks[0]
        first, level = chunk.levels[:2]
        x0 = rollout.predict(rollout.draw(chunk, first), first, chunk)
        noise = WhiteNoise(3)(chunk, Draw(level.step), (2, 16, 3, 4, 4))
        found.append(rollout.residual(noise, x0, level, chunk))
        drawn = rollout.draw(chunk, level, x0=x0)
        torch.testing.assert_close(drawn, noise + found[-1])
        torch.testing.assert_close(
            rollout.renoise(x0, level, chunk),
            (1 - level.sigma) * x0 + level.sigma * (noise + found[-1]),
        )
    assert torch.equal(found[1], -0.5 * found[0])
    assert all(torch.equal(residual, found[0]) for _, residual, _ in seen)
    assert all(torch.equal(watched, noise) for watched, _, _ in seen)


@torch.no_grad()
def test_only_refined_levels_are_refined() -> None:
    network = tiny_network()
    recording = Recording(t_phi(network))
    rollout = rollout_of(
        network, Refiner(recording, ReflectiveCache("shared", "none"), frozenset({500}))
    )
    chunk = rollout.chunks[0]
    x0 = rollout.predict(rollout.draw(chunk, chunk.levels[0]), chunk.levels[0], chunk)
    for level in chunk.levels[1:]:
        noise = WhiteNoise(3)(chunk, Draw(level.step), (2, 16, 3, 4, 4))
        assert torch.equal(rollout.draw(chunk, level, x0=x0), noise) == (level.step != 500)
    assert len(recording.calls) == 1


@torch.no_grad()
def test_a_prompt_switch_switches_the_base_and_the_refiner() -> None:
    network = tiny_network()
    refiner = Refiner(t_phi(network), ReflectiveCache("shared", "joint"))
    switched, fresh = rollout_of(network, refiner), rollout_of(network, refiner)
    switched.event(PromptSwitch(CONTEXTS[1]))
    fresh.text, fresh.refiner_text = network.text(CONTEXTS[1]), refiner.text(CONTEXTS[1])
    old = rollout_of(network, refiner)
    results = []
    for rollout in (switched, fresh, old):
        chunk = rollout.chunks[0]
        first, level = chunk.levels[:2]
        x0 = rollout.predict(rollout.draw(chunk, first), first, chunk)
        noise = WhiteNoise(3)(chunk, Draw(level.step), (2, 16, 3, 4, 4))
        results.append((x0, rollout.residual(noise, torch.zeros_like(x0), level, chunk)))
    for part in range(2):
        assert torch.equal(results[0][part], results[1][part])
        assert not torch.equal(results[0][part], results[2][part])
    plain = rollout_of(network, None)
    plain.event(PromptSwitch(CONTEXTS[1]))
    assert plain.refiner_text is None


def test_history_has_no_graph_and_a_clip_has_one_behind_its_level_alone() -> None:
    network = tiny_network()
    tree = t_phi(network)
    for parameter in tree.model.parameters():
        parameter.requires_grad_(True)
    passes: list[bool] = []
    tree.model.head.head.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    memory = GraphMemory(MemoryPlan.of(TINY, SHAPE))
    made = self_rollout(rollout_of(network, Refiner(tree), memory), exit_level=2)
    assert made.requires_grad
    assert not any(part.requires_grad for layer in memory.past for part in (layer.key, layer.value))
    assert passes == [False, True] * 2, "of the levels 750 and 500 of each chunk, the last"
    with torch.no_grad():
        rollout = rollout_of(network, Refiner(tree), GraphMemory(MemoryPlan.of(TINY, SHAPE)))
        assert not self_rollout(rollout, exit_level=2).requires_grad


def test_a_later_chunk_does_not_lead_back_into_an_earlier_one() -> None:
    network, seen = tiny_network(), []
    tree = t_phi(network)
    tree.model.blocks[0].ffn[0].weight.requires_grad_(True)
    refiner = Refiner(tree, watch=lambda noise, residual, level: seen.append(residual))
    clip = self_rollout(
        rollout_of(network, refiner, GraphMemory(MemoryPlan.of(TINY, SHAPE))), exit_level=1
    )
    first, second = seen
    for chunk, own, other in ((clip[:, :, :3], first, second), (clip[:, :, 3:], second, first)):
        of_own, of_other = torch.autograd.grad(
            chunk.sum(), (own, other), retain_graph=True, allow_unused=True
        )
        assert of_own.any()
        assert not of_other.any()


def test_a_clip_ends_with_the_chunk_after_which_it_is_stopped(monkeypatch) -> None:
    network, freed = tiny_network(), []
    free = RingMemory.free
    monkeypatch.setattr(RingMemory, "free", lambda memory: freed.append(memory) or free(memory))
    run = Run(plan_run(SF, (1, 9, 4, 4), None), 3, "self-forcing")
    context = CONTEXTS[0][:1]
    whole = run.clip(network, context, CPU, torch.float32)
    asked: list[int] = []
    stopped = run.clip(
        network, context, CPU, torch.float32, stop=lambda: asked.append(1) or len(asked) == 2
    )
    assert torch.equal(stopped, whole[:, :, :6])
    assert len(freed) == 2, "its memory is free"
    assert len(asked) == 2
    assert torch.equal(run.clip(network, context, CPU, torch.float32, stop=lambda: False), whole)
    initial = torch.zeros(1, 16, 3, 4, 4)
    begun = Run(plan_run(SF, (1, 9, 4, 4), initial), 3, "self-forcing", initial)
    assert begun.clip(network, context, CPU, torch.float32, stop=lambda: True).shape[2] == 6


def test_a_clip_that_is_not_finite_stops_at_its_first_chunk() -> None:
    network, asked = tiny_network(), []
    network.model.head.head.bias.data.fill_(float("nan"))
    run = Run(plan_run(SF, (1, 9, 4, 4), None), 3, "self-forcing")
    with pytest.raises(ValueError, match="finite"):
        run.clip(network, CONTEXTS[0][:1], CPU, torch.float32, stop=lambda: asked.append(1))
    assert not asked


def test_latents_of_nodes_are_raw_and_those_of_the_core_normalised() -> None:
    raw = torch.zeros(1, 16, 1, 1, 1)
    raw[0, 5] = LATENT_MEAN[5] + 2 * LATENT_STD[5]
    found = normalized(raw)
    assert found[0, 5].item() == pytest.approx(2.0, abs=1e-5)
    assert found[0, 3].item() == pytest.approx(-LATENT_MEAN[3] / LATENT_STD[3], abs=1e-5)
    torch.testing.assert_close(raw_latents(found), raw, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("window", [-1, 6])
@pytest.mark.parametrize("keys", ["rotated", "raw"])
@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_memory_are_those_that_it_allocates(
    batch, window, keys, refined, dtype
) -> None:
    """batch × (window + a refined chunk) × tokens × width, twice a layer, thrice with raw keys."""
    plan = RunPlan(SF.changed(window=window), 9, 4, 6, batch, keys=keys)
    memory = plan.memory(TINY, dtype, refined)
    frames = (9 if window < 0 else window) + (3 if refined else 0)
    one = batch * frames * (2 * 3) * TINY.dim * dtype.itemsize
    assert memory.nbytes == one * (2 * TINY.num_layers + (keys == "raw"))
    assert RingMemory(memory).nbytes == memory.nbytes


def test_estimates_by_hand() -> None:
    assert text_kv_bytes(TINY, 3, 8, torch.bfloat16) == 2 * 2 * 3 * 8 * 128 * 2
    assert parameter_count(TINY) == sum(one.numel() for one in tiny_network().model.parameters())
    plan = MemoryPlan.of(TINY, (3, 16, 9, 4, 6), positions=Relative())
    tokens = 3 * 3 * 6
    values = tokens * max(2 * 128 + 12 * 128, 18 * 128) * 4
    assert pass_bytes(TINY, plan, 3) == values + 8 * 3 * 9 * 6 * 128
    assert pass_bytes(TINY, replace(plan, keys="rotated", positions=Absolute()), 3) == values
    wide = replace(TINY, ffn_dim=1024)  # here the feed-forward takes more than the attention
    assert (
        pass_bytes(wide, MemoryPlan.of(wide, (3, 16, 9, 4, 6)), 3)
        == tokens * (2 * 1024 + 12 * 128) * 4
    )
    one, five = (WanVAE.decode_bytes(4, 16, 32, frames, torch.float32) for frames in (1, 5))
    assert five - one == 4 * (10 * 4 * 16 * 32) * 4 * 4, (
        "10 maps of width 4 in fp32, 4 frames a latent, 4 latents"
    )
    assert (
        len({WanVAE.decode_bytes(4, 512, 512, frames, torch.float32) for frames in (1, 5)}) == 1
    ), "in pieces"
    parts = Estimate(
        weights=100, kv=20, text_kv=3, activations=7, decode=11, refiner=40, text_encoder=50
    )
    assert parts.total == 100 + 20 + 3 + 11 + 40, "a pass and the decoder are not alive at once"
    assert replace(parts, activations=30).total == 100 + 20 + 3 + 30 + 40
    assert replace(parts, text_encoder=500).total == 500
    parts.check(174)
    with pytest.raises(ValueError, match="weights"):
        parts.check(173)
