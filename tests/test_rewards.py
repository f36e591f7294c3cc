"""Rewards: which frames they see, refused values, and searches that choose by them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.samplers import best_of_n, search_over_path
from autorefiner.refiner.schedule import PRESETS, plan_chunks
from autorefiner.refiner.training.rewards.decode import decode_frames, latent_of
from autorefiner.refiner.training.rewards.reward import FrameDraw, Mixture, scored
from autorefiner.refiner.training.rewards.verifier import RewardVerifier
from autorefiner.refiner.wan.vae import WanVAE

from tiny import TINY, tiny_network
from tiny_reward import Brightness, tiny_vae

PROMPTS = ["one", "two"]


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return tiny_vae()


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2, 16, 7, 2, 2, generator=torch.Generator().manual_seed(0))


def test_clips_and_single_frames_are_drawn_as_told() -> None:
    rng = np.random.default_rng(0)
    drawn = [FrameDraw(4, 10).draw(rng, 81) for _ in range(1000)]
    assert {tuple(np.diff(frames)) for frames in drawn} == {(10, 10, 10)}
    assert {frames[0] for frames in drawn} == set(range(51))
    assert {FrameDraw(4, 10, opening=1.0).draw(rng, 81) for _ in range(5)} == {(0, 10, 20, 30)}
    assert FrameDraw(4, 10).draw(rng, 31) == (0, 10, 20, 30)
    assert len(FrameDraw(4, 10).draw(rng, 21)) == 3
    single = [FrameDraw(2).draw(rng, 9) for _ in range(300)]
    assert {frame for frames in single for frame in frames} == set(range(9))
    assert all(first < second for first, second in single)
    assert FrameDraw(2).draw(rng, 1) == (0,)
    for wrong in (dict(count=0), dict(count=2, interval=-1)):
        with pytest.raises(ValueError, match="at least 1"):
            FrameDraw(**wrong)


def test_a_search_judges_by_the_newest_frames() -> None:
    assert FrameDraw(3, 4).windows(21, 12) == (
        (12, 16, 20), (11, 15, 19), (10, 14, 18), (9, 13, 17),
    )  # fmt: skip
    assert FrameDraw(8, 3).windows(9, 9) == ((2, 5, 8), (1, 4, 7), (0, 3, 6))
    assert FrameDraw(8, 4).windows(2, 2) == ((1,), (0,))
    assert FrameDraw(2).windows(21, 12) == ((13, 16),)
    assert FrameDraw(1).windows(21, 12) == ((14,),)
    assert FrameDraw(5).windows(1, 1) == ((0,),)


@pytest.mark.parametrize("frames", [FrameDraw(8, 3), FrameDraw(3, 5), FrameDraw(1, 4)])
@pytest.mark.parametrize("total", [9, 21, 45])
def test_a_searchs_windows_see_every_frame_that_they_reach(frames: FrameDraw, total: int) -> None:
    windows = frames.windows(total, 9 if total == 9 else 12)
    seen = set().union(*windows)
    assert seen == set(range(max(0, total - 1 - frames.reach), total))
    assert all(set(np.diff(window)) <= {frames.interval} for window in windows)


def test_a_score_outside_of_its_range_is_refused_in_one_line() -> None:
    frames = torch.ones(2, 1, 3, 4, 4)
    assert scored(Brightness(), frames, [0], PROMPTS).tolist() == [1, 1]
    assert scored(Brightness(scale=1.0005), frames, [0], PROMPTS).amax() > 1  # rounding
    for scale in (1.1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"^[^\n]*reward brightness[^\n]*$"):
            scored(Brightness(scale=scale), frames, [0], PROMPTS)
    with pytest.raises(ValueError, match="expected \\[1\\]"):
        scored(Brightness(), frames, [0], PROMPTS[:1])


def test_a_mixture_weighs_and_each_reward_sees_its_own_frames() -> None:
    dark = Brightness("darkness", -1.0, (-1.0, 0.0), FrameDraw(1))
    mixture = Mixture(((Brightness(), 2.0), (dark, 0.5)))
    frames = torch.tensor([0.0, 0.2, 0.6])[None, :, None, None, None].expand(2, 3, 3, 4, 4)
    total, scores = mixture(frames, [3, 5, 8], [(5, 8), (3,)], PROMPTS)
    assert torch.allclose(scores["brightness"], torch.tensor(0.4))
    assert torch.equal(scores["darkness"], torch.zeros(2))
    assert torch.allclose(total, torch.tensor(0.8))
    for wrong in ((), ((Brightness(), 1.0), (Brightness(), 1.0))):
        with pytest.raises(ValueError, match="each once"):
            Mixture(wrong)


@torch.no_grad()
def test_single_frames_are_those_of_the_whole_decode(vae, latents) -> None:
    whole = ((vae.decode(latents) + 1) / 2).clamp(0, 1).transpose(1, 2)
    assert [latent_of(frame) for frame in (0, 1, 4, 5, 24)] == [0, 1, 1, 2, 6]
    for numbers in ((0, 1, 24), (3, 4, 5), (0,), (20,)):
        assert torch.allclose(
            decode_frames(vae, latents, numbers, context=7), whole[:, list(numbers)], atol=1e-6
        )
    near = decode_frames(vae, latents, (24,), context=4)
    later = ((vae.decode(latents[:, :, 2:])[:, :, -1:] + 1) / 2).clamp(0, 1).transpose(1, 2)
    assert torch.allclose(near, later, atol=1e-6)
    assert not torch.allclose(near, whole[:, 24:], atol=1e-6)


def test_only_the_latents_of_the_frames_have_a_gradient(vae, latents) -> None:
    latents.requires_grad_(True)
    decode_frames(vae, latents, (5, 20)).square().sum().backward()
    assert latents.grad.abs().sum(dim=(0, 1, 3, 4)).nonzero().flatten().tolist() == [2, 5]


def test_a_judge_sees_the_frames_of_the_whole_video_and_holds_few(vae, latents) -> None:
    rewards = Mixture(
        (
            (Brightness(frames=FrameDraw(3, 5)), 1.0),
            (Brightness("single", frames=FrameDraw(2)), 0.5),
        )
    )
    preset = replace(PRESETS["self-forcing"], chunk=2)
    whole = ((vae.decode(latents) + 1) / 2).clamp(0, 1).transpose(1, 2)
    clip, single = (reward for reward, _ in rewards.parts)
    judge, held = RewardVerifier(rewards, vae, PROMPTS).begin(), []
    for chunk in plan_chunks(preset, 6)[1]:
        until, total = chunk.start + chunk.length, 4 * (chunk.start + chunk.length) - 3
        new = 4 * chunk.length - 3 * (chunk.start == 0)
        part = latents[:, :, chunk.start : until]
        assert not torch.allclose(judge.score(-part, chunk), judge.score(part, chunk))
        windows = clip.frames.windows(total, new)
        (one,) = single.frames.windows(total, new)
        clips = [clip(whole[:, list(each)], each, PROMPTS) for each in windows]
        wanted = sum(clips) / len(clips) + 0.5 * single(whole[:, list(one)], one, PROMPTS)
        assert torch.allclose(judge.score(part, chunk), wanted, atol=1e-6)
        held.append(0 if judge.frames is None else judge.frames.shape[1])
        judge.keep(part, chunk)
    assert windows[0] == (10, 15, 20)  # across the chunk's first frame, 13
    assert held == [0, 5, 13]


@pytest.mark.parametrize("method", [best_of_n, search_over_path])
@pytest.mark.parametrize("given", [1, 3, 4])
def test_a_search_that_extends_a_clip_sees_the_frames_of_the_whole_video(
    vae, method, given
) -> None:
    seen: list[tuple[tuple[int, ...], Tensor]] = []

    class Told(Brightness):
        def __call__(
            self, frames: Tensor, numbers: Sequence[int], prompts: Sequence[str]
        ) -> Tensor:
            seen.append((tuple(numbers), frames.clone()))
            return super().__call__(frames, numbers, prompts)

    rewards = Mixture(
        ((Told(frames=FrameDraw(3, 8)), 1.0), (Told("single", frames=FrameDraw(12)), 0.5))
    )
    initial = torch.randn(1, 16, given, 4, 4, generator=torch.Generator().manual_seed(0))
    context = torch.randn(
        1, TINY.text_len, TINY.text_dim, generator=torch.Generator().manual_seed(1)
    )
    plan = RunPlan(PRESETS["self-forcing"], 6, 4, 4, given=given)
    search = method(RewardVerifier(rewards, vae, PROMPTS[:1]), 2)
    new = list(sample(tiny_network(), context, plan, seed=3, initial=initial, method=search))
    whole = ((vae.decode(torch.cat((initial, *new), 2)) + 1) / 2).clamp(0, 1).transpose(1, 2)
    numbers = [
        window
        for until in (given + 3, given + 6)
        for reward, _ in rewards.parts
        for window in reward.frames.windows(4 * until - 3, 12)
    ]
    assert {draw for draw, _ in seen} == set(numbers)
    for wanted in numbers:
        frames = [frames for draw, frames in seen if draw == wanted]
        # The frames of one candidate, the chosen one, are those of the clip.
        nearest = min((one - whole[:, list(wanted)]).abs().max() for one in frames)
        assert nearest < 3e-5


def test_a_judge_decodes_each_candidate_once_and_a_chosen_chunk_only_if_one_follows(
    vae, monkeypatch
) -> None:
    decoded = []
    decode = vae.decode
    monkeypatch.setattr(
        vae, "decode", lambda x, state: decoded.append(x.shape[2]) or decode(x, state)
    )
    context = torch.randn(
        2, TINY.text_len, TINY.text_dim, generator=torch.Generator().manual_seed(0)
    )
    plan = RunPlan(PRESETS["self-forcing"], 6, 4, 4, batch=2)
    verifier = RewardVerifier(Mixture(((Brightness(), 1.0),)), vae, PROMPTS)
    list(sample(tiny_network(), context, plan, method=best_of_n(verifier, 3)))
    assert decoded == [3] * (3 + 1 + 3)


@pytest.mark.parametrize("method", [best_of_n, search_over_path])
def test_a_search_raises_the_reward_that_it_chooses_by(vae, method) -> None:
    network, plan = tiny_network(), RunPlan(PRESETS["self-forcing"], 4, 4, 4, batch=2)
    context = torch.randn(
        2, TINY.text_len, TINY.text_dim, generator=torch.Generator().manual_seed(0)
    )
    seen: list[tuple[int, ...]] = []

    class Told(Brightness):
        def __call__(
            self, frames: Tensor, numbers: Sequence[int], prompts: Sequence[str]
        ) -> Tensor:
            seen.append(tuple(numbers))
            return super().__call__(frames, numbers, prompts)

    verifier = RewardVerifier(Mixture(((Told(), 1.0),)), vae, PROMPTS)

    def reward(seed: int, **how) -> Tensor:
        latents = next(iter(sample(network, context, plan, seed=seed, **how)))
        return verifier.begin().score(latents, plan_chunks(plan.preset, 3)[1][0])

    gains = [reward(seed, method=method(verifier, 3)) - reward(seed) for seed in range(4)]
    gain = torch.stack(gains)
    # a path is chosen level by level, so it may end lower once
    assert gain.mean() > 0 and (method is search_over_path or (gain >= 0).all())
    of_first = {(5, 8), (4, 7), (3, 6)}  # of the first chunk's 9 frames
    assert set(seen) == of_first
    list(sample(network, context, plan, seed=3, method=method(verifier, 3)))
    assert set(seen) == of_first | {(9, 12), (8, 11), (7, 10)}  # of the video's 13
